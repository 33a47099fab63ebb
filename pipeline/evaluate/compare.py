"""Compare the finished runs of a folder: a table, and a figure of accuracy against training time and parameters.

report(Path("runs/sweep"))  # prints the table; writes comparison.csv and comparison.png
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from pipeline import augment, runs
from pipeline.core import cli, files
from pipeline.core.errors import PipelineError
from pipeline.evaluate import figures

TEXTS = {"run": "run", "dataset": "dataset", "model": "model", "augment": "augment"}  # columns and their headings
# Columns of numbers and their headings, short enough for a table of 80 characters; None: only in the CSV file.
CARD_NUMBERS = {"parameters": "weights"}
METRICS = {
    "epochs": "epochs", "train_seconds": "seconds", "images_per_second": "images/s", "validation_accuracy": None,
    "test_accuracy": "test",
}  # fmt: skip
FORMATS = {"train_seconds": "{:,.1f}", "images_per_second": "{:,.0f}", "test_accuracy": "{:.2%}"}


def table(folder: Path) -> Any:
    """The finished runs in a folder, by dataset, best test accuracy first.

    A run that cannot be read is skipped, with one line on standard error.

    Args:
        folder: The folder of a multirun, or ``runs`` for all runs.

    Returns:
        A pandas dataframe with the columns `TEXTS`, `CARD_NUMBERS` and `METRICS`; ``train_seconds`` and
        ``images_per_second`` are measured in training.

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
    texts = {"dataset": card.dataset, "model": card.model, "augment": policy_label(run.config.augment)}
    numbers = {"parameters": card.parameters, **{key: metrics.get(key) for key in METRICS}}
    for values, kind in ((texts, str), (numbers, int | float)):
        for key, value in values.items():
            if not isinstance(value, kind):
                file = "metrics.json" if key in METRICS else "model_card.json"
                raise PipelineError(f"{key} in {file} has the invalid value {value!r}.")
    return texts | numbers


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
    from rich import box
    from rich.table import Table

    frame = table(folder)
    shown = Table(title=str(folder), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("", justify="right")
    headings = {name: heading for name, heading in (TEXTS | CARD_NUMBERS | METRICS).items() if heading is not None}
    if frame["dataset"].nunique() == 1:
        del headings["dataset"]
    for name, heading in headings.items():
        text = name in TEXTS
        shown.add_column(heading, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    for number, row in enumerate(frame.to_dict("records"), start=1):  # the figure shows the same numbers
        row["parameters"] = f"{row['parameters'] / 1e6:.2f} M"
        shown.add_row(str(number), *(FORMATS.get(name, "{}").format(row[name]) for name in headings))
    cli.console().print(shown)
    csv, png = folder / "comparison.csv", folder / "comparison.png"
    files.write_bytes(csv, frame.to_csv(index=False).encode())
    figures.save_figure(png, figures.comparison_figure(frame))
    print(f"table and figure: {csv}, {png}")
