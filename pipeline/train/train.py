"""Train a network: ``python -m pipeline.train dataset=cifar10 data_dir=DATA model=cnn epochs=5 name=first``.

The run lands in ``runs/first`` and its TensorBoard files in ``logs/first``. ``resume=runs/first`` goes on with a run
that was interrupted. Every setting is in `pipeline/conf`; ``--cfg job`` prints them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import runs
from pipeline.core import cli, device, files
from pipeline.core.errors import PipelineError
from pipeline.data.dataset import SPLITS
from pipeline.data.load import load_from_settings
from pipeline.evaluate.metrics import TOP5_ABOVE_CLASSES
from pipeline.evaluate.run import evaluate_run
from pipeline.train import checkpoints, cluster
from pipeline.train.callbacks import ProgressBar, check_tracker, default_callbacks, early_stopping, end_failed, replay
from pipeline.train.loop import Loop
from pipeline.train.run_folder import (
    config_fingerprint,
    has_checkpoint,
    lock_run_dir,
    resume_hint,
    resume_settings,
    run_name,
    save_config,
    save_epoch,
    with_resume_hint,
)
from pipeline.train.setup import (
    build_deployable,
    build_loop,
    resolve_precision,
    seed_everything,
)

FEW_VALIDATION_IMAGES = 100


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
    settings = resume_settings(settings)
    check_tracker(settings["tracker"])
    workers = cluster.connect(settings["cluster"], settings["communication"])
    seed_everything(settings["seed"])
    with lock_run_dir(settings, workers) as folder:
        dataset = load_from_settings(settings["dataset"])
        for split in SPLITS:
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
        settings = save_config(folder, settings, dataset, workers)
        run = None
        try:
            with cli.interrupts():
                progress = fit(loop, settings, dataset, folder, callbacks)
                if workers.is_chief:
                    run = finish(loop, settings, dataset, folder, progress)
                workers.barrier()
        except KeyboardInterrupt as stop:
            raise PipelineError(f"Stopped by {cli.stopped_by(stop)}. {resume_hint(folder)}", 130) from None
        except files.DiskError as error:
            raise with_resume_hint(error, folder) from None
        except Exception as error:
            line = cluster.nccl_line(error) if workers.communication == "nccl" else None
            if line is None and not cluster.is_lost_worker(error, workers):
                raise
            if run is None:  # else it is finished, and only the farewell has failed
                way_on = resume_hint(folder) if has_checkpoint(folder) else "No epoch was finished; start it again."
                if line is not None:
                    around = "if no other worker has ended, set communication=ring"
                    raise PipelineError(f"NCCL failed ({line}); {around}. {way_on}", exit_code=1) from None
                gone = f"Another worker of this training is gone. {way_on}"
                raise PipelineError(gone, exit_code=cluster.LOST) from None
        return run


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
    loop.workers.assert_same_config(config_fingerprint(loop, settings, dataset, progress))
    loop.sync_initial_state()
    stopper = early_stopping(settings["early_stopping"])
    watchers = [*stopper, *callbacks]
    if loop.workers.is_chief:
        watchers += default_callbacks(loop, settings, dataset, folder)
    listeners = _callback_list(watchers, network, epochs)
    images = loop.images_an_epoch(len(dataset.train.labels))
    bar = ProgressBar(epochs, images, progress.epoch, shown=loop.workers.is_chief)
    try:
        listeners.on_train_begin()
        replay(stopper, progress)
        while progress.epoch < epochs and not network.stop_training:
            started, epoch = time.perf_counter(), progress.epoch
            bar.start_epoch(epoch)
            listeners.on_epoch_begin(epoch)
            logs = loop.train_epoch(dataset.train, epoch, bar.advance)
            validation = loop.average_metrics(loop.evaluate(dataset.validation))
            loop.check_finite(validation["loss"], epoch)  # the last step's weights no training loss has seen
            logs.update(val_loss=validation["loss"], val_accuracy=validation["accuracy"])
            if network.output_shape[-1] > TOP5_ABOVE_CLASSES:
                logs["val_top5"] = validation["top5"]
            logs["learning_rate"] = loop.learning_rate()
            progress.epoch, progress.seconds = epoch + 1, progress.seconds + time.perf_counter() - started
            progress.history.append(logs)
            save_epoch(folder, network, variables, progress, loop.workers)
            bar.end_epoch(epoch, logs)
            listeners.on_epoch_end(epoch, logs)
    except BaseException:
        end_failed(watchers)
        raise
    finally:
        bar.close()
    if loop.workers.is_chief and progress.best_epoch != progress.epoch:  # else the network has them already
        checkpoints.load(checkpoints.best_path(folder / "checkpoints", progress.best_epoch), network.variables)
    listeners.on_train_end()
    return progress


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
        precision=resolve_precision(settings["precision"]),
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
    with files.atomic_write(folder / "model.keras") as temporary:
        build_deployable(loop, settings, dataset).save(temporary)
    runs.set_latest(folder)
    run = runs.Run(folder.resolve())
    evaluate_run(run, dataset, "test")
    return run


def _callback_list(callbacks: Sequence[Any], network: Any, epochs: int) -> Any:
    import keras

    network.stop_training = False
    return keras.callbacks.CallbackList(list(callbacks), model=network, epochs=epochs)
