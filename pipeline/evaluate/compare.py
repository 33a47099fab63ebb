"""Compare the finished runs of a folder: a table, and a figure of accuracy against training time and parameters.

report(Path("runs/sweep"))  # prints the table; writes comparison.csv and comparison.png
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from pipeline import augment, runs
from pipeline.core import files
from pipeline.core.errors import PipelineError
from pipeline.evaluate import figures

METRICS = ("epochs", "train_seconds", "images_per_second", "validation_accuracy", "test_accuracy")
# Short headings, so that the printed table fits into 80 characters.
HEADINGS = {
    "parameters": "weights", "train_seconds": "seconds", "images_per_second": "images/s", "test_accuracy": "test",
}  # fmt: skip
FORMATS = {
    "weights": "{:,}".format, "seconds": "{:,.1f}".format, "images/s": "{:,.0f}".format, "test": "{:.2%}".format,
}  # fmt: skip


def table(folder: Path) -> Any:
    """The finished runs in a folder, by dataset, best test accuracy first.

    A run that cannot be read is skipped, with one line on standard error.

    Args:
        folder: The folder of a multirun, or ``runs`` for all runs.

    Returns:
        A pandas dataframe with the columns ``run``, ``dataset``, ``model``, ``augment``, ``parameters`` and `METRICS`;
        ``train_seconds`` and ``images_per_second`` are measured in training.

    Raises:
        PipelineError: The folder is missing or contains no finished run.
    """
    import pandas

    if not folder.is_dir():
        raise PipelineError(f"There is no folder {folder}; pass the folder of a multirun, or runs for all runs.")
    rows = []
    for run in runs.below(folder):
        name = os.path.relpath(run.path, folder.resolve())
        try:
            rows.append({"run": name, **_columns(run)})
        except PipelineError as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
    if not rows and (folder / "metrics.json").is_file():
        raise PipelineError(f"{folder} is a single run; pass the folder that contains it to compare it with others.")
    if not rows:
        raise PipelineError(f"There is no finished run in {folder} to compare; train one: {runs.TRAIN_COMMAND}")
    frame = pandas.DataFrame(rows)
    return frame.sort_values(["dataset", "test_accuracy"], ascending=[True, False], ignore_index=True)


def _columns(run: runs.Run) -> dict[str, Any]:
    card, metrics = run.card, run.metrics
    if "test_accuracy" not in metrics:
        raise PipelineError(f"it has no test_accuracy; evaluate it: python -m pipeline.evaluate {run.path}")
    return {
        "dataset": card.dataset,
        "model": card.model,
        "augment": policy_label(run.config.augment),
        "parameters": card.parameters,
        **{key: metrics[key] for key in METRICS},
    }


def policy_label(policy: dict[str, Any]) -> str:
    """The name of a run's augmentation policy, with ``*`` if its operations differ from the policy of that name.

    Args:
        policy: The run's setting ``augment``.
    """
    name = str(policy.get("name", "custom"))
    try:
        return name if augment.load_policy(name) == augment.load_policy(policy) else f"{name}*"
    except PipelineError:  # a policy that has no file in pipeline/conf/augment
        return name


def report(folder: Path) -> None:
    """Print the table of a folder and write ``comparison.csv`` and ``comparison.png`` into it; raises like `table`."""
    frame = table(folder)
    hidden = ["validation_accuracy", *(["dataset"] if frame["dataset"].nunique() == 1 else [])]
    shown = frame.drop(columns=hidden).rename(columns=HEADINGS)
    shown.index += 1  # the figure shows the same numbers
    print(f"{folder}\n{shown.to_string(formatters=FORMATS)}")
    csv, png = folder / "comparison.csv", folder / "comparison.png"
    files.write_bytes(csv, frame.to_csv(index=False).encode())
    figures.save_figure(png, figures.comparison_figure(frame))
    print(f"table and figure: {csv}, {png}")
