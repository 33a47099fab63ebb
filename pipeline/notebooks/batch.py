"""Run notebooks in order: check the parameters, execute, write the report, show the exported models.

run_notebooks({"dataset": "cifar10", "epochs": "5"}, name="first")
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from pipeline import runs
from pipeline.core import config, files
from pipeline.core.errors import PipelineError
from pipeline.evaluate import exports
from pipeline.notebooks import chapters, execution, report
from pipeline.notebooks.chapters import Chapter

DATASET_SETTINGS = ("image_size", "channels", "max_rejected", "limit_per_class")
SETTINGS = ("dataset", "model", "augment", "epochs", "batch_size", "seed")


def run_notebooks(parameters: Mapping[str, str], name: str | None = None, only: Sequence[str] | None = None) -> None:
    """Run the notebooks; the executed copies, ``report.html`` and the run itself are written to ``runs/NAME``.

    Args:
        parameters: Values for the notebooks' parameters, as text.
        name: Name of the run; ``notebooks-DATE-TIME`` by default.
        only: The notebooks to run, such as ``03_train``; all by default.

    Raises:
        PipelineError: A wrong parameter or name, or a notebook failed (exit code 1).
        KeyboardInterrupt: Ctrl-C; the running kernel has been stopped.
    """
    import tqdm

    known = chapters.discover()
    selected = chapters.select(known, only) if only else known
    given = dict(parameters)
    _check_parameters(given, selected, known)
    trains = any("name" in chapter.defaults for chapter in selected)
    uses_run = any("run" in chapter.defaults for chapter in selected)
    if name and uses_run and not trains and "run" not in given:
        runs.find(runs.RUNS / config.plain_name(name))
    folder = _run_folder(name or given.pop("name", None), trains)
    if trains:
        given["name"] = folder.name
    if trains or (folder / "model.keras").is_file():
        given.setdefault("run", str(folder))  # for the notebooks after the training

    executed, page, started = folder / "notebooks", folder / "report.html", time.monotonic()
    executed.mkdir(parents=True, exist_ok=True)
    busy = f"Another process is running notebooks in {folder}; choose another --name."
    with files.locked(executed, busy), execution.private_kernels():
        # disable=None shows the bars only on a terminal.
        with tqdm.tqdm(selected, desc="all notebooks", unit="notebook", disable=None) as bar:
            for chapter in bar:
                output, before = executed / chapter.path.name, time.monotonic()
                try:
                    execution.execute(chapter, output, chapter.convert(given))
                except KeyboardInterrupt:
                    bar.close()
                    print(f"{chapter.path.name} was stopped; the executed copy is {output}.", file=sys.stderr)
                    raise
                tqdm.tqdm.write(f"{chapter.name:<14} {time.monotonic() - before:6.1f} s")
                sys.stdout.flush()  # so that a pipe receives each line immediately
        copies = [executed / chapter.path.name for chapter in known]  # includes copies of earlier calls
        report.write_report([path for path in copies if path.is_file()], folder.name, page)
    print(f"{'total':<14} {time.monotonic() - started:6.1f} s\n")
    artifacts = _show_artifacts(given.get("run")) if trains or uses_run else []
    print(" · ".join([f"executed notebooks: {executed}", f"report: {page}", *artifacts]))


def _check_parameters(given: Mapping[str, str], selected: Sequence[Chapter], known: Sequence[Chapter]) -> None:
    """Check names, types and values before the first notebook runs.

    Raises:
        PipelineError: No selected notebook has the parameter, or its value has the wrong type or is out of range.
    """
    values = {}
    for name in given:
        if name != "name" and not any(name in chapter.defaults for chapter in selected):
            names = sorted({name for chapter in selected for name in chapter.defaults})
            others = [chapter.name for chapter in known if name in chapter.defaults]
            hint = f" ({', '.join(others)} has it, but is not selected)" if others else ""
            raise PipelineError(f"No notebook has a parameter {name!r}{hint}; known parameters: {', '.join(names)}.")
    for chapter in selected:
        values |= chapter.convert(given)
    settings = {name: values[name] for name in SETTINGS if name in values}
    settings |= {f"dataset.{name}": values[name] for name in DATASET_SETTINGS if name in values}
    if settings:
        config.compose(config.overrides(**settings))


def _run_folder(name: str | None, trains: bool) -> Path:
    folder = runs.RUNS / (config.plain_name(name) if name is not None else f"{datetime.now():notebooks-%Y%m%d-%H%M%S}")
    if trains and folder.is_dir() and any(entry.name != "notebooks" for entry in folder.iterdir()):
        raise PipelineError(f"The run {folder} exists; choose another --name, or remove that folder.")
    return folder


def _show_artifacts(name: str | None) -> list[str]:
    """Print the table of a run's exported models and return a line with their folder; empty if there are none."""
    try:
        run = runs.find(name)
    except PipelineError:  # the selected notebooks need no finished run
        return []
    if not exports.recorded(run):
        return []
    exports.print_table(run)
    return [f"exported models: {run.export_dir}"]
