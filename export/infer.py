"""The prediction commands: arguments, reading images from files and folders, and printing text or JSON.

`python -m export.trt_infer` and `python -m export.tflite_infer` differ only in the exported files that they use.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from export.predict import Predictor
from pipeline import runs
from pipeline.core import cli
from pipeline.core.errors import PipelineError
from pipeline.data.images import OTHER_SUFFIXES, SUFFIXES, ImageError
from pipeline.evaluate.run import AUGMENTATIONS


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
    parser.add_argument(
        "--tta",
        default="none",
        choices=AUGMENTATIONS,
        help="flip: average the probabilities of each image and its mirror image (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of one line for each image")
    arguments = parser.parse_args()
    require()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
        predictor = Predictor.load(_artifact(arguments.run, arguments.artifact, names, make), arguments.tta)
    rows = classify(predictor, arguments.images, arguments.top)
    for row in rows:
        if "error" in row:
            print(f"{row['path']}: {row['error']}", file=sys.stderr)
    classified = [row for row in rows if "error" not in row]
    if arguments.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif classified:
        width = max(len(row["path"]) for row in classified)
        print(f"{predictor.path.name}:")
        for row in classified:
            classes = ", ".join(f"{share['label']} {share['probability']:.1%}" for share in row["top"])
            print(f"{row['path']:<{width}}  {classes}")
    return int(len(classified) < len(rows))


def classify(predictor: Predictor, paths: Sequence[str], top: int) -> list[dict[str, Any]]:
    """Classify image files and the images in folders.

    Args:
        predictor: The loaded model.
        paths: Files and folders; the images of a folder are sorted by path.
        top: Number of classes in each row.

    Returns:
        A JSON object for each image, in order: ``path``, ``label``, ``probability`` and ``top`` (objects with ``label``
        and ``probability``, most probable first); or ``path`` and ``error`` for an image that cannot be read.
    """
    rows: list[dict[str, Any]] = [{"path": path} for path in _files(paths)]
    for start in range(0, len(rows), predictor.max_batch):
        readable, images = [], []
        for row in rows[start : start + predictor.max_batch]:
            try:
                if Path(row["path"]).is_dir():  # `_files` found no image in it
                    raise ImageError(row["path"], "no images in this folder")
                images.append(predictor.read(row["path"]))
                readable.append(row)
            except ImageError as error:
                row["error"] = error.reason
        for row, prediction in zip(readable, predictor.predict(images), strict=True):
            row["label"], row["probability"] = prediction.label, prediction.probability
            row["top"] = [{"label": name, "probability": p} for name, p in predictor.top(prediction, top)]
    return rows


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
