"""Networks by name, from normalised images to logits, and the deployable graph around them.

    network = models.build("cnn", input_shape=(32, 32, 3), num_classes=10)
    deployable = models.deployable(network, mean, std)     # uint8 in, probabilities out

A network is one file here with one function, and a line in `NETWORKS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line

NETWORKS = {name: f"pipeline.models.{name}" for name in ("cnn", "resnet18", "fashion_mlp", "vit_lite")}
LAYERS = ["pipeline.models.layers", "pipeline.ops.layers"]  # importing one registers its layers for loading


def names() -> list[str]:
    """The networks that `build` knows."""
    return sorted(NETWORKS)


def build(name: str, input_shape: tuple[int, int, int], num_classes: int, **options: Any) -> Any:
    """Build a network under Keras's current dtype policy.

    Args:
        name: One of `names()`.
        input_shape: (H, W, C) of the normalised images.
        num_classes: K, the number of logits.
        **options: What the network's own `build` takes (widths, dropout, …).

    Returns:
        A `keras.Model` named ``network``: float [N, H, W, C] to float32 logits [N, K].

    Raises:
        PipelineError: An unknown name or option, a bad shape, or fewer than two classes.
    """
    device.tensorflow()
    if name not in NETWORKS:
        raise PipelineError(f"There is no network {name!r}; known ones: {', '.join(names())}.")
    if num_classes < 2:
        raise PipelineError(f"A classifier needs at least 2 classes, got {num_classes}.")
    if len(input_shape) != 3 or input_shape[2] not in (1, 3):
        raise PipelineError(f"input_shape must be (height, width, 1 or 3), got {tuple(input_shape)}.")
    module = importlib.import_module(NETWORKS[name])
    try:
        network = module.build(tuple(input_shape), num_classes, **options)
    except (TypeError, ValueError) as error:
        raise PipelineError(f"The network {name} does not take these options ({first_line(error)}).") from None
    if network.name != "network":
        raise PipelineError(
            f"{NETWORKS[name]} names its model {network.name!r}; it must be keras.Model(name='network')."
        )
    return network


def deployable(network: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Wrap a network into the graph that is saved, exported and served.

    Args:
        network: From `build`.
        mean: Per-channel mean of the training split, in units of pixel / 255.
        std: Per-channel standard deviation, same units.

    Returns:
        A `keras.Model`: uint8 [N, H, W, C] to float32 probabilities [N, K]; the network is its layer ``network``.
    """
    import keras

    pixels = keras.Input(network.input_shape[1:], dtype="uint8", name="pixels")
    images = keras.layers.Rescaling(1 / 255, dtype="float32", name="rescale")(pixels)
    variance = [deviation**2 for deviation in std]
    images = keras.layers.Normalization(mean=list(mean), variance=variance, dtype="float32", name="normalise")(images)
    probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(network(images))
    return keras.Model(pixels, probabilities, name="classifier")


def load(path: str | Path) -> Any:
    """Read a `model.keras` written by training.

    Raises:
        PipelineError: The file is missing, truncated or no Keras model.
    """
    device.tensorflow()
    import keras

    if not Path(path).is_file():
        raise PipelineError(f"There is no model file {path}.")
    for module in LAYERS:
        importlib.import_module(module)
    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras raises whatever its zip, JSON and HDF5 readers raise
        raise PipelineError(
            f"{path} is no readable Keras model ({type(error).__name__}: {first_line(error)})."
        ) from None
