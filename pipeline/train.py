"""Train a network: ``python -m pipeline.train dataset=cifar10 data_dir=DATA model=cnn epochs=5 name=first``.

The run lands in ``runs/first`` and its TensorBoard files in ``logs/first``. ``resume=runs/first`` goes on with a run
that was interrupted. Every setting is in `pipeline/conf`; ``--cfg job`` prints them.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import fcntl
import io
import os
import random
import shlex
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from pipeline import (
    PipelineError,
    augment,
    checkpoints,
    cli,
    cluster,
    compare,
    config,
    datasets,
    device,
    evaluate,
    files,
    models,
    optimizers,
    runs,
    tracking,
)
from pipeline.loop import SINGLE, Loop, permutation

LOGS = Path("logs")
TOP5_ABOVE_CLASSES = 10  # with fewer classes the top-5 accuracy says little
FEW_VALIDATION_IMAGES = 100
OF_A_SITTING = ("cluster", "communication")  # settings that a resumed run takes anew
OF_A_MACHINE = ("name", "resume", "data_dir", "data_digest", "tracker")  # settings that need not be alike for workers
OF_THE_DISK = ("data_dir", "cache_dir", "progress")  # and those of the data set


def train(settings: dict[str, Any], callbacks: Sequence[Any] = ()) -> runs.Run | None:
    """Train as `settings` say, from the data set to the finished run folder.

    Args:
        settings: From `config.compose`.
        callbacks: More Keras callbacks; they are called at the start and end of training and of each epoch.

    Returns:
        The finished run, which ``runs/latest`` then points at; of several workers only the first one gets it.

    Raises:
        PipelineError: A setting, the data, the memory or the disk does not allow it, the loss is no longer finite, or
            Ctrl-C was pressed; finished epochs are kept, and the sentence says how to go on.
    """
    settings = resumed(settings)
    tracking.check_tracker(settings["tracker"])
    workers = cluster.connect(settings["cluster"], settings["communication"])
    seed_everything(settings["seed"])
    with claimed_folder(settings, workers) as folder:
        dataset = datasets.from_settings(settings["dataset"])
        for split in evaluate.SPLITS:
            if len(getattr(dataset, split).labels) == 0:
                raise PipelineError(
                    f"The {split} split is empty; add images, or set dataset.validation_fraction and "
                    "dataset.test_fraction above 0."
                )
        if len(dataset.validation.labels) < FEW_VALIDATION_IMAGES and workers.is_chief:
            print(
                f"note: only {len(dataset.validation.labels)} validation images choose the best epoch; a larger "
                "dataset.validation_fraction chooses better"
            )
        if settings["precision"] == "mixed_float16" and not device.has_gpu() and workers.is_chief:
            print("note: without a GPU mixed_float16 is many times slower than precision=float32")
        with device.out_of_memory_sentence("choose a smaller network"):
            loop = build_loop(settings, dataset, workers)
        settings = keep_settings(folder, settings, dataset, workers)
        run = None
        try:
            with cli.interrupts():
                progress = fit(loop, settings, dataset, folder, callbacks)
                if workers.is_chief:
                    run = finish(loop, settings, dataset, folder, progress)
                workers.barrier()
        except KeyboardInterrupt as stop:
            raise PipelineError(f"Stopped by {cli.stopped_by(stop)}. {how_to_go_on(folder)}", 130) from None
        except files.DiskError as error:
            raise with_way_on(error, folder) from None
        except Exception as error:
            line = cluster.nccl_line(error) if workers.communication == "nccl" else None
            if line is None and not cluster.is_lost_worker(error, workers):
                raise
            if run is None:  # else it is finished, and only the farewell has failed
                way_on = how_to_go_on(folder) if has_checkpoint(folder) else "No epoch was finished; start it again."
                if line is not None:
                    around = "if no other worker has ended, set communication=ring"
                    raise PipelineError(f"NCCL failed ({line}); {around}. {way_on}", exit_code=1) from None
                gone = f"Another worker of this training is gone. {way_on}"
                raise PipelineError(gone, exit_code=cluster.LOST) from None
        return run


def build_network(options: dict[str, Any], dataset: Any) -> Any:
    """The network that the settings' group ``model`` names, for a data set's images and classes."""
    others = {key: value for key, value in options.items() if key != "name"}
    return models.build(options["name"], dataset.image_shape, dataset.num_classes, **others)


def build_loop(settings: dict[str, Any], dataset: Any, workers: cluster.Cluster = SINGLE) -> Loop:
    """The network, its optimizer and the loop that trains it, for one data set and the workers that share it."""
    precision = chosen_precision(settings["precision"])
    with precision_policy(precision):
        network = build_network(settings["model"], dataset)
        images = len(dataset.train.labels)
        optimizer = optimizers.build(
            settings["optimizer"],
            schedule=settings["schedule"],
            warmup=settings["warmup"],
            total_steps=settings["epochs"] * (images // min(settings["batch_size"], images)),
        )
    network.compile(optimizer=optimizer, auto_scale_loss=False)  # Keras callbacks look for model.optimizer
    return Loop(
        network,
        optimizer,
        augment.load_policy(settings["augment"]),
        dataset.mean,
        dataset.std,
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        label_smoothing=settings["label_smoothing"],
        precision=precision,
        xla=compiles(settings["xla"], precision, network),
        workers=workers,
    )


def compiles(xla: bool | str, precision: str, network: Any) -> bool | str:
    """What XLA compiles of this network's graphs: True (all), "clusters" or False (nothing).

    With ``auto`` it is all of them on a GPU, except where that is known not to work. With layers that insist on custom
    operations it is the clusters of operations around these (layers with ``operations=auto`` use TensorFlow's own
    under XLA, which fuses them). With bfloat16 it is nothing: XLA of TensorFlow 2.17 makes the cnn's loss NaN with it
    on an H200. The other networks do train so with ``xla=true``.

    Raises:
        PipelineError: XLA and custom operations are both insisted on, or clusters without a GPU.
    """
    insists = any(getattr(layer, "operations", None) == "custom" for layer in network._flatten_layers())
    if xla is True and insists:
        raise PipelineError("XLA cannot compile a custom operation; set xla=clusters, or model.operations=auto.")
    if xla == "clusters" and not device.has_gpu():
        raise PipelineError("TensorFlow makes XLA clusters on a GPU only, and none was found here; set xla=false.")
    if xla == "auto":
        if not device.has_gpu() or precision == "mixed_bfloat16":
            return False
        return "clusters" if insists else True
    return xla


def fit(
    loop: Loop, settings: dict[str, Any], dataset: Any, folder: Path, callbacks: Sequence[Any] = ()
) -> checkpoints.Progress:
    """Train epoch after epoch, from the newest checkpoint on; each epoch ends with a checkpoint.

    Returns:
        How far it came, with the history. The network then has the weights of the epoch with the best validation
        accuracy; of several workers, the first one's has.
    """
    network, epochs = loop.network, settings["epochs"]
    variables = loop.variables
    progress = checkpoints.resume(folder / "checkpoints", variables)
    loop.workers.check_alike(what_is_trained(loop, settings, dataset, progress))
    loop.start_together()
    stopper = early_stopping(settings["early_stopping"])
    watchers = [*stopper, *callbacks]
    if loop.workers.is_chief:
        watchers += watching(loop, settings, dataset, folder)
    listeners = _callback_list(watchers, network, epochs)
    images = loop.images_an_epoch(len(dataset.train.labels))
    bar = tracking.ProgressBar(epochs, images, progress.epoch, shown=loop.workers.is_chief)
    try:
        listeners.on_train_begin()
        replay(stopper, progress)
        while progress.epoch < epochs and not network.stop_training:
            started, epoch = time.perf_counter(), progress.epoch
            bar.start_epoch(epoch)
            listeners.on_epoch_begin(epoch)
            logs = loop.train_epoch(dataset.train, epoch, bar.advance)
            validation = loop.agreed(loop.evaluate(dataset.validation))
            loop.check_finite(validation["loss"], epoch)  # the last step's weights no training loss has seen
            logs.update(val_loss=validation["loss"], val_accuracy=validation["accuracy"])
            if network.output_shape[-1] > TOP5_ABOVE_CLASSES:
                logs["val_top5"] = validation["top5"]
            logs["learning_rate"] = loop.learning_rate()
            progress.epoch, progress.seconds = epoch + 1, progress.seconds + time.perf_counter() - started
            progress.history.append(logs)
            keep_epoch(folder, network, variables, progress, loop.workers)
            bar.end_epoch(epoch, logs)
            listeners.on_epoch_end(epoch, logs)
    except BaseException:
        tracking.end_failed(watchers)
        raise
    finally:
        bar.close()
    if loop.workers.is_chief and progress.best_epoch != progress.epoch:  # else the network has them already
        checkpoints.load(checkpoints.best_path(folder / "checkpoints", progress.best_epoch), network.variables)
    listeners.on_train_end()
    return progress


def what_is_trained(
    loop: Loop, settings: dict[str, Any], dataset: Any, progress: checkpoints.Progress
) -> dict[str, str]:
    """All that workers must have in common to train one network, as text by its name in a sentence.

    Args:
        settings: From `keep_settings`, with the precision that was chosen.
    """
    kept = {key: value for key, value in settings.items() if key not in OF_A_SITTING and key not in OF_A_MACHINE}
    of_the_data = {key: value for key, value in kept.pop("dataset").items() if key not in OF_THE_DISK}
    return {
        **{key: repr(value) for key, value in sorted(kept.items())},
        "dataset": repr(of_the_data),
        "communication": loop.workers.communication,
        "xla": repr(loop.xla),
        "the data set's images": dataset.digest,
        "finished epochs": str(progress.epoch),
    }


def finish(
    loop: Loop, settings: dict[str, Any], dataset: Any, folder: Path, progress: checkpoints.Progress
) -> runs.Run:
    """Write the card, `metrics.json` and the model, point ``runs/latest`` here, and measure the test split.

    In this order, so that a run with a model has all that others read; after a kill in between, ``resume=`` does it
    again.
    """
    card = runs.ModelCard(
        name=run_name(folder),
        model=settings["model"]["name"],
        dataset=dataset.name,
        class_names=list(dataset.class_names),
        input_shape=tuple(dataset.image_shape),
        mean=tuple(dataset.mean),
        std=tuple(dataset.std),
        precision=chosen_precision(settings["precision"]),
        parameters=loop.network.count_params(),
        data_digest=dataset.digest,
        versions=device.describe(),
    )
    card.write(folder / "model_card.json")
    best = progress.history[progress.best_epoch - 1]
    speeds = [logs["images_per_second"] for logs in progress.history]
    training = {
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "validation_accuracy": best["val_accuracy"],
        "train_seconds": progress.seconds,
        "images_per_second": statistics.median(speeds[1:] or speeds),  # the first epoch holds the compilation
        "history": progress.history,
    }
    files.write_json(folder / "metrics.json", training)
    with files.whole(folder / "model.keras") as temporary:
        portable(loop, settings, dataset).save(temporary)
    runs.set_latest(folder)
    run = runs.Run(folder.resolve())
    evaluate.evaluate(run, dataset, "test")
    return run


def portable(loop: Loop, settings: dict[str, Any], dataset: Any) -> Any:
    """The deployable graph of what a loop has trained, in float32 and TensorFlow's own operations whatever it trained
    in.

    Returns:
        A `keras.Model`: uint8 [N, H, W, C] to float32 probabilities [N, K].
    """
    options = dict(settings["model"])
    if "operations" in options:  # the same numbers by operations that every target can hold
        options["operations"] = "tensorflow"
    with precision_policy("float32"):
        network = build_network(options, dataset)
        network.set_weights(loop.network.get_weights())
        return models.deployable(network, dataset.mean, dataset.std)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and TensorFlow; on a CPU, also make TensorFlow add in a fixed order."""
    tf = device.tensorflow()
    import keras

    random.seed(seed)
    keras.utils.set_random_seed(seed)
    if not device.has_gpu():
        tf.config.experimental.enable_op_determinism()


