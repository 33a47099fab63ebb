"""Compare the finished runs of a folder in a table and a figure: python -m pipeline.compare runs/sweep"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline import runs
from pipeline.core import cli
from pipeline.evaluate.compare import report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.compare", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=runs.RUNS, help="folder of a multirun (default: runs)")
    report(parser.parse_args().folder)


if __name__ == "__main__":
    cli.run(main)
