"""The run folder during training: lock it, resume from it, save into it, and explain the errors that end a training."""

from __future__ import annotations

import contextlib
import csv
import os
import shlex
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import runs
from pipeline.core import cli, device, files
from pipeline.core.errors import PipelineError
from pipeline.core.settings import Settings
from pipeline.train import checkpoints, cluster
from pipeline.train.loop import SINGLE, Loop
from pipeline.train.setup import FEW_VALIDATION_IMAGES, build_deployable

LOGS = Path("logs")

# Settings and dataset settings that may differ between the processes of one training.
PER_MACHINE_SETTINGS = {"name", "resume", "data_dir", "data_digest", "tracker", "cluster"}
PER_DISK_SETTINGS = {"data_dir", "cache_dir", "progress"}


def resume_settings(settings: Settings) -> Settings:
    """Return the settings of the run that ``resume`` names; if it is None, return `settings`.

    Raises:
        PipelineError: The run does not exist, or is finished.
    """
    if settings.resume is None:
        return settings
    folder = _resumed(settings.resume)
    run = runs.Run(folder)
    finished = run.model_path.is_file() and "test_accuracy" in run.metrics
    if finished and run.config.epochs <= run.metrics["epochs"]:
        raise PipelineError(
            f"The run {folder.name} is finished; extend it with epochs={2 * run.config.epochs}, or start another run "
            "with name=…."
        )
    saved = run.config
    name = os.path.relpath(folder, runs.RUNS.resolve())
    update = {"resume": str(folder), "cluster": settings.cluster, "communication": settings.communication}
    update["name"] = folder.name if name.startswith("..") else name
    if settings.xla != "auto":
        update["xla"] = settings.xla
    if settings.data_dir is not None:
        update["dataset"] = saved.dataset.model_copy(update={"data_dir": settings.data_dir})
    return saved.model_copy(update=update)


def _resumed(name: str) -> Path:
    folder = Path(name)
    folder = folder if (folder / "config.yaml").is_file() else runs.RUNS / folder
    if not (folder / "config.yaml").is_file():
        raise PipelineError(f"There is no run to resume in {name!r} (config.yaml is missing).")
    return folder.resolve()


def extend(name: str, epochs: int) -> None:
    """Change the number of epochs of a run that will be resumed; it may be finished.

    The learning rate then follows the schedule of a training with `epochs` epochs, from the step at which the run is.
    For a finished run it rises again: from the end of the shorter schedule to the middle of the longer one.

    Args:
        name: Folder or name of the run.
        epochs: The new number of all its epochs.

    Raises:
        PipelineError: The run does not exist, is in use, or has more epochs already.
    """
    from omegaconf import OmegaConf

    folder = _resumed(name)
    config = OmegaConf.load(folder / "config.yaml")
    if epochs < config.epochs:
        raise PipelineError(f"The run {folder.name} has {config.epochs} epochs; set epochs to a larger number.")
    if epochs > config.epochs:
        with files.locked(folder, f"Another process is writing to {folder}; wait for it."):
            config.epochs = epochs
            files.write_bytes(folder / "config.yaml", OmegaConf.to_yaml(config).encode())


@contextlib.contextmanager
def open_run_dir(settings: Settings, workers: cluster.Cluster = SINGLE) -> Iterator[Path]:
    """Create and lock the run's folder for a training.

    The first training process locks the folder, which must be on a file system that all of them share. If the training
    ends before its first epoch does, the folder is removed, so that its name can be used again.

    Yields:
        The folder.

    Raises:
        PipelineError: The folder contains another run or is in use; or Ctrl-C, a disk error or the loss of another
            process has stopped the training, and the message says how to resume.
    """
    folder = Path(settings.resume) if settings.resume else runs.RUNS / settings.name
    lock = _locked(folder, settings) if workers.is_chief else contextlib.nullcontext()
    saved = folder / "config.yaml"
    watch = workers.watch_peers(lambda: resume_hint(folder) if saved.exists() else "Start the training again.")
    with _explained_errors(folder, LOGS / settings.name, workers), lock, watch, cli.interrupts():
        yield folder


@contextlib.contextmanager
def _locked(folder: Path, settings: Settings) -> Iterator[None]:
    logs = LOGS / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder, f"Another process is writing to {folder}; wait for it, or choose another name=…."):
        if settings.resume is None and (folder / "config.yaml").exists():
            raise PipelineError(f"{folder} contains a run already; choose another name=…, or resume={folder}.")
        made = [folder / "checkpoints", folder / "wandb", *([] if logs.exists() else [logs])]
        try:
            runs.check_latest()
            (folder / "checkpoints").mkdir(exist_ok=True)
            logs.mkdir(parents=True, exist_ok=True)
            yield
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt) and (folder / "config.yaml").exists()
            if settings.resume is None and not stopped and not has_checkpoint(folder):
                cleanup(folder, made)
            raise


