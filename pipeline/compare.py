"""Which of these runs is best, and what did it cost? ``python -m pipeline.compare runs/MULTIRUN``

Prints a table of all finished runs in a folder and draws accuracy against training time and number of parameters.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from pipeline import PipelineError, augment, cli, device, files, first_line, is_number, runs

COLUMNS = {  # and what the terminal's table, which fits into 80 columns, calls them; None stays in the CSV file
    "run": "run", "dataset": "data set", "model": "model", "augment": "augment", "parameters": "weights",
    "epochs": "epochs", "train_seconds": "seconds", "images_per_second": "images/s", "validation_accuracy": None,
    "test_accuracy": "test",
}  # fmt: skip

LISTED = 30  # runs in the plot's legend


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
            values = (name, card.dataset, card.model, policy_label(settings["augment"]), card.parameters)
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


def policy_label(given: Any) -> str:
    """A run's augmentation policy by name, with ``*`` where settings changed what the policy of that name does."""
    if not isinstance(given, dict):
        raise PipelineError(f"its augmentation policy is {given!r}, which is no mapping")
    name = str(given.get("name", "custom"))
    try:
        return name if augment.load_policy(name) == augment.load_policy(given) else f"{name}*"
    except PipelineError:  # a policy of its own, or one that is gone
        return name


def draw(frame: Any) -> Any:
    """Test accuracy against training time and against parameters, one numbered point a run; a matplotlib figure."""
    from matplotlib.figure import Figure

    rows = (frame.to_pandas() if hasattr(frame, "to_pandas") else frame).to_dict("records")
    figure = Figure(figsize=(12, max(4, 1 + 0.2 * min(len(rows), LISTED))), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = {model: f"C{number}" for number, model in enumerate(sorted({row["model"] for row in rows}))}
    several = len({row["dataset"] for row in rows}) > 1
    for panel, key, label in zip(
        panels, ("train_seconds", "parameters"), ("training time (s)", "parameters"), strict=True
    ):
        for number, row in enumerate(rows, start=1):
            place, order = (row[key], row["test_accuracy"]), 3 + len(rows) - number  # the best on top
            name = f"{number}  {row['run']}" + (f" ({row['dataset']})" if several else "")
            panel.scatter(*place, s=130, color=colours[row["model"]], edgecolors="white", label=name, zorder=order)
            panel.annotate(str(number), place, fontsize=7, color="white", ha="center", va="center", zorder=order)
        panel.set(xlabel=label, xscale="log")
        panel.margins(x=0.2)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy")
    handles, names = (entries[:LISTED] for entries in panels[0].get_legend_handles_labels())
    figure.legend(handles, names, loc="outside right upper", fontsize=7, frameon=False)
    return figure


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
    files.write_figure(folder / "comparison.png", draw(frame))
    print(f"table and plot in {folder / 'comparison.csv'} and {folder / 'comparison.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.compare", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=runs.RUNS, help="a multirun's folder (default: runs)")
    report(parser.parse_args().folder)


if __name__ == "__main__":
    cli.run(main)
