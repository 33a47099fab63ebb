"""Which of these runs is best, and what did it cost? ``python -m pipeline.compare runs/MULTIRUN``

Prints a table of all finished runs in a folder and draws accuracy against training time and number of parameters.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from pipeline import augment, runs
from pipeline.core import cli, device, files
from pipeline.core.errors import PipelineError, first_line, is_number
from pipeline.evaluate import figures
from pipeline.evaluate.figures import comparison_figure

COLUMNS = {  # and what the terminal's table, which fits into 80 columns, calls them; None stays in the CSV file
    "run": "run", "dataset": "data set", "model": "model", "augment": "augment", "parameters": "weights",
    "epochs": "epochs", "train_seconds": "seconds", "images_per_second": "images/s", "validation_accuracy": None,
    "test_accuracy": "test",
}  # fmt: skip


def table(folder: Path) -> Any:
    """The finished runs below a folder, by data set, best test accuracy first.

    Args:
        folder: A multirun's folder, or ``runs`` for all runs.

    Returns:
        A dataframe (cuDF or pandas) with the columns `COLUMNS`; seconds and images/s are those of training.

    Raises:
        PipelineError: The folder is missing or holds no finished run.
    """
    if not folder.is_dir():
        raise PipelineError(f"There is no folder {folder}; give the one of a multirun, or runs for all runs.")
    rows = []
    for run in runs.below(folder):
        name = os.path.relpath(run.path, folder.resolve())
        try:
            card, metrics, settings = run.card, run.metrics, run.config
            values = (name, card.dataset, card.model, policy_label(settings.augment), card.parameters)
            figures = {key: metrics.get(key) for key in list(COLUMNS)[len(values) :]}
        except (PipelineError, KeyError, AttributeError, TypeError) as error:
            print(f"left out {name}: {first_line(error)}", file=sys.stderr)
            continue
        if not all(isinstance(word, str) for word in values[1:3]) or not is_number(card.parameters):
            print(f"left out {name}: its model_card.json has no data set, model or parameters", file=sys.stderr)
            continue
        missing = [key for key, value in figures.items() if not is_number(value)]
        if missing:
            print(f"left out {name}: its metrics.json has no number for {', '.join(missing)}", file=sys.stderr)
            continue
        rows.append((*values, *figures.values()))
    if not rows and (folder / "metrics.json").is_file():
        raise PipelineError(f"{folder} is one run; give the folder above it to compare it with the others there.")
    if not rows:
        raise PipelineError(f"There is no finished run in {folder} to compare.")
    frame = device.dataframe().DataFrame({name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)})
    return frame.sort_values(["dataset", "test_accuracy"], ascending=[True, False]).reset_index(drop=True)


def policy_label(given: dict[str, Any]) -> str:
    """A run's augmentation policy by name, with ``*`` where settings changed what the policy of that name does."""
    name = str(given.get("name", "custom"))
    try:
        return name if augment.load_policy(name) == augment.load_policy(given) else f"{name}*"
    except PipelineError:  # a policy of its own, or one that is gone
        return name


def report(folder: Path) -> None:
    """Print the table of a folder and write ``comparison.csv`` and ``comparison.png`` into it."""
    from rich import box
    from rich.table import Table

    frame = table(folder)
    frame = frame.to_pandas() if hasattr(frame, "to_pandas") else frame
    shown = Table(title=str(folder), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    formats = {"train_seconds": "{:,.1f}", "images_per_second": "{:,.0f}", "test_accuracy": "{:.2%}"}
    headings = {name: heading for name, heading in COLUMNS.items() if heading is not None}
    if frame["dataset"].nunique() == 1:
        del headings["dataset"]
    shown.add_column("", justify="right")
    for name, heading in headings.items():
        words = name in ("run", "dataset", "model", "augment")
        shown.add_column(heading, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for number, row in enumerate(frame.to_dict("records"), start=1):  # the numbers of the points
        row = {**row, "parameters": f"{row['parameters'] / 1e6:.2f} M"}
        shown.add_row(str(number), *(formats.get(name, "{}").format(row[name]) for name in headings))
    cli.console().print(shown)
    files.write(folder / "comparison.csv", frame.to_csv(index=False).encode())
    figures.save_figure(folder / "comparison.png", comparison_figure(frame))
    print(f"table and plot in {folder / 'comparison.csv'} and {folder / 'comparison.png'}")
