"""What every network costs: ``python -m pipeline.models [NAME ...] --input-shape 32 32 3 --classes 10``."""

from __future__ import annotations

import argparse

from pipeline import cli, models
from pipeline.models import summary


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.models",
        description="Print parameters, operations and activation memory of networks with their default options.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(models.names())} (default: all)")
    parser.add_argument("--input-shape", type=int, nargs=3, default=(32, 32, 3), metavar=("H", "W", "C"))
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128, help="of the activations (default: 128)")
    arguments = parser.parse_args()
    figures = {}
    for name in arguments.names or models.names():
        network = models.build(name, tuple(arguments.input_shape), arguments.classes)
        figures[name] = summary.summarise(network, arguments.batch_size)
    from rich.console import Console

    Console().print(summary.table(figures))


if __name__ == "__main__":
    cli.run(main)
