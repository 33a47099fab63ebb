"""Keras callbacks of a training (TensorBoard, Weights & Biases, early stopping) and the progress bar."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline import ops
from pipeline.augment import gallery
from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line
from pipeline.core.settings import Settings
from pipeline.evaluate import figures
from pipeline.train import checkpoints
from pipeline.train.loop import Loop, permutation
from pipeline.train.run_folder import LOGS

GALLERY_IMAGES = 8
WANDB_SECONDS_TO_CONNECT = 60
# By default, wandb.init retries a failed request for days before the timeout above applies.
WANDB_RETRIES = {"x_graphql_retry_max": 3, "x_graphql_retry_wait_max_seconds": 8.0, "x_graphql_timeout_seconds": 20.0}


def default_callbacks(loop: Loop, settings: Settings, dataset: Any, folder: Path) -> list[Any]:
    """The callbacks of every run: TensorBoard, and Weights & Biases if ``tracker=wandb``."""
    callbacks = [tensorboard_callback(LOGS / settings.name, loop, settings, dataset)]
    if settings.tracker == "wandb":
        callbacks.append(wandb_callback(folder, settings))
    return callbacks


def callback_list(callbacks: Sequence[Any], network: Any, epochs: int) -> Any:
    """A `keras.callbacks.CallbackList` for a network."""
    import keras

    network.stop_training = False
    return keras.callbacks.CallbackList(list(callbacks), model=network, epochs=epochs)


def early_stopping(patience: int | None) -> list[Any]:
    """Keras's early stopping on the validation accuracy; empty if `patience` is None."""
    import keras

    if patience is None:
        return []
    return [keras.callbacks.EarlyStopping(monitor="val_accuracy", mode="max", patience=patience)]


def replay(stopper: list[Any], progress: checkpoints.Progress) -> None:
    """Pass the epochs before a resume to early stopping, so that it continues to count its patience."""
    for callback in stopper:
        for epoch, logs in enumerate(progress.history):
            callback.on_epoch_end(epoch, logs)


def tensorboard_callback(folder: Path, loop: Loop, settings: Settings, dataset: Any) -> Any:
    """A Keras callback that writes all of a run's TensorBoard files into one folder, so that it is one run there.

    It writes the settings, the augmentation gallery and the graph at the start, the metrics and a histogram of every
    weight after each epoch, and the confusion matrix of the validation split at the end.

    Args:
        folder: ``logs/NAME``.
        loop: The loop that trains.
        settings: The settings; `hyperparameters` says which of them are logged.
        dataset: The training dataset.
    """
    tf = device.tensorflow()
    import keras
    from tensorboard.plugins.hparams import api as hparams

    network = loop.network

    class TensorBoardFiles(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            self.writer = tf.summary.create_file_writer(str(folder))
            chosen = permutation(settings.seed, 0, len(dataset.train.labels))[:GALLERY_IMAGES]
            sample = dataset.train.images[device.to_device(chosen)]  # random, so that it contains several classes
            grid = gallery.policy_grid(sample, loop.policy, dataset.mean, dataset.std, settings.seed)
            with self.writer.as_default(step=0):
                hparams.hparams(hyperparameters(settings), trial_id=settings.name)
                tf.summary.image("augmentation", grid[None])
                forward = tf.function(lambda images: network(images, training=False))
                shape = (1, *network.input_shape[1:])
                with ops.without_custom_operations():  # do not compile them for a graph that is only displayed
                    graph = forward.get_concrete_function(tf.TensorSpec(shape, network.compute_dtype)).graph
                tf.summary.graph(graph)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            with self.writer.as_default(step=epoch + 1):
                for name, value in (logs or {}).items():
                    tf.summary.scalar(scalar_tag(name), value)
                for variable in network.weights:
                    tf.summary.histogram(variable.path, variable.value)
            self.writer.flush()

        def on_train_end(self, logs: Any = None) -> None:
            predictions = loop.evaluate(dataset.validation)["predictions"]
            labels = device.to_numpy(dataset.validation.labels)
            figure = figures.confusion_matrix_figure(labels, predictions, dataset.class_names)
            with self.writer.as_default(step=settings.epochs):
                tf.summary.image("confusion_matrix", figures.figure_pixels(figure)[None])
            self.writer.close()

    return TensorBoardFiles()


def scalar_tag(name: str) -> str:
    """TensorBoard's name of a value of an epoch: ``val_loss`` becomes ``loss/validation``, next to ``loss/train``."""
    if name.startswith("val_"):
        return f"{name[4:]}/validation"
    return f"{name}/train" if name in ("loss", "accuracy") else name


def write_test_accuracy(folder: Path, accuracy: float, epochs: int) -> None:
    """Add the test accuracy to a run's TensorBoard files; the HParams page shows it next to the settings."""
    tf = device.tensorflow()
    with tf.summary.create_file_writer(str(folder)).as_default(step=epochs):
        tf.summary.scalar("accuracy/test", accuracy)


def hyperparameters(settings: Settings) -> dict[str, Any]:
    """The settings that users change, by their names on the command line, for TensorBoard's HParams page.

    The network's options are included; paths, digests and settings of the machine are not.
    """
    values = {
        "dataset": settings.dataset.name,
        "dataset.image_size": settings.dataset.image_size,
        "model": settings.model.name,
        "augment": settings.augment.get("name", "custom"),
        **{f"optimizer.{key}": value for key, value in settings.optimizer.plain().items() if key != "name"},
        **{key: getattr(settings, key) for key in ("epochs", "batch_size", "seed", "label_smoothing", "precision")},
        **{f"model.{key}": value for key, value in settings.model.options.items()},
    }
    values["optimizer"] = settings.optimizer.name
    given = {key: value for key, value in values.items() if value is not None}
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in given.items()}


