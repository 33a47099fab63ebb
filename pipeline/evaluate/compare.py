"""Compare the finished runs of a folder: a table, and a figure of accuracy against training time and parameters.

report(Path("runs/sweep"))  # prints the table; writes comparison.csv and comparison.png
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from pipeline import augment, runs
from pipeline.core import files
from pipeline.core.errors import PipelineError
from pipeline.evaluate import figures

METRICS = ("epochs", "train_seconds", "images_per_second", "validation_accuracy", "test_accuracy")
SETTINGS = ("dataset", "model", "augment", "optimizer", "learning_rate", "batch_size")
# Short headings, so that the printed table is narrow.
HEADINGS = {
    "parameters": "weights", "learning_rate": "rate", "batch_size": "batch",
    "train_seconds": "seconds", "images_per_second": "images/s", "test_accuracy": "test",
}  # fmt: skip
FORMATS = {
    "weights": "{:,}".format, "rate": "{:g}".format, "seconds": "{:,.1f}".format, "images/s": "{:,.0f}".format,
    "test": "{:.2%}".format,
}  # fmt: skip


def table(folder: Path) -> Any:
    """The finished runs in a folder, by dataset, best test accuracy first.

    A run that cannot be read is skipped, with one line on standard error.

    Args:
        folder: The folder of a multirun, or ``runs`` for all runs.

    Returns:
        A pandas dataframe with the columns ``run``, `SETTINGS`, ``parameters``, `METRICS` and ``group``;
        ``train_seconds`` and ``images_per_second`` are measured in training, and ``group`` is equal for runs that
        differ only in the seed.

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
            rows.append({"run": name, **_columns(run), "group": _settings_but_seed(run)})
        except PipelineError as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
    if not rows and (folder / "metrics.json").is_file():
        raise PipelineError(f"{folder} is a single run; pass the folder that contains it to compare it with others.")
    if not rows:
        raise PipelineError(f"There is no finished run in {folder} to compare; train one: {runs.TRAIN_COMMAND}")
    frame = pandas.DataFrame(rows)
    return frame.sort_values(["dataset", "test_accuracy"], ascending=[True, False], ignore_index=True)


def _columns(run: runs.Run) -> dict[str, Any]:
    card, metrics, config = run.card, run.metrics, run.config
    if "test_accuracy" not in metrics:
        raise PipelineError(f"it has no test_accuracy; evaluate it: python -m pipeline.evaluate {run.path}")
    return {
        "dataset": card.dataset,
        "model": card.model,
        "augment": policy_label(config.augment),
        "optimizer": config.optimizer.name,
        "learning_rate": config.optimizer.learning_rate,
        "batch_size": config.batch_size,
        "parameters": card.parameters,
        **{key: metrics[key] for key in METRICS},
    }


def _settings_but_seed(run: runs.Run) -> str:
    """Text that is equal for runs that differ only in the seed."""
    settings = run.config.model_copy(update={"seed": 0, "name": None, "resume": None}).plain()
    return json.dumps(settings, sort_keys=True)


def seeds(frame: Any) -> Any:
    """Mean and standard deviation over the runs that differ only in the seed.

    Args:
        frame: The result of `table`.

    Returns:
        A pandas dataframe with a row for each group of at least two runs: ``run`` (of the best one), ``seeds`` (number
        of runs), ``mean`` and ``std`` (of the sample, with N - 1) of the test accuracy, highest mean first.
    """
    grouped = frame.groupby("group").agg(
        run=("run", "first"), seeds=("run", "size"), mean=("test_accuracy", "mean"), std=("test_accuracy", "std")
    )
    return grouped[grouped["seeds"] > 1].sort_values("mean", ascending=False).reset_index(drop=True)


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
    repeated = seeds(frame)
    frame = frame.drop(columns="group")
    common = [key for key in SETTINGS if frame[key].nunique() == 1] if len(frame) > 1 else ["dataset"]
    shown = frame.drop(columns=["validation_accuracy", *common]).rename(columns=HEADINGS)
    shown.index += 1  # the figure shows the same numbers
    equal = ", ".join(f"{key.replace('_', ' ')} {frame[key][0]}" for key in common)
    print(f"{folder}{f' (all runs: {equal})' if equal else ''}\n{shown.to_string(formatters=FORMATS)}")
    if len(repeated):
        print("\ntest accuracy of runs that differ only in the seed; std is the standard deviation")
        print(repeated.to_string(index=False, formatters={"mean": "{:.2%}".format, "std": "{:.2%}".format}) + "\n")
    csv, png = folder / "comparison.csv", folder / "comparison.png"
    files.write_bytes(csv, frame.to_csv(index=False).encode())
    figures.save_figure(png, figures.comparison_figure(frame))
    print(f"table and figure: {csv}, {png}")