def chosen_precision(precision: str) -> str:
    """What ``auto`` means on this machine: mixed_float16 where the GPU has tensor cores (Volta and later), else
    float32.

    Not bfloat16: XLA of TensorFlow 2.17 makes the cnn's loss NaN with it on an H200, where float16 is also faster.
    """
    if precision != "auto":
        return precision
    capability = device.compute_capability()
    return "float32" if capability is None or capability < (7, 0) else "mixed_float16"


@contextlib.contextmanager
def precision_policy(name: str) -> Iterator[None]:
    """Keras's dtype policy inside the block; the one before comes back after it."""
    device.tensorflow()
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def resumed(settings: dict[str, Any]) -> dict[str, Any]:
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
    here = {key: settings[key] for key in OF_A_SITTING}
    kept = config.check({**runs.Run(folder).config, **here, "resume": str(folder)})
    if settings["data_dir"] is not None:
        kept["dataset"]["data_dir"] = settings["data_dir"]
    return kept


@contextlib.contextmanager
def claimed_folder(settings: dict[str, Any], workers: cluster.Cluster = SINGLE) -> Iterator[Path]:
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
                raise with_way_on(files.disk_error(place, error), folder) from None
            raise PipelineError(f"{place} cannot be read ({error.strerror or error}).", exit_code=1) from None
        except Exception as error:  # TensorFlow's writers, TensorBoard's among them, have errors of their own
            if files.is_full(error):
                raise with_way_on(files.disk_error(logs, error), folder) from None
            raise
        finally:
            if not keeps and not has_checkpoint(folder):
                leave_free(folder, ours)


