"""Evaluate a run on a split of its dataset: python -m pipeline.evaluate runs/first"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline import runs
from pipeline.core import cli
from pipeline.data.dataset import SPLITS
from pipeline.evaluate.explain import explain_run
from pipeline.evaluate.run import check_augmentation, evaluate_run, prefix, print_report

EPILOG = """\
Metrics are written to RUN/metrics.json, figures and tables to RUN/evaluation/:
  SPLIT_confusion_matrix.png, SPLIT_calibration.png, SPLIT_mistakes.png
  SPLIT_explained_mistakes.png  what the network looked at: Grad-CAM or attention
  train_highest_loss.png, .csv  training images with the highest loss; check their labels
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", help="run folder or name (default: runs/latest)")
    parser.add_argument(
        "tta",
        nargs="?",
        metavar="tta=flip",
        help="test-time augmentation: average the probabilities of each image and its mirror image",
    )
    parser.add_argument("--split", default="test", choices=SPLITS, help="split to evaluate (default: test)")
    parser.add_argument("--data-dir", type=Path, default=None, help="folder of the dataset, if it has moved")
    arguments = parser.parse_args()
    if str(arguments.run).startswith("tta="):
        arguments.run, arguments.tta = arguments.tta, arguments.run
    tta = check_augmentation((arguments.tta or "tta=none").removeprefix("tta="))
    run, split = runs.find(arguments.run), arguments.split
    dataset = run.load_dataset(data_dir=arguments.data_dir and str(arguments.data_dir))
    print_report(evaluate_run(run, dataset, split, tta), prefix(split, tta))
    suspicious = explain_run(run, dataset, split)
    print(f"\ntraining images with the highest loss; check their labels:\n{suspicious.head(10).to_string(index=False)}")
    print(f"\nfigures and tables: {run.path / 'evaluation'}, metrics: {run.path / 'metrics.json'}")


if __name__ == "__main__":
    cli.run(main)
