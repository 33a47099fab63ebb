"""Run the notebooks in order, on the built-in digits or on the dataset given by -p.

    python -m pipeline
    python -m pipeline --name first -p dataset cifar10 -p data_dir ~/data/cifar10 -p epochs 5
    python -m pipeline --name first --notebooks 04_export 05_infer

The executed notebooks, one HTML report of all of them, and the exported models are in runs/NAME.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline.core import cli
from pipeline.notebooks.batch import run_notebooks


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter for every notebook that declares it; may be given several times",
    )
    parser.add_argument("--name", help="name of the run, whose folder is runs/NAME (default: notebooks-DATE-TIME)")
    parser.add_argument("--notebooks", nargs="+", metavar="NOTEBOOK", help="such as 03_train (default: all)")
    options = parser.parse_args(arguments)
    run_notebooks(dict(options.parameters), options.name, options.notebooks)


if __name__ == "__main__":
    cli.run(main)
