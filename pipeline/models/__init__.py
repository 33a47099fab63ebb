"""Build networks by name, and the deployable graph that contains them.

    network = models.build("cnn", input_shape=(32, 32, 3), num_classes=10)   # normalised images to logits
    deployable = models.deployable(network, mean, std)                       # uint8 images to probabilities

Each network is one module with a function `build`, listed in `NETWORKS`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line
from pipeline.core.settings import settings_error

NETWORKS = {name: f"pipeline.models.{name}" for name in ("cnn", "fashion_mlp", "pretrained", "resnet18", "vit_lite")}
LAYERS = ["pipeline.models.layers", "pipeline.ops.layers"]  # importing one registers its layers for loading


def build(name: str, input_shape: tuple[int, int, int], num_classes: int, **options: Any) -> Any:
    """Build a network under Keras's current dtype policy.

    Args:
        name: A key of `NETWORKS`.
        input_shape: (H, W, C) of the normalised images.
        num_classes: K, the number of logits.
        **options: Keyword arguments of the network's own `build` (widths, dropout, …), checked against its type
            annotations.

    Returns:
        A `keras.Model` named ``network``: float [N, H, W, C] to float32 logits [N, K].

    Raises:
        PipelineError: The name or an option is unknown, an option has a wrong value, the network does not support the
            image size, or there are fewer than two classes.
    """
    import pydantic

    device.tensorflow()
    if name not in NETWORKS:
        raise PipelineError(f"There is no network {name!r}; known networks: {', '.join(NETWORKS)}.")
    if num_classes < 2:
        raise PipelineError(f"A classifier needs at least 2 classes, got {num_classes}.")
    function = importlib.import_module(NETWORKS[name]).build
    known = [key for key, value in inspect.signature(function).parameters.items() if value.kind is value.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise PipelineError(f"The network {name} has no option {option!r}; its options: {', '.join(known)}.")
    validated = pydantic.validate_call(function, config={"strict": True, "allow_inf_nan": False})
    try:
        network = validated(tuple(input_shape), num_classes, **options)
    except pydantic.ValidationError as error:
        raise settings_error(error, "model") from error
    if network.name != "network":
        raise PipelineError(f"{NETWORKS[name]} must name its keras.Model 'network', got {network.name!r}.")
    return network


def normalisation(
    name: str, options: Mapping[str, Any], channels: int = 3
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The mean and the standard deviation that a network was pretrained with.

    Args:
        name: A key of `NETWORKS`.
        options: The keyword arguments of `build`.
        channels: Number of channels of the images.

    Returns:
        Mean and standard deviation per channel, in units of pixel / 255, or None for a network without pretrained
        weights, whose images are normalised with the statistics of the training split.
    """
    function = getattr(importlib.import_module(NETWORKS[name]), "normalisation", None)
    return None if function is None else function(options, channels)


def init_from(network: Any, other: Any, *, head: bool = True) -> list[str]:
    """Copy the weights of another network into the layers with the same name and shapes.

    Args:
        network: From `build`; changed in place.
        other: The network of another run, such as ``run.load_model().get_layer("network")``.
        head: Copy the last layer too, if its shapes match. False: the classes are others.

    Returns:
        Names of the layers with weights that were not copied.

    Raises:
        PipelineError: No layer but the last one has a counterpart in `other`.
    """
    targets, sources = _layers(network), _layers(other)
    if not head:
        sources.pop(network.layers[-1].name, None)
    new = []
    for name, layer in targets.items():
        weights = sources[name].get_weights() if name in sources else []
        if [array.shape for array in weights] == [tuple(variable.shape) for variable in layer.weights]:
            layer.set_weights(weights)
        else:
            new.append(name)
    if not set(targets) - {network.layers[-1].name, *new}:
        raise PipelineError(
            "init=… needs a run with the same model and layer sizes; no layer of the two networks matches."
        )
    return new


def _layers(network: Any) -> dict[str, Any]:
    """The layers with weights by name; those of a nested model have its name as prefix."""
    import keras

    layers = {}
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            layers.update({f"{layer.name}/{name}": inner for name, inner in _layers(layer).items()})
        elif layer.weights:
            layers[layer.name] = layer
    return layers


def deployable(network: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Build the graph that is saved, exported and served: normalisation, network, softmax.

    Args:
        network: From `build`.
        mean: Per-channel mean that the images are normalised with, in units of pixel / 255.
        std: Per-channel standard deviation, in the same units.

    Returns:
        A `keras.Model`: uint8 [N, H, W, C] to float32 probabilities [N, K]; `network` is its layer ``network``.
    """
    import keras

    pixels = keras.Input(network.input_shape[1:], dtype="uint8", name="pixels")
    images = keras.layers.Rescaling(1 / 255, dtype="float32", name="rescale")(pixels)
    variance = [stddev**2 for stddev in std]
    images = keras.layers.Normalization(mean=list(mean), variance=variance, dtype="float32", name="normalise")(images)
    probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(network(images))
    return keras.Model(pixels, probabilities, name="classifier")


def load(path: str | Path) -> Any:
    """Read a `model.keras` written by training.

    Returns:
        The `keras.Model` of `deployable`: uint8 [N, H, W, C] to float32 probabilities [N, K].

    Raises:
        PipelineError: The file is missing or damaged.
    """
    device.tensorflow()
    import keras

    for module in LAYERS:
        importlib.import_module(module)
    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:  # the zip, JSON and HDF5 readers of Keras raise many types
        raise PipelineError(f"Keras cannot read {path} ({type(error).__name__}: {first_line(error)}).") from error
