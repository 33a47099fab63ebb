"""The prediction commands: arguments, reading images from files and folders, and printing a table or JSON.

`python -m export.trt_infer` and `python -m export.tflite_infer` differ only in the exported files that they use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from export.predict import Prediction, Predictor
from pipeline import runs
from pipeline.core import cli
from pipeline.core.errors import PipelineError
from pipeline.data.images import OTHER_SUFFIXES, SUFFIXES, ImageError


def command(
    program: str,
    description: str,
    names: Sequence[str],
    make: str,
    require: Callable[[], object] = lambda: None,
) -> int:
    """Run a prediction command with this process's arguments.

    Args:
        program: The name of the command in its usage text.
        description: One sentence for ``--help``.
        names: The files or folders in a run's `export/` that the command can use, the preferred one first.
        make: The command that creates them.
        require: A function that raises `PipelineError` if this machine cannot run them.

    Returns:
        The exit code: 0, or 1 if an image could not be read; all other images are classified.

    Raises:
        PipelineError: The run or the exported model does not exist, or this machine cannot load the model.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=description, epilog=f"Example: {program} photo.jpg photos/ --run runs/first --top 3"
    )
    parser.add_argument("images", nargs="+", help="image files, or folders that are searched recursively")
    parser.add_argument("--run", help="run folder or name (default: runs/latest)")
    parser.add_argument(
        "--artifact", help=f"name in the run's export folder, or a path (default: the first of {', '.join(names)})"
    )
    parser.add_argument("--top", type=cli.positive, default=3, help="number of classes to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    require()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
        predictor = Predictor.load(_artifact(arguments.run, arguments.artifact, names, make))
    answers = classify(predictor, arguments.images)
    for path, answer in answers:
        if isinstance(answer, PipelineError):
            print(f"{path}: {_reason(answer)}", file=sys.stderr)
    if arguments.json:
        print(json.dumps([_as_json(predictor, *pair, arguments.top) for pair in answers], indent=2, ensure_ascii=False))
    else:
        _print_table(predictor, answers, arguments.top)
    return int(any(isinstance(answer, PipelineError) for _, answer in answers))


def classify(predictor: Predictor, paths: Sequence[str]) -> list[tuple[str, Prediction | PipelineError]]:
    """Classify image files and the images in folders.

    Returns:
        (path, `Prediction`) for each image in the order given, or (path, `PipelineError`) for an image that cannot be
        read. The images of a folder are sorted by path.
    """
    answers: list[tuple[str, Prediction | PipelineError]] = []
    files = _files(paths)
    while batch := list(itertools.islice(files, predictor.max_batch)):
        pixels = [_read(predictor, path) for path in batch]
        predictions = iter(predictor.predict([image for image in pixels if not isinstance(image, PipelineError)]))
        for path, image in zip(batch, pixels, strict=True):
            answers.append((path, image if isinstance(image, PipelineError) else next(predictions)))
    return answers


def _read(predictor: Predictor, path: str) -> np.ndarray | PipelineError:
    if Path(path).is_dir():  # `_files` found no image in it
        return ImageError(path, "no images in this folder")
    try:
        return predictor.read(path)
    except PipelineError as error:
        return error


def _reason(error: PipelineError) -> str:
    return getattr(error, "reason", str(error))


def _files(paths: Sequence[str]) -> Iterator[str]:
    """Yield the given files and all images in the given folders, or the folder's own path if it contains none.

    Images in unsupported formats are included, so that each of them is reported.
    """
    formats = SUFFIXES | OTHER_SUFFIXES
    for path in paths:
        if Path(path).is_dir():
            found = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in formats and not p.is_dir())
            yield from map(str, found or [path])
        else:
            yield path


def _artifact(run: str | None, artifact: str | None, names: Sequence[str], make: str) -> Path:
    """The exported model to use: the requested one, or the first of `names` that the run has."""
    if artifact is not None and Path(artifact).exists():
        return Path(artifact)
    found = runs.find(run)
    folder = found.path / "export"
    wanted = [artifact] if artifact is not None else names
    for name in wanted:
        if (folder / name).exists():
            return folder / name
    present = sorted(path.name for path in folder.glob("[!.]*"))
    raise PipelineError(
        f"The run {found.name} has no {' or '.join(wanted)} in its export folder (it contains "
        f"{', '.join(present) or 'nothing'}); to create it: {make} --run {found.path}"
    )


def _as_json(predictor: Predictor, path: str, answer: Prediction | PipelineError, top: int) -> dict[str, object]:
    if isinstance(answer, PipelineError):
        return {"path": path, "error": _reason(answer)}
    return {
        "path": path,
        "label": answer.label,
        "probability": answer.probability,
        "top": [{"label": label, "probability": share} for label, share in predictor.top(answer, top)],
    }


def _print_table(predictor: Predictor, answers: Sequence[tuple[str, Prediction | PipelineError]], top: int) -> None:
    from rich.table import Table
    from rich.text import Text

    console = cli.console()
    table = Table(title=predictor.path.name, title_justify="left")
    table.add_column("image", overflow="fold")
    top = min(top, len(predictor.class_names))
    widest = max(map(len, predictor.class_names))
    wide = top * (widest + 14) + 24 <= console.width
    for place in range(top if wide else 0):
        table.add_column("class" if place == 0 else f"{place + 1}.", no_wrap=True)
        table.add_column("probability" if place == 0 else "", justify="right", no_wrap=True)
    if not wide:  # on a narrow terminal, one column for all classes
        table.add_column("classes and their probabilities", min_width=min(40, widest + 7))
    for path, answer in answers:
        if not isinstance(answer, PipelineError):
            shares = predictor.top(answer, top)
            # Text, because rich would interpret brackets in a file name as markup.
            cells = [cell for label, share in shares for cell in (Text(label), Text(f"{share:.1%}"))]
            table.add_row(Text(path), *(cells if wide else [Text(", ".join(f"{a} {b:.1%}" for a, b in shares))]))
    if table.row_count:
        console.print(table)