def wandb_callback(folder: Path, settings: Settings) -> Any:
    """A Keras callback that logs each epoch to Weights & Biases; a resumed training continues the same W&B run.

    Args:
        folder: The run's folder; offline files go to ``wandb/`` in it.
        settings: The settings that are logged.

    Raises:
        PipelineError: The package wandb is not installed.
    """
    import keras

    try:
        import wandb
    except ImportError as error:
        raise PipelineError("tracker=wandb needs wandb; run: pip install -r requirements-extras.txt") from error

    class WeightsAndBiases(keras.callbacks.Callback):
        run: Any = None

        def on_train_begin(self, logs: Any = None) -> None:
            try:
                self.run = wandb.init(
                    project="gpu-image-pipeline",
                    name=settings.name,
                    id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
                    resume=None if wandb.setup().settings.mode in ("offline", "disabled", "dryrun") else "allow",
                    config=settings.plain(),
                    dir=str(folder),
                    reinit="finish_previous",
                    settings=wandb.Settings(silent=True, init_timeout=WANDB_SECONDS_TO_CONNECT, **WANDB_RETRIES),
                )
            except Exception as error:  # wandb's errors have no common class
                raise PipelineError(
                    f"tracker=wandb could not start ({first_line(error)}); run wandb login, or set WANDB_MODE=offline."
                ) from error

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.run.log({"epoch": epoch + 1, **(logs or {})}, step=epoch + 1)

        def on_train_end(self, logs: Any = None) -> None:
            offline = self.run.settings.mode == "offline"
            files = Path(self.run.dir).parent
            self.run.finish()
            if offline:
                print(f"W&B files: {files}; upload them with: wandb sync {shlex.quote(os.path.relpath(files))}")

        def on_train_failed(self) -> None:
            if self.run is not None:
                self.run.finish(exit_code=1)

    return WeightsAndBiases()


def end_failed(callbacks: Iterable[Any]) -> None:
    """Call the method ``on_train_failed`` of the callbacks that have one."""
    for callback in callbacks:
        if hasattr(callback, "on_train_failed"):
            with contextlib.suppress(Exception):  # report the error that ended the training, not this one
                callback.on_train_failed()


class ProgressBar:
    """Prints one line per epoch, and on a terminal also a progress bar; prints nothing if `shown` is False."""

    def __init__(self, epochs: int, images_an_epoch: int, first_epoch: int = 0, shown: bool = True):
        from tqdm import tqdm

        self.epochs, self.shown = epochs, shown
        self.bar = tqdm(
            total=epochs * images_an_epoch, initial=first_epoch * images_an_epoch, unit=" images", unit_scale=True,
            disable=not (shown and sys.stderr.isatty()), file=sys.stderr, leave=False, dynamic_ncols=True,
        )  # fmt: skip

    def start_epoch(self, epoch: int) -> None:
        self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}")

    def advance(self, images: int, loss: float) -> None:
        self.bar.update(images)
        self.bar.set_postfix_str(f"loss {loss:.4f}")

    def end_epoch(self, epoch: int, logs: dict[str, float]) -> None:
        if not self.shown:
            return
        line = (
            f"epoch {epoch + 1:>3}/{self.epochs}  loss {logs['loss']:.4f}  accuracy {logs['accuracy']:.4f}  "
            f"val_loss {logs['val_loss']:.4f}  val_accuracy {logs['val_accuracy']:.4f}  "
            f"learning rate {logs['learning_rate']:.4f}  {logs['images_per_second']:,.0f} images/s"
        )
        self.bar.write(line, file=sys.stdout)

    def close(self) -> None:
        self.bar.close()
