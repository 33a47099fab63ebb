"""The run folder during training: lock, resume, save, clean up."""

from __future__ import annotations

import contextlib
import csv
import datetime
import fcntl
import io
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import runs
from pipeline.core import config, files
from pipeline.core.errors import PipelineError
from pipeline.train import checkpoints, cluster
from pipeline.train.loop import SINGLE, Loop
from pipeline.train.setup import (
    resolve_precision,
)

LOGS = Path("logs")


PER_SESSION_SETTINGS = ("cluster", "communication")  # settings that a resumed run takes anew


PER_MACHINE_SETTINGS = (
    "name",
    "resume",
    "data_dir",
    "data_digest",
    "tracker",
)  # settings that need not be alike for workers


PER_DISK_SETTINGS = ("data_dir", "cache_dir", "progress")  # and those of the data set


def config_fingerprint(
    loop: Loop, settings: dict[str, Any], dataset: Any, progress: checkpoints.Progress
) -> dict[str, str]:
    """All that workers must have in common to train one network, as text by its name in a sentence.

    Args:
        settings: From `keep_settings`, with the precision that was chosen.
    """
    kept = {
        key: value
        for key, value in settings.items()
        if key not in PER_SESSION_SETTINGS and key not in PER_MACHINE_SETTINGS
    }
    of_the_data = {key: value for key, value in kept.pop("dataset").items() if key not in PER_DISK_SETTINGS}
    return {
        **{key: repr(value) for key, value in sorted(kept.items())},
        "dataset": repr(of_the_data),
        "communication": loop.workers.communication,
        "xla": repr(loop.xla),
        "the data set's images": dataset.digest,
        "finished epochs": str(progress.epoch),
    }


