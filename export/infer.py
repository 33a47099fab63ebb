"""What the prediction commands share: images in, a table or JSON out, every unreadable image reported.

`python -m export.trt_infer` and `python -m export.tflite_infer` differ in the artifact they take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from export.predict import CHUNK, Prediction, Predictor
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
    """Run one prediction command on this process's arguments.

    Args:
        program: How it is called, for the usage text.
        description: One sentence for ``--help``.
        names: The artifacts below a run's `export/` it takes, the preferred one first.
        make: The command that makes them.
        require: Raises `PipelineError` where this machine cannot run them.

    Returns:
        The exit code: 0, or 1 when an image was unreadable and the others were answered.

    Raises:
        PipelineError: No run, no artifact in it, or one that cannot be used here.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("images", nargs="+", help="image files, or folders of them (searched to the bottom)")
    parser.add_argument("--run", help="run folder or name (default: runs/latest)")
    parser.add_argument(
        "--artifact", help=f"a name below the run's export folder, or a path (default: the first of {', '.join(names)})"
    )
    parser.add_argument("--top", type=cli.positive, default=3, help="how many classes to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    require()
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        predictor = Predictor.load(_artifact(arguments.run, arguments.artifact, names, make))
    for note in notes:
        if note.category is UserWarning:
            print(f"note: {note.message}", file=sys.stderr)
    answers = classify(predictor, arguments.images)
    for path, answer in answers:
        if isinstance(answer, PipelineError):
            print(f"{path}: {getattr(answer, 'reason', answer)}", file=sys.stderr)
    if arguments.json:
        print(json.dumps([_as_json(predictor, *pair, arguments.top) for pair in answers], indent=2, ensure_ascii=False))
    else:
        _print_table(predictor, answers, arguments.top)
    return int(any(isinstance(answer, PipelineError) for _, answer in answers))


def classify(predictor: Predictor, paths: Sequence[str]) -> list[tuple[str, Prediction | PipelineError]]:
    """Classify files and the images in folders; an unreadable one gets its error instead of a prediction.

    Returns:
        (path, prediction or error) in the order given, a folder's images sorted by path.
    """
    answers: list[tuple[str, Prediction | PipelineError]] = []
    files = _files(paths)
    while chunk := list(itertools.islice(files, CHUNK)):
        pixels = [_read(predictor, path) for path in chunk]
        predictions = iter(predictor.predict([image for image in pixels if not isinstance(image, PipelineError)]))
        for path, image in zip(chunk, pixels, strict=True):
            answers.append((path, image if isinstance(image, PipelineError) else next(predictions)))
    return answers


def _read(predictor: Predictor, path: str) -> np.ndarray | PipelineError:
    if Path(path).is_dir():  # one of those that `_files` found empty, or could not list
        try:
            next(Path(path).iterdir(), None)
        except OSError as error:
            return ImageError(path, f"the folder cannot be read ({(error.strerror or str(error)).lower()})")
        return ImageError(path, "no images in this folder")
    try:
        return predictor.read(path)
    except PipelineError as error:
        return error


def _files(paths: Sequence[str]) -> Iterator[str]:
    """The files, and the images below each folder, those of a kind that is not read too, so that none is lost without a
    word; a folder without any stands for itself."""
    kinds = SUFFIXES | OTHER_SUFFIXES
    for path in paths:
        if Path(path).is_dir():
            closed: list[OSError] = []
            inside = [Path(parent, name) for parent, _, names in os.walk(path, onerror=closed.append) for name in names]
            found = sorted(p for p in inside if p.suffix.lower() in kinds)
            yield from map(str, [*found, *(error.filename for error in closed)] or [path])
        else:
            yield path


def _artifact(run: str | None, artifact: str | None, names: Sequence[str], make: str) -> Path:
    """The artifact to predict with: the one asked for, or the first of `names` that the run has."""
    if artifact is not None and Path(artifact).exists():
        return Path(artifact)
    found = runs.find(run)
    folder = found.path / "export"
    wanted = [artifact] if artifact is not None else names
    for name in wanted:
        if (folder / name).exists():
            return folder / name
    there = sorted(p.name for p in folder.iterdir() if p.name[0] != ".") if folder.is_dir() else []
    near = [name for name in there if artifact and artifact.lower() in name]
    if near:
        raise PipelineError(f"The run {found.name} has no artifact {artifact!r}; did you mean --artifact {near[0]}?")
    if artifact is not None and artifact not in names:
        raise PipelineError(
            f"The run {found.name} has no artifact {artifact!r} that this command answers from; it takes "
            f"{', '.join(names)}, or the path of another file."
        )
    known = ", ".join(there) or "nothing"
    raise PipelineError(
        f"The run {found.name} has no {' or '.join(wanted)} in its export folder (there is {known}); make it: "
        f"{make} --run {found.path}"
    )


def _as_json(predictor: Predictor, path: str, answer: Prediction | PipelineError, top: int) -> dict[str, object]:
    if isinstance(answer, PipelineError):
        return {"path": path, "error": getattr(answer, "reason", str(answer))}
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
    table = Table(title=f"{predictor.path.name}", title_justify="left")
    table.add_column("image", overflow="fold")
    top = min(top, len(predictor.class_names))
    widest = max(map(len, predictor.class_names))
    roomy = top * (widest + 14) + 24 <= console.width
    for place in range(top if roomy else 0):
        table.add_column("class" if place == 0 else f"{place + 1}.", no_wrap=True)
        table.add_column("probability" if place == 0 else "", justify="right", no_wrap=True)
    if not roomy:  # one column for all of them, which may be broken between two
        table.add_column("classes and their probabilities", min_width=min(40, widest + 7))
    for path, answer in answers:
        if not isinstance(answer, PipelineError):
            shares = predictor.top(answer, top)
            # Text, because a file name may hold what looks like markup.
            cells = [cell for label, share in shares for cell in (Text(label), Text(f"{share:.1%}"))]
            table.add_row(Text(path), *(cells if roomy else [Text(", ".join(f"{a} {b:.1%}" for a, b in shares))]))
    if table.row_count:
        console.print(table)
