"""Checkpoints: one file with everything that an interrupted run needs to continue.

The file is NumPy's ``.npz``: every variable of the network and the optimizer under its number, and one JSON text with
the epoch and the history. It contains no code and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from pipeline.core import files
from pipeline.core.errors import PipelineError, first_line

KEPT = 2  # the newest checkpoint, and one more in case the newest is damaged


@dataclasses.dataclass
class Progress:
    """The progress of a run.

    Attributes:
        epoch: Number of finished epochs.
        history: One dictionary of metrics for each finished epoch.
        best_epoch: The epoch (from 1) of the best validation accuracy; 0 before the first.
        seconds: Training time, including the time before a resume.
    """

    epoch: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0


def save(path: Path, variables: Sequence[Any], progress: Progress) -> None:
    """Write one checkpoint; the file is complete or absent. `load` expects the Keras variables in the same order.

    Raises:
        DiskError: The disk is full, or the file is not writable.
    """
    arrays = {f"{number:05d}": numpy.asarray(variable) for number, variable in enumerate(variables)}
    arrays["progress"] = numpy.frombuffer(json.dumps(dataclasses.asdict(progress)).encode(), numpy.uint8)
    content = io.BytesIO()
    numpy.savez(content, **arrays)
    files.write_bytes(path, content.getvalue())


def load(path: Path, variables: Sequence[Any]) -> Progress:
    """Read a checkpoint into Keras variables, in the same order as for `save`.

    Returns:
        The saved progress.

    Raises:
        PipelineError: The file is missing or damaged, or belongs to another network.
    """
    try:
        with numpy.load(path, allow_pickle=False) as file:
            progress = Progress(**json.loads(file["progress"].tobytes()))
            arrays = [file[f"{number:05d}"] for number in range(len(file.files) - 1)]
    except (*files.DAMAGED_ZIP, ValueError, TypeError) as error:
        reason = "damaged" if path.is_file() else first_line(error)
        raise PipelineError(f"The checkpoint {path} cannot be read ({reason}); start a new run.") from error
    if [a.shape for a in arrays] != [tuple(v.shape) for v in variables]:
        raise PipelineError(f"The checkpoint {path} belongs to another network or optimizer; start a new run.")
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
    return progress


def epoch_path(folder: Path, epoch: int) -> Path:
    """The file with the checkpoint of an epoch (from 1)."""
    return folder / f"epoch-{epoch:05d}.npz"


def best_path(folder: Path, epoch: int) -> Path:
    """The file with the weights of an epoch that was the best so far."""
    return folder / f"best-{epoch:05d}.npz"


def save_epoch(folder: Path, variables: Sequence[Any], progress: Progress) -> None:
    """Write the checkpoint of the last epoch, and remove files that the newest two checkpoints do not need."""
    save(epoch_path(folder, progress.epoch), variables, progress)
    best = sorted(folder.glob("best-*.npz"))
    # Weights of an epoch after the best one are left over if the run resumed from an older checkpoint.
    needed = [path for path in best if path <= best_path(folder, progress.best_epoch)][-KEPT:]
    for old in {*best} - {*needed} | {*sorted(folder.glob("epoch-*.npz"))[:-KEPT]}:
        old.unlink(missing_ok=True)


def resume(folder: Path, variables: Sequence[Any]) -> Progress:
    """Read the newest undamaged checkpoint of a folder into `variables`.

    Returns:
        The saved progress; without checkpoints, the progress of epoch 0.

    Raises:
        PipelineError: There are checkpoints, but none can be read.
    """
    paths = sorted(folder.glob("epoch-*.npz"), reverse=True)
    for path in paths[:-1]:
        with contextlib.suppress(PipelineError):
            return load(path, variables)
    return load(paths[-1], variables) if paths else Progress()