def resume_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that ``resume`` names; without it, `settings` as they are.

    Raises:
        PipelineError: There is no such run, or it is finished.
    """
    if settings["resume"] is None:
        return settings
    folder = Path(settings["resume"])
    folder = folder if (folder / "config.yaml").is_file() else runs.RUNS / folder
    if not (folder / "config.yaml").is_file():
        raise PipelineError(f"There is no run to go on with in {settings['resume']} (no config.yaml in it).")
    folder = folder.resolve()
    whole = (folder / "model.keras").is_file() and (folder / "metrics.json").is_file()
    if whole and "test_accuracy" in runs.Run(folder).metrics:
        raise PipelineError(f"The run {folder.name} is finished; start another one with name=….")
    here = {key: settings[key] for key in PER_SESSION_SETTINGS}
    kept = config.check({**runs.Run(folder).config, **here, "resume": str(folder)})
    if settings["data_dir"] is not None:
        kept["dataset"]["data_dir"] = settings["data_dir"]
    return kept


@contextlib.contextmanager
def lock_run_dir(settings: dict[str, Any], workers: cluster.Cluster = SINGLE) -> Iterator[Path]:
    """The run's folder, held with a lock for as long as the block runs, so that no second run writes into it.

    With several workers the first one holds it, on a file system that all of them see.

    Raises:
        PipelineError: Another run has the name, or is writing there now.
    """
    if workers.count > 1 and settings["name"] is None:
        raise PipelineError("Several workers need name=…, so that all of them use one run folder.")
    if not workers.is_chief:
        yield Path(settings["resume"] or runs.RUNS / settings["name"])
        return
    if settings["resume"] is not None:
        folder = Path(settings["resume"])
    else:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = runs.RUNS / (settings["name"] or f"{stamp}-{settings['dataset']['name']}-{settings['model']['name']}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise files.disk_error(folder, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PipelineError(
                f"Another process is writing to {folder}; wait for it, or choose another name=…."
            ) from None
        if settings["resume"] is None and (folder / "config.yaml").exists():
            raise PipelineError(f"{folder} holds a run already; choose another name=…, or resume={folder}.")
        keeps, logs = settings["resume"] is not None, LOGS / run_name(folder)
        ours = [folder / "checkpoints", folder / "wandb", *([] if logs.exists() else [logs])]
        try:
            runs.check_latest()
            (folder / "checkpoints").mkdir(exist_ok=True)
            logs.mkdir(parents=True, exist_ok=True)
            yield folder
            keeps = True
        except PipelineError as error:
            keeps = keeps or (error.exit_code == 130 and (folder / "config.yaml").exists())  # Ctrl-C: it can go on
            raise
        except OSError as error:  # whatever part met a full disk, the sentence is the same
            place = Path(error.filename or folder)
            inside = any(place.resolve().is_relative_to(home.resolve()) for home in (folder, LOGS))
            if inside or files.is_full(error):
                raise with_resume_hint(files.disk_error(place, error), folder) from None
            raise PipelineError(f"{place} cannot be read ({error.strerror or error}).", exit_code=1) from None
        except Exception as error:  # TensorFlow's writers, TensorBoard's among them, have errors of their own
            if files.is_full(error):
                raise with_resume_hint(files.disk_error(logs, error), folder) from None
            raise
        finally:
            if not keeps and not has_checkpoint(folder):
                cleanup(folder, ours)


def cleanup(folder: Path, made: Sequence[Path]) -> None:
    """Remove what a run that finished no epoch has made, so that its name can be taken again."""
    with contextlib.suppress(OSError):
        for name in ("config.yaml", ".lock"):
            (folder / name).unlink(missing_ok=True)
        for inside in made:
            shutil.rmtree(inside, ignore_errors=True)
        folder.rmdir()


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("epoch-*.npz"))


def with_resume_hint(error: files.DiskError, folder: Path) -> files.DiskError:
    """The error with how to go on, where there is something to go on with."""
    return files.DiskError(f"{error} {resume_hint(folder)}") if has_checkpoint(folder) else error


def save_config(
    folder: Path, settings: dict[str, Any], dataset: Any, workers: cluster.Cluster = SINGLE
) -> dict[str, Any]:
    """Write `config.yaml`, or on resuming check that the data is still what the run began with."""
    from omegaconf import OmegaConf

    if settings["resume"] is not None:
        if settings["data_digest"] != dataset.digest:
            raise PipelineError(f"The data set has changed since {folder.name} began; start a new run.")
        return settings
    where = settings["dataset"].get("data_dir")
    settings = {
        **settings,
        "name": run_name(folder),
        "data_digest": dataset.digest,
        "precision": resolve_precision(settings["precision"]),  # what auto meant here: a checkpoint fits no other
    }
    settings["dataset"] = {
        **settings["dataset"],
        "data_dir": str(Path(where).expanduser().resolve()) if where else None,
    }
    if workers.is_chief:
        files.write(folder / "config.yaml", OmegaConf.to_yaml(settings).encode())
    return settings


def save_epoch(
    folder: Path,
    network: Any,
    variables: Sequence[Any],
    progress: checkpoints.Progress,
    workers: cluster.Cluster = SINGLE,
) -> None:
    """Write the best weights so far, the checkpoint and the history after an epoch; in this order, so that a kill
    between two of them costs nothing."""
    best = max(range(progress.epoch), key=lambda epoch: (progress.history[epoch]["val_accuracy"], epoch)) + 1
    progress.best_epoch = best
    if not workers.is_chief:
        return
    if best == progress.epoch:
        checkpoints.save(checkpoints.best_path(folder / "checkpoints", best), network.variables, progress)
    checkpoints.save_epoch(folder / "checkpoints", variables, progress)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["epoch", *progress.history[0]])
    writer.writeheader()
    writer.writerows({"epoch": number, **logs} for number, logs in enumerate(progress.history, start=1))
    files.write(folder / "history.csv", text.getvalue().encode())


def run_name(folder: Path) -> str:
    """A run's name: its folder below ``runs/``, NAME or for a multirun's job SWEEP/JOB."""
    return os.path.relpath(folder, runs.RUNS)


def resume_hint(folder: Path) -> str:
    finished = "Finished epochs are kept; go" if has_checkpoint(folder) else "Go"
    command = os.environ.get(cluster.LAUNCHER, "python -m pipeline.train")
    return f"{finished} on with: {command} resume={shlex.quote(os.path.relpath(folder))}"