@contextlib.contextmanager
def _explained_errors(folder: Path, logs: Path, workers: cluster.Cluster) -> Iterator[None]:
    """Convert errors that end a training to `PipelineError` with the command that resumes it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not (folder / "config.yaml").exists():
            raise
        raise PipelineError(f"Stopped by {cli.stopped_by(stop)}. {resume_hint(folder)}", 130) from stop
    except files.DiskError as error:
        raise _with_resume_hint(error, folder) from error
    except (PipelineError, BrokenPipeError):
        raise
    except Exception as error:  # TensorFlow has its own errors for a full disk, NCCL and a lost connection
        path = getattr(error, "filename", None)
        inside = path and any(Path(path).resolve().is_relative_to(home.resolve()) for home in (folder, logs))
        if files.is_full(error) or inside:
            raise _with_resume_hint(files.disk_error(Path(path or logs), error), folder) from error
        failed = cluster.explain(error, workers)
        if failed is None:
            raise
        hint = resume_hint(folder) if has_checkpoint(folder) else "No epoch was finished; start the training again."
        raise PipelineError(f"{failed} {hint}", failed.exit_code) from error


def cleanup(folder: Path, made: Sequence[Path]) -> None:
    """Remove the files of a run without a finished epoch, so that its name can be used again."""
    with contextlib.suppress(OSError):
        for name in ("config.yaml", ".lock"):
            (folder / name).unlink(missing_ok=True)
        for inside in made:
            shutil.rmtree(inside, ignore_errors=True)
        folder.rmdir()


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("epoch-*.npz"))


def resume_hint(folder: Path) -> str:
    command = os.environ.get(cluster.LAUNCHER, "python -m pipeline.train")
    start = "Finished epochs are saved; resume" if has_checkpoint(folder) else "Resume"
    return f"{start} with: {command} resume={shlex.quote(os.path.relpath(folder))}"


def _with_resume_hint(error: files.DiskError, folder: Path) -> files.DiskError:
    return files.DiskError(f"{error} {resume_hint(folder)}") if has_checkpoint(folder) else error


def save_config(folder: Path, settings: Settings, dataset: Any, workers: cluster.Cluster = SINGLE) -> None:
    """Write `config.yaml`, or, if the run is resumed, check that its dataset is unchanged.

    Raises:
        PipelineError: The dataset has changed, or the file cannot be written.
    """
    from omegaconf import OmegaConf

    if settings.resume is not None:
        if settings.data_digest != dataset.digest:
            raise PipelineError(f"The dataset has changed since {folder.name} was started; start a new run.")
    elif workers.is_chief:
        content = {**settings.plain(), "data_digest": dataset.digest}
        files.write_bytes(folder / "config.yaml", OmegaConf.to_yaml(content).encode())


def config_fingerprint(settings: Settings, dataset: Any, progress: checkpoints.Progress) -> dict[str, str]:
    """The values that must be identical in all training processes, as text by their name in error messages."""
    common = settings.model_dump(exclude=PER_MACHINE_SETTINGS)
    common["dataset"] = settings.dataset.model_dump(exclude=PER_DISK_SETTINGS)
    common |= {"images of the dataset": dataset.digest, "finished epochs": progress.epoch}
    return {key: repr(value) for key, value in sorted(common.items())}


def save_epoch(folder: Path, loop: Loop, progress: checkpoints.Progress, validation_images: int) -> None:
    """Write the best weights, the checkpoint and the history after an epoch.

    This order keeps the folder consistent if the process is killed in between.
    """
    best = best_epoch([epoch["val_accuracy"] for epoch in progress.history], validation_images)
    progress.best_epoch = best
    if not loop.workers.is_chief:
        return
    if best == progress.epoch:
        checkpoints.save(checkpoints.best_path(folder / "checkpoints", best), loop.network.variables, progress)
    checkpoints.save_epoch(folder / "checkpoints", loop.variables, progress)
    with files.atomic_write(folder / "history.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", *progress.history[0]])
        writer.writeheader()
        writer.writerows({"epoch": number, **logs} for number, logs in enumerate(progress.history, start=1))


def best_epoch(accuracies: Sequence[float], validation_images: int) -> int:
    """The epoch, from 1, whose weights are kept: the best one, and of equal ones the latest.

    With fewer than `FEW_VALIDATION_IMAGES` images, epochs count as equal within one standard error of the best accuracy
    (the one-standard-error rule of Breiman et al., 1984). The best of many noisy values is often an early epoch that
    was lucky, and the latest epochs have the lowest learning rates.
    """
    best = max(accuracies)
    error = (best * (1 - best) / validation_images) ** 0.5 if validation_images < FEW_VALIDATION_IMAGES else 0.0
    return max(epoch for epoch, accuracy in enumerate(accuracies, start=1) if accuracy >= best - error)


def save_run(folder: Path, loop: Loop, settings: Settings, dataset: Any, progress: checkpoints.Progress) -> runs.Run:
    """Write the model card, `metrics.json` and the model, and point ``runs/latest`` to the run.

    The model is written after the files that its readers need. If the process is killed in between, ``resume=`` writes
    all of them again.
    """
    card = runs.ModelCard(
        name=settings.name,
        model=settings.model.name,
        dataset=dataset.name,
        class_names=list(dataset.class_names),
        input_shape=tuple(dataset.image_shape),
        mean=tuple(loop.mean),
        std=tuple(loop.std),
        precision=settings.precision,
        parameters=loop.network.count_params(),
        data_digest=dataset.digest,
        versions=device.describe(),
    )
    card.write(folder / "model_card.json")
    speeds = [logs["images_per_second"] for logs in progress.history]
    training = {
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "validation_accuracy": progress.history[progress.best_epoch - 1]["val_accuracy"],
        "train_seconds": progress.seconds,
        "images_per_second": statistics.median(speeds[1:] or speeds),  # the first epoch includes the compilation
        "history": progress.history,
    }
    files.write_json(folder / "metrics.json", training)
    with files.atomic_write(folder / "model.keras") as temporary:
        build_deployable(loop, settings, dataset).save(temporary)
    runs.set_latest(folder)
    return runs.Run(folder.resolve())
