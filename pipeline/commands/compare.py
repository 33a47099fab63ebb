"""Compare runs: ``python -m pipeline.compare runs/MULTIRUN``."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline import runs
from pipeline.core import cli
from pipeline.evaluate.compare import report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.compare", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=runs.RUNS, help="a multirun's folder (default: runs)")
    report(parser.parse_args().folder)


if __name__ == "__main__":
    cli.run(main)
