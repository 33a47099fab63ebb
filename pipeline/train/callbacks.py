"""Keras callbacks of a training (TensorBoard, Weights & Biases, early stopping) and the progress bar."""

from __future__ import annotations

import contextlib
import hashlib
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
    """Keras's TensorBoard callback, which after each epoch writes the metrics and a histogram of every weight.

    It also writes, at the start, the augmentation gallery, the graph and the hyper-parameters, and at the end the
    confusion matrix of the validation split.

    Args:
        folder: ``logs/NAME``; curves go to its subfolders ``train`` and ``validation``.
        loop: The loop that trains.
        settings: The settings that are logged as hyper-parameters.
        dataset: The training dataset.
    """
    tf = device.tensorflow()
    import keras
    from tensorboard.plugins.hparams import api as hparams

    network = loop.network

    class TensorBoardFiles(keras.callbacks.TensorBoard):
        def on_train_begin(self, logs: Any = None) -> None:
            super().on_train_begin(logs)
            chosen = permutation(settings.seed, 0, len(dataset.train.labels))[:GALLERY_IMAGES]
            sample = dataset.train.images[device.to_device(chosen)]  # random, so that it contains several classes
            grid = gallery.policy_grid(sample, loop.policy, dataset.mean, dataset.std, settings.seed)
            with self._train_writer.as_default(step=0):
                tf.summary.image("augmentation", grid[None])
                forward = tf.function(lambda images: network(images, training=False))
                shape = (1, *network.input_shape[1:])
                with ops.without_custom_operations():  # do not compile them for a graph that is only displayed
                    graph = forward.get_concrete_function(tf.TensorSpec(shape, network.compute_dtype)).graph
                tf.summary.graph(graph)
            with tf.summary.create_file_writer(str(folder)).as_default():
                hparams.hparams(flatten(settings.plain()), trial_id=settings.name)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            super().on_epoch_end(epoch + 1, logs)

        def on_train_end(self, logs: Any = None) -> None:
            predictions = loop.evaluate(dataset.validation)["predictions"]
            labels = device.to_numpy(dataset.validation.labels)
            figure = figures.confusion_matrix_figure(labels, predictions, dataset.class_names)
            with self._val_writer.as_default(step=settings.epochs):
                tf.summary.image("confusion_matrix", figures.figure_pixels(figure)[None])
            super().on_train_end(logs)

    return TensorBoardFiles(str(folder), histogram_freq=1, write_graph=False)


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
            self.run.finish()

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


def flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to dotted names for TensorBoard's HParams page, which accepts only numbers and text."""
    import pandas

    (flat,) = pandas.json_normalize(settings).to_dict("records")
    given = {key: value for key, value in flat.items() if value is not None}
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in given.items()}


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
