"""Train one network in several processes: python -m pipeline.workers COUNT [SETTING=VALUE ...]"""

from __future__ import annotations

import argparse

from pipeline.core import cli


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.workers",
        description="Train one network in several processes on this machine, each with its own GPU.",
        epilog="example: python -m pipeline.workers 2 dataset=cifar10 data_dir=data model=resnet18 batch_size=256",
    )
    parser.add_argument("count", type=cli.positive, metavar="COUNT", help="number of processes, one for each GPU")
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="settings of python -m pipeline.train")
    arguments = parser.parse_args()
    from pipeline.train.workers import start

    return start(arguments.count, arguments.overrides)


if __name__ == "__main__":
    cli.run(main)
