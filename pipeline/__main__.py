"""python -m pipeline: run the six notebooks in order, on the built-in digits or on what ``-p`` names.

    python -m pipeline
    python -m pipeline --name first -p dataset cifar10 -p data_dir ~/data/cifar10 -p epochs 5
    python -m pipeline --name first --notebooks 04_export 05_infer

The executed notebooks, a report of all of them in one HTML file, and the exported artifacts are below ``runs/NAME``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline import runs
from pipeline.core import cli, config, files
from pipeline.core.errors import PipelineError
from pipeline.core.settings import DatasetSettings
from pipeline.evaluate import exports
from pipeline.notebooks import chapters, execution
from pipeline.notebooks.chapters import Chapter


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the notebooks.

    Args:
        arguments: The command line after the program's name; that of the process by default.

    Returns:
        The exit code, 0.

    Raises:
        PipelineError: Wrong use, or a notebook failed (exit code 1).
        KeyboardInterrupt: Ctrl-C; the running kernel has been stopped.
    """
    options = _parse(arguments)
    try:
        import papermill  # noqa: F401
        import tqdm
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"{error.name} is not installed for {sys.executable}; run: make run (or pip install -r requirements.txt)"
        ) from None

    known = chapters.discover()
    selected = chapters.select(known, options.notebooks) if options.notebooks else known
    given = _given(options.parameters, selected, known)
    trains = any("name" in chapter.defaults for chapter in selected)
    _check_training(given, selected)
    if options.name and not trains and "run" not in given and any("run" in chapter.defaults for chapter in selected):
        runs.find(runs.RUNS / config.plain_name(options.name))
    folder = _folder(options.name or given.pop("name", None), trains)
    if trains:
        given["name"] = folder.name
    if trains or (folder / "model.keras").is_file():
        given.setdefault("run", str(folder))  # the notebooks after the training read what it left

    executed_folder = folder / "notebooks"
    with _held(folder, executed_folder), execution.private_kernels():
        started = time.monotonic()
        interactive = sys.stderr.isatty()
        with tqdm.tqdm(selected, desc="all notebooks", unit="notebook", position=0, disable=not interactive) as bar:
            for chapter in bar:
                output = executed_folder / chapter.path.name
                progress = {"desc": chapter.name, "position": 1, "leave": False} if interactive else None
                parameters = {
                    name: chapters.convert(name, value, chapter.defaults[name])
                    for name, value in given.items()
                    if name in chapter.defaults
                }
                before = time.monotonic()
                try:
                    execution.execute(chapter, output, parameters, progress=progress)
                except KeyboardInterrupt:
                    bar.close()
                    print(f"{chapter.path.name} was stopped; what it had done is in {output}.", file=sys.stderr)
                    raise
                tqdm.tqdm.write(f"{chapter.name:<14} {time.monotonic() - before:6.1f} s")
                sys.stdout.flush()  # through a pipe, each line when it is true
        page = folder / "report.html"
        there = [executed_folder / chapter.path.name for chapter in known]  # those of an earlier call too
        report.write_report([path for path in there if path.is_file()], folder.name, page)
        print(f"{'together':<14} {time.monotonic() - started:6.1f} s\n")
    of_a_run = any({"run", "name"} & set(chapter.defaults) for chapter in selected)
    places = [f"Executed notebooks: {executed_folder}", f"report: {page}"]
    print(" · ".join([*places, *(_artifacts(given.get("run")) if of_a_run else [])]))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebooks, for those that declare it; may be given several times",
    )
    parser.add_argument("--name", help="name of the run, its folder is runs/NAME (default: notebooks-DATE-TIME)")
    parser.add_argument("--notebooks", nargs="+", metavar="NOTEBOOK", help="only these, such as 03_train")
    return parser.parse_args(arguments)


def _given(pairs: Sequence[Sequence[str]], selected: Sequence[Chapter], known: Sequence[Chapter]) -> dict[str, str]:
    """The parameters of the command line as text; the last one of a name counts.

    Raises:
        PipelineError: No chapter of the selection declares one of them, or its value is of another type.
    """
    given = {}
    for name, value in pairs:
        declared = [chapter for chapter in selected if name in chapter.defaults]
        if not declared and name != "name":
            names = sorted({n for chapter in selected for n in chapter.defaults})
            elsewhere = [chapter.name for chapter in known if name in chapter.defaults]
            where = f" ({' and '.join(elsewhere)} would, but is not run)" if elsewhere else ""
            raise PipelineError(f"No notebook has a parameter {name!r}{where}; there are: {', '.join(names)}.")
        for chapter in declared:
            chapters.convert(name, value, chapter.defaults[name])  # before an hour of work, not after
        given[name] = value
    return given


def _check_training(given: dict[str, str], selected: Sequence[Chapter]) -> None:
    """Raise what the notebooks would say of their parameters, before the first of them has run."""
    sizes = {
        name: chapters.convert(name, given[name], chapter.defaults[name])
        for name in ("image_size", "channels", "limit_per_class", "max_rejected")
        for chapter in selected
        if name in given and name in chapter.defaults
    }
    DatasetSettings.parse(sizes)
    chapter = next((chapter for chapter in selected if chapter.name == "03_train"), None)
    if chapter is None or not given:
        return
    named = ("dataset", "model", "augment", "epochs", "batch_size", "seed")
    values = {name: chapters.convert(name, given[name], chapter.defaults[name]) for name in named if name in given}
    config.compose(config.overrides(**values))


def _folder(name: str | None, trains: bool) -> Path:
    """The run's folder, made where it is new.

    Raises:
        PipelineError: The name is no folder name, or is taken by something else than an unfinished run of notebooks.
    """
    if name is None:
        return _new_folder(datetime.now().strftime("notebooks-%Y%m%d-%H%M%S"))
    folder = runs.RUNS / config.plain_name(name)
    if trains and folder.is_dir() and any(entry.name != "notebooks" for entry in folder.iterdir()):
        raise PipelineError(f"There is a run {folder} already; choose another --name, or remove that folder.")
    _make(folder)
    return folder


def _new_folder(name: str) -> Path:
    _make(runs.RUNS)
    for attempt in range(1, 1000):
        folder = runs.RUNS / (name if attempt == 1 else f"{name}-{attempt}")
        with contextlib.suppress(FileExistsError):
            _make(folder, exist_ok=False)
            return folder
    raise PipelineError(f"A thousand runs are called {name}; pass a name of your own with --name.")


def _make(folder: Path, exist_ok: bool = True) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        if exist_ok:  # a file has that name
            raise PipelineError(f"{folder} is a file, not a folder; move it away or choose another --name.") from None
        raise
    except OSError as error:
        raise files.disk_error(folder, error) from None


@contextlib.contextmanager
def _held(folder: Path, executed_folder: Path) -> Iterator[None]:
    """Hold the run against a second process with the same name."""
    _make(executed_folder)
    with (executed_folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PipelineError(f"Another process is running notebooks into {folder}; choose another --name.") from None
        yield


def _artifacts(run: Any) -> list[str]:
    """Print the table of a run's artifacts; returns where they are, or nothing where there are none."""
    with contextlib.suppress(PipelineError):  # a selection of notebooks needs no finished run
        found = runs.find(run)
        from rich.console import Console

        if exports.recorded(found):
            Console().print(exports.table(found))
            export_dir = (
                runs.RUNS / found.name / "export" if found.path.parent == runs.RUNS.resolve() else found.export_dir
            )
            return [f"artifacts: {export_dir}"]
    return []


if __name__ == "__main__":
    cli.run(main)
