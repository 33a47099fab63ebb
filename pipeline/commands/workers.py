"""Train in several processes: ``python -m pipeline.workers COUNT OVERRIDES...``."""

from __future__ import annotations

import argparse

from pipeline.core import cli
from pipeline.train.workers import (
    start,
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.workers", description=__doc__.split("\n")[0])
    parser.add_argument("count", type=cli.positive, metavar="COUNT", help="processes, one for each GPU")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for python -m pipeline.train")
    arguments = parser.parse_args()
    return start(arguments.count, arguments.overrides)


if __name__ == "__main__":
    cli.run(main)
