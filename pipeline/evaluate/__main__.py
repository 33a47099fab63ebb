"""Evaluate a run on a split of its dataset: python -m pipeline.evaluate runs/first"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline import runs
from pipeline.core import cli
from pipeline.data.dataset import SPLITS
from pipeline.evaluate.run import evaluate_run, print_report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluate", description=__doc__)
    parser.add_argument("run", nargs="?", default=None, help="run folder or name (default: runs/latest)")
    parser.add_argument("--split", default="test", choices=SPLITS, help="split to evaluate (default: test)")
    parser.add_argument("--data-dir", type=Path, default=None, help="folder of the dataset, if it has moved")
    arguments = parser.parse_args()
    run = runs.find(arguments.run)
    dataset = run.load_dataset(data_dir=arguments.data_dir and str(arguments.data_dir))
    print_report(evaluate_run(run, dataset, arguments.split), arguments.split)
    print(f"figures: {run.path / 'evaluation'}, metrics: {run.path / 'metrics.json'}")


if __name__ == "__main__":
    cli.run(main)
