"""Builds what training needs from the settings: network, optimizer, precision, XLA, seed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

from pipeline import augment, models
from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.train import cluster, optimizers
from pipeline.train.loop import SINGLE, Loop


def build_network(options: dict[str, Any], dataset: Any) -> Any:
    """The network that the settings' group ``model`` names, for a data set's images and classes."""
    others = {key: value for key, value in options.items() if key != "name"}
    return models.build(options["name"], dataset.image_shape, dataset.num_classes, **others)


def build_loop(settings: dict[str, Any], dataset: Any, workers: cluster.Cluster = SINGLE) -> Loop:
    """The network, its optimizer and the loop that trains it, for one data set and the workers that share it."""
    precision = resolve_precision(settings["precision"])
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
        xla=resolve_xla(settings["xla"], precision, network),
        workers=workers,
    )


def resolve_xla(xla: bool | str, precision: str, network: Any) -> bool | str:
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


def build_deployable(loop: Loop, settings: dict[str, Any], dataset: Any) -> Any:
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


def resolve_precision(precision: str) -> str:
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
