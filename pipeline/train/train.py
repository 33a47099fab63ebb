"""Train a network: load the dataset, build the network, fit it, finish the run.

run = train(config.compose(["dataset=digits", "epochs=5", "name=first"]))
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import runs
from pipeline.core import device
from pipeline.core.settings import Settings
from pipeline.data.load import load_from_settings
from pipeline.evaluate.metrics import TOP5_ABOVE_CLASSES
from pipeline.evaluate.run import evaluate_run
from pipeline.train import checkpoints, cluster, run_folder, setup
from pipeline.train.callbacks import (
    ProgressBar,
    callback_list,
    default_callbacks,
    early_stopping,
    end_failed,
    replay,
    write_test_accuracy,
)
from pipeline.train.head import fit_new_head
from pipeline.train.loop import Loop


def train(settings: Settings, callbacks: Sequence[Any] = ()) -> runs.Run | None:
    """Train a network, from the dataset to the finished run folder.

    Args:
        settings: From `config.compose`.
        callbacks: More Keras callbacks; they are called at the start and end of training and of each epoch.

    Returns:
        The finished run, to which ``runs/latest`` points; None in all training processes except the first.

    Raises:
        PipelineError: A setting or the data is invalid, the memory or the disk is full, the loss is no longer finite,
            or Ctrl-C was pressed. Finished epochs are saved, and the message says how to resume.
    """
    settings = setup.resolve(run_folder.resume_settings(settings))
    workers = cluster.connect(settings.cluster, settings.communication)
    settings = setup.scale_learning_rate(settings, workers)
    setup.seed_everything(settings.seed)
    with run_folder.open_run_dir(settings, workers) as folder:
        # Load
        dataset = load_from_settings(settings.dataset)
        for note in setup.check(settings, dataset):
            if workers.is_chief:
                print(f"note: {note}")

        # Build
        with device.explain_out_of_memory("choose a smaller network"):
            loop = setup.build_loop(settings, dataset, workers)
        run_folder.save_config(folder, settings, dataset, workers)

        # Fit
        progress = fit(loop, settings, dataset, folder, callbacks)

        # Finish
        run = finish(loop, settings, dataset, folder, progress) if workers.is_chief else None
        workers.leave()
    return run


def fit(
    loop: Loop, settings: Settings, dataset: Any, folder: Path, callbacks: Sequence[Any] = ()
) -> checkpoints.Progress:
    """Train all epochs after the newest checkpoint, and write a checkpoint after each.

    Returns:
        The progress with the history. The network then has the weights of the epoch with the best validation accuracy
        (in the first training process).
    """
    network, workers, epochs = loop.network, loop.workers, settings.epochs
    progress = checkpoints.resume(folder / "checkpoints", loop.variables)
    workers.assert_same_config(run_folder.config_fingerprint(settings, dataset, progress))
    if progress.epoch == 0 and workers.is_chief:
        fit_new_head(loop, settings, dataset)
    loop.sync_initial_state()
    stopper = early_stopping(settings.early_stopping)
    watchers = [*stopper, *callbacks, *(default_callbacks(loop, settings, dataset, folder) if workers.is_chief else [])]
    listeners = callback_list(watchers, network, epochs)
    bar = ProgressBar(epochs, loop.images_an_epoch(len(dataset.train)), progress.epoch, shown=workers.is_chief)
    try:
        listeners.on_train_begin()
        replay(stopper, progress)
        while progress.epoch < epochs and not network.stop_training:
            started, epoch = time.perf_counter(), progress.epoch
            bar.start_epoch(epoch)
            listeners.on_epoch_begin(epoch)
            logs = loop.train_epoch(dataset.train, epoch, bar.advance)
            validation = loop.validate(dataset.validation)
            loop.check_finite(validation["loss"], epoch)  # the training loss does not include the final update
            logs.update(val_loss=validation["loss"], val_accuracy=validation["accuracy"])
            if dataset.num_classes > TOP5_ABOVE_CLASSES:
                logs["val_top5"] = validation["top5"]
            logs["learning_rate"] = loop.learning_rate()
            progress.epoch, progress.seconds = epoch + 1, progress.seconds + time.perf_counter() - started
            progress.history.append(logs)
            run_folder.save_epoch(folder, loop, progress, len(dataset.validation))
            bar.end_epoch(epoch, logs)
            listeners.on_epoch_end(epoch, logs)
    except BaseException:
        end_failed(watchers)
        raise
    finally:
        bar.close()
    if workers.is_chief and progress.best_epoch != progress.epoch:  # otherwise the network already has these weights
        checkpoints.load(checkpoints.best_path(folder / "checkpoints", progress.best_epoch), network.variables)
    listeners.on_train_end()
    return progress


def finish(loop: Loop, settings: Settings, dataset: Any, folder: Path, progress: checkpoints.Progress) -> runs.Run:
    """Save the run with its best weights and evaluate it on the test split."""
    run = run_folder.save_run(folder, loop, settings, dataset, progress)
    measured = evaluate_run(run, dataset, "test")
    write_test_accuracy(run_folder.LOGS / settings.name, measured["test_accuracy"], settings.epochs)
    return run
