"""What every network costs: ``python -m pipeline.models [NAME ...] --input-shape 32 32 3 --classes 10``."""

from __future__ import annotations

import argparse
import sys

from pipeline import models
from pipeline.core import cli
from pipeline.core.errors import PipelineError
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
    problems = []
    for name in arguments.names or models.names():
        try:
            network = models.build(name, tuple(arguments.input_shape), arguments.classes)
        except PipelineError as error:
            problems.append(error)
            continue
        figures[name] = summary.summarise(network, arguments.batch_size)
    from rich.console import Console

    if figures:
        Console().print(summary.table(figures))
    for problem in problems[:-1]:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise problems[-1]


if __name__ == "__main__":
    cli.run(main)
