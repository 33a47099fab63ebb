"""What watches a training: TensorBoard's files and Weights & Biases as Keras callbacks, and the progress bar.

tensorboard --logdir logs
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import netrc
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy

from pipeline import ops
from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line
from pipeline.evaluate import figures
from pipeline.train import checkpoints
from pipeline.train.loop import Loop, permutation
from pipeline.train.run_folder import (
    LOGS,
    run_name,
)


def default_callbacks(loop: Loop, settings: dict[str, Any], dataset: Any, folder: Path) -> list[Any]:
    """The callbacks of a run: TensorBoard, and the tracker that is asked for."""
    from pipeline.augment import gallery

    chosen = permutation(settings["seed"], 0, len(dataset.train.labels))[:GALLERY_IMAGES]
    sample = dataset.train.images[device.to_device(chosen)]  # folders come a class at a time

    def confusion() -> numpy.ndarray:
        predictions = loop.evaluate(dataset.validation)["predictions"]
        labels = device.to_numpy(dataset.validation.labels)
        return figures.figure_pixels(figures.confusion_matrix_figure(labels, predictions, dataset.class_names))

    callbacks = [
        tensorboard_callback(
            LOGS / run_name(folder),
            loop.network,
            hyperparameters=flatten({k: v for k, v in settings.items() if v is not None}),
            gallery=gallery.policy_grid(sample, loop.policy, dataset.mean, dataset.std, settings["seed"]),
            confusion=confusion,
        )
    ]
    if settings["tracker"] == "wandb":
        callbacks.append(wandb_callback(folder, run_name(folder), settings))
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


GALLERY_IMAGES = 8


WANDB_OFFLINE = ("offline", "disabled", "dryrun")


SECONDS_TO_ANSWER = 10


def tensorboard_callback(
    folder: Path,
    network: Any,
    *,
    hyperparameters: dict[str, Any],
    gallery: numpy.ndarray | None = None,
    confusion: Any = None,
) -> Any:
    """A Keras callback that writes `folder` (below ``logs/``) for TensorBoard.

    At the start: the augmentation gallery, the graph and the hyper-parameters. After each epoch: loss, accuracy,
    learning rate, images/s and a histogram of every weight. At the end: the confusion matrix.

    Args:
        folder: ``logs/NAME``; curves go to its subfolders ``train`` and ``validation``, as Keras does it.
        network: The network that trains.
        hyperparameters: Name to number, text or boolean, for the HParams page.
        gallery: uint8 [h, w, 3], the policy's gallery.
        confusion: Called without arguments at the end of training for the confusion matrix, uint8 [h, w, 3].
    """
    tf = device.tensorflow()
    import keras
    from tensorboard.plugins.hparams import api as hparams

    class TensorBoardFiles(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            self.train = tf.summary.create_file_writer(str(folder / "train"))
            self.validation = tf.summary.create_file_writer(str(folder / "validation"))
            with self.train.as_default(step=0):
                if gallery is not None:
                    tf.summary.image("augmentation", gallery[None])
                forward = tf.function(lambda images: network(images, training=False))
                shape = (1, *network.input_shape[1:])
                with ops.without_custom_operations():  # a graph to look at is no reason to compile them
                    graph = forward.get_concrete_function(tf.TensorSpec(shape, network.compute_dtype)).graph
                tf.summary.graph(graph)
            with tf.summary.create_file_writer(str(folder)).as_default():
                hparams.hparams(hyperparameters, trial_id=str(hyperparameters.get("name", folder.name)))

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            logs = logs or {}
            for writer, prefix in ((self.train, ""), (self.validation, "val_")):
                with writer.as_default(step=epoch + 1):
                    for key in ("loss", "accuracy"):
                        if prefix + key in logs:
                            tf.summary.scalar(f"epoch_{key}", logs[prefix + key])
            with self.train.as_default(step=epoch + 1):
                for key in ("learning_rate", "images_per_second"):
                    if key in logs:
                        tf.summary.scalar(key, logs[key])
                for weight in network.weights:
                    tf.summary.histogram(weight.path, device.to_numpy(weight.value))
            self.train.flush()
            self.validation.flush()

        def on_train_end(self, logs: Any = None) -> None:
            if confusion is not None:
                with self.validation.as_default(step=self.params.get("epochs", 0)):
                    tf.summary.image("confusion_matrix", confusion()[None])
            self.train.close()
            self.validation.close()

    return TensorBoardFiles()


def check_tracker(tracker: str | None) -> None:
    """Make sure that a tracker can work, before any training starts.

    Raises:
        PipelineError: The tracker is unknown, its package is not installed, or there is no key for it or no way to its
            server.
    """
    if tracker in (None, "none"):
        return
    if tracker != "wandb":
        raise PipelineError(f"tracker is {tracker!r}; known values: none, wandb.")
    if importlib.util.find_spec("wandb") is None:
        raise PipelineError("tracker=wandb needs the package wandb; run: pip install -r requirements-extras.txt")
    import wandb

    try:
        chosen = wandb.setup().settings  # of its own files and variables
    except Exception as error:  # wandb's own errors have no common class
        raise PipelineError(f"tracker=wandb cannot be set up ({first_line(error)}).") from None
    if chosen.mode in WANDB_OFFLINE:
        return
    try:
        known = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        known = {}
    if not chosen.api_key and urllib.parse.urlsplit(chosen.base_url).hostname not in known:
        raise PipelineError("tracker=wandb has no key; run: wandb login, or set WANDB_MODE=offline to keep it local.")
    _reach(chosen.base_url)


def _reach(address: str) -> None:
    """Raise `PipelineError` unless a server answers, whatever it says: wandb itself would try again for ever."""
    try:
        urllib.request.urlopen(address, timeout=SECONDS_TO_ANSWER).close()
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = first_line(getattr(error, "reason", error))
        raise PipelineError(f"tracker=wandb does not reach {address} ({reason}); set WANDB_MODE=offline.") from None


def wandb_callback(folder: Path, name: str, settings: dict[str, Any]) -> Any:
    """A Keras callback that logs each epoch to Weights & Biases; the same run goes on when training is resumed.

    Args:
        folder: The run's folder; offline files go to ``wandb/`` in it.
        name: The run's name.
        settings: The configuration it is logged with.
    """
    device.tensorflow()
    import keras
    import wandb

    class WeightsAndBiases(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            try:
                self.run = wandb.init(
                    project="gpu-image-pipeline",
                    name=name,
                    id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
                    resume=None if wandb.setup().settings.mode in WANDB_OFFLINE else "allow",
                    config=settings,
                    dir=str(folder),
                    reinit="finish_previous",
                    settings=wandb.Settings(silent=True, init_timeout=60),
                )
            except Exception as error:  # wandb's own errors have no common class
                raise PipelineError(
                    f"tracker=wandb could not start ({first_line(error)}); set WANDB_MODE=offline."
                ) from None

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.run.log({"epoch": epoch + 1, **(logs or {})}, step=epoch + 1)

        def on_train_end(self, logs: Any = None) -> None:
            self.run.finish()

        def on_train_failed(self) -> None:
            if getattr(self, "run", None) is not None:
                self.run.finish(exit_code=1)

    return WeightsAndBiases()


def end_failed(callbacks: Iterable[Any]) -> None:
    """Tell those that want to know (by a method ``on_train_failed``) that the training ended early."""
    for callback in callbacks:
        if hasattr(callback, "on_train_failed"):
            with contextlib.suppress(Exception):  # what ended the training is what is to be reported
                callback.on_train_failed()


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names with plain values, as TensorBoard's HParams page takes them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


class ProgressBar:
    """Epoch, images/s and time left: a bar on a terminal, one line an epoch elsewhere; nothing unless `shown`."""

    def __init__(self, epochs: int, images_an_epoch: int, first_epoch: int = 0, shown: bool = True):
        from tqdm import tqdm

        self.epochs, self.shown = epochs, shown
        self.on_terminal = shown and sys.stderr.isatty()
        self.bar = tqdm(
            total=epochs * images_an_epoch, initial=first_epoch * images_an_epoch, unit=" images", unit_scale=True,
            disable=not self.on_terminal, file=sys.stderr, leave=False, dynamic_ncols=True,
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