def leave_free(folder: Path, made: Sequence[Path]) -> None:
    """Remove what a run that finished no epoch has made, so that its name can be taken again."""
    with contextlib.suppress(OSError):
        for name in ("config.yaml", ".lock"):
            (folder / name).unlink(missing_ok=True)
        for inside in made:
            shutil.rmtree(inside, ignore_errors=True)
        folder.rmdir()


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("epoch-*.npz"))


def with_way_on(error: files.DiskError, folder: Path) -> files.DiskError:
    """The error with how to go on, where there is something to go on with."""
    return files.DiskError(f"{error} {how_to_go_on(folder)}") if has_checkpoint(folder) else error


def keep_settings(
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
        "precision": chosen_precision(settings["precision"]),  # what auto meant here: a checkpoint fits no other
    }
    settings["dataset"] = {
        **settings["dataset"],
        "data_dir": str(Path(where).expanduser().resolve()) if where else None,
    }
    if workers.is_chief:
        files.write(folder / "config.yaml", OmegaConf.to_yaml(settings).encode())
    return settings


def keep_epoch(
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


def watching(loop: Loop, settings: dict[str, Any], dataset: Any, folder: Path) -> list[Any]:
    """The callbacks of a run: TensorBoard, and the tracker that is asked for."""
    from pipeline.augment import gallery

    chosen = permutation(settings["seed"], 0, len(dataset.train.labels))[: tracking.GALLERY_IMAGES]
    sample = dataset.train.images[device.to_device(chosen)]  # folders come a class at a time

    def confusion() -> numpy.ndarray:
        predictions = loop.evaluate(dataset.validation)["predictions"]
        labels = device.to_numpy(dataset.validation.labels)
        return tracking.figure_pixels(evaluate.confusion_figure(labels, predictions, dataset.class_names))

    callbacks = [
        tracking.tensorboard_callback(
            LOGS / run_name(folder),
            loop.network,
            hyperparameters=tracking.flatten({k: v for k, v in settings.items() if v is not None}),
            gallery=gallery.policy_grid(sample, loop.policy, dataset.mean, dataset.std, settings["seed"]),
            confusion=confusion,
        )
    ]
    if settings["tracker"] == "wandb":
        callbacks.append(tracking.wandb_callback(folder, run_name(folder), settings))
    return callbacks


def early_stopping(patience: int | None) -> list[Any]:
    """Keras's early stopping on the validation accuracy; nothing where `patience` is None."""
    import keras

    if patience is None:
        return []
    return [keras.callbacks.EarlyStopping(monitor="val_accuracy", mode="max", patience=patience)]


def replay(stopper: list[Any], progress: checkpoints.Progress) -> None:
    """Let early stopping see the epochs of the sittings before, so that its patience carries over."""
    for callback in stopper:
        for epoch, logs in enumerate(progress.history):
            callback.on_epoch_end(epoch, logs)


def run_name(folder: Path) -> str:
    """A run's name: its folder below ``runs/``, NAME or for a multirun's job SWEEP/JOB."""
    return os.path.relpath(folder, runs.RUNS)


def how_to_go_on(folder: Path) -> str:
    finished = "Finished epochs are kept; go" if has_checkpoint(folder) else "Go"
    command = os.environ.get(cluster.LAUNCHER, "python -m pipeline.train")
    return f"{finished} on with: {command} resume={shlex.quote(os.path.relpath(folder))}"


def _callback_list(callbacks: Sequence[Any], network: Any, epochs: int) -> Any:
    import keras

    network.stop_training = False
    return keras.callbacks.CallbackList(list(callbacks), model=network, epochs=epochs)


def main_work(settings: dict[str, Any], overrides: list[str]) -> None:
    """What the command does with its configuration."""
    of_a_resumed = ("resume", "data_dir", *OF_A_SITTING)
    given = [override for override in overrides if override.split("=")[0] not in of_a_resumed]
    if settings["resume"] is not None and given:
        raise PipelineError(f"resume= goes on with the run's own settings; leave out {', '.join(given)}.")
    run = train(settings)
    if run is None:  # the first worker speaks for all
        return
    metrics, folder = run.metrics, os.path.relpath(run.path)
    print(
        f"test accuracy {metrics['test_accuracy']:.2%}, {metrics['images_per_second']:,.0f} images/s, "
        f"{metrics['train_seconds']:.1f} s of training; the run is in {folder}"
    )
    print(f"next:\n  python -m export.tflite --run {shlex.quote(folder)}\n  tensorboard --logdir {LOGS}")


def main() -> int:
    return config.command(main_work, compare.report)()


if __name__ == "__main__":
    cli.run(main)
