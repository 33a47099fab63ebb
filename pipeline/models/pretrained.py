"""`pretrained`: a backbone with ImageNet weights and a new head, for datasets of a few hundred photos.

The bundled backbones are EfficientNet-Lite 0 to 2. Every network of `keras.applications` works too, if Keras can
download its weights or ``model.weights`` names a local file.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.core.errors import PipelineError, first_line
from pipeline.core.settings import Fraction, PositiveInt
from pipeline.models import efficientnet_lite

BACKBONE = "efficientnet_lite0"

# Native sizes of the networks of keras.applications that were not trained with 224×224 pixels.
_IMAGE_SIZES = {
    "InceptionResNetV2": 299, "InceptionV3": 299, "NASNetLarge": 331, "Xception": 299,
    "EfficientNetB1": 240, "EfficientNetB2": 260, "EfficientNetB3": 300, "EfficientNetB4": 380, "EfficientNetB5": 456,
    "EfficientNetB6": 528, "EfficientNetB7": 600, "EfficientNetV2B1": 240, "EfficientNetV2B2": 260,
    "EfficientNetV2B3": 300, "EfficientNetV2S": 384, "EfficientNetV2M": 480, "EfficientNetV2L": 480,
}  # fmt: skip

# The part of a layer's name that names its block: block3_…, block_3_…, block3a_…, conv5_block3_…, expanded_conv_3_….
_BLOCK = re.compile(r"(.*block_?\d+[a-z]?|expanded_conv(?:_\d+)?)_")


def build(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    backbone: str = BACKBONE,
    image_size: PositiveInt | None = None,
    weights: str | None = "imagenet",
    trainable: Literal["head", "all"] | PositiveInt = "all",
    dropout: Fraction = 0.2,
) -> Any:
    """Build the network under Keras's current dtype policy.

    Batch normalisation in a backbone with pretrained weights keeps the statistics of ImageNet: with new statistics, the
    accuracy on 400 photos was 2 percentage points lower after as many epochs.

    Args:
        input_shape: (H, W, C) of the images, normalised as `normalisation` says. Grey images get three equal channels.
        num_classes: K.
        backbone: A key of `efficientnet_lite.VARIANTS` or a name in `keras.applications`.
        image_size: Height and width in pixels to which images are resized (bilinear); None: the backbone's native size.
        weights: ``imagenet``, the path of a file with weights of the backbone (a PyTorch file for EfficientNet-Lite,
            otherwise a file of Keras), or None for random weights.
        trainable: ``head``: only the last layer; ``all``: all layers; N: the last N blocks of the backbone and the
            head.
        dropout: Dropout rate before the head.

    Returns:
        A `keras.Model`: float [N, H, W, C] to float32 logits [N, K]. Its layers include ``backbone`` (a model),
        ``features`` (global average pooling, [N, D]) and ``head``.

    Raises:
        PipelineError: The backbone is unknown, its weights cannot be loaded, or it has fewer than N blocks.
    """
    import keras

    _check_name(backbone)
    size = image_size or _native_size(backbone)
    images = keras.Input(input_shape, name="images")
    x = images
    if input_shape[2] == 1:
        x = keras.layers.Concatenate(name="rgb")([x, x, x])
    elif input_shape[2] != 3:
        raise PipelineError(f"pretrained needs images with 1 or 3 channels, got {input_shape[2]}.")
    if tuple(input_shape[:2]) != (size, size):
        x = keras.layers.Resizing(size, size, interpolation="bilinear", name="resize")(x)
    if backbone in efficientnet_lite.VARIANTS:
        inner = efficientnet_lite.build(backbone, size, weights=weights)
    else:
        x = _preprocess(x, backbone)
        inner = _keras_application(backbone, size, weights)
    _set_trainable(inner, backbone, trainable, pretrained=weights is not None)
    x = keras.layers.GlobalAveragePooling2D(name="features")(inner(x))
    if dropout:
        x = keras.layers.Dropout(dropout, name="dropout")(x)
    # Logits are float32 under every policy: the exponentials of the loss overflow in float16.
    logits = keras.layers.Dense(num_classes, dtype="float32", name="head")(x)
    return keras.Model(images, logits, name="network")


def normalisation(options: Mapping[str, Any], channels: int = 3) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation that the input of the network must be normalised with.

    Args:
        options: The options of `build`.
        channels: Number of channels of the images.

    Returns:
        Mean and standard deviation per channel, in units of pixel / 255. Networks of `keras.applications` expect
        pixels from −1 to 1; `build` adds the rest of their preprocessing.
    """
    bundled = options.get("backbone", BACKBONE) in efficientnet_lite.VARIANTS
    mean, std = (efficientnet_lite.MEAN, efficientnet_lite.STD) if bundled else (0.5, 0.5)
    return (mean,) * channels, (std,) * channels


def _applications() -> dict[str, Any]:
    """The functions of `keras.applications` by name."""
    import keras

    return dict(inspect.getmembers(keras.applications, inspect.isfunction))


def _check_name(backbone: str) -> None:
    known = [*efficientnet_lite.VARIANTS, *_applications()]
    if backbone not in known:
        near = difflib.get_close_matches(backbone, known, n=1)
        hint = f"did you mean {near[0]!r}" if near else "or a name in keras.applications, such as MobileNetV3Small"
        bundled = ", ".join(efficientnet_lite.VARIANTS)
        raise PipelineError(
            f"Expected model.backbone to be {bundled} or a name in keras.applications, got {backbone!r}; {hint}?"
        )


def _native_size(backbone: str) -> int:
    if backbone in efficientnet_lite.VARIANTS:
        return efficientnet_lite.VARIANTS[backbone].image_size
    return _IMAGE_SIZES.get(backbone, 224)


def _preprocess(x: Any, backbone: str) -> Any:
    """The preprocessing of a network of `keras.applications`, for images from −1 to 1."""
    import keras

    preprocess = sys.modules[_applications()[backbone].__module__].preprocess_input
    probe = np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 2, 2, 3)
    if np.allclose(preprocess(probe * 127.5 + 127.5), probe, atol=1e-6):
        return x
    # Pixels up to 255 need float32: float16 has eleven bits.
    return preprocess(keras.layers.Rescaling(127.5, offset=127.5, dtype="float32", name="pixels")(x))


def _keras_application(backbone: str, size: int, weights: str | None) -> Any:
    """Build a network of `keras.applications` without its classifier."""
    if weights not in (None, "imagenet") and not Path(weights).expanduser().is_file():
        raise PipelineError(f"Expected model.weights to be imagenet, null or a file, got {weights!r}.")
    local = weights if weights in (None, "imagenet") else str(Path(weights).expanduser())
    try:
        network = _applications()[backbone](include_top=False, weights=local, input_shape=(size, size, 3))
    except Exception as error:  # Keras raises Exception for failed downloads, and many types for files and sizes
        bundled = ", ".join(efficientnet_lite.VARIANTS)
        if weights == "imagenet" and "URL fetch failure" in str(error):
            raise PipelineError(
                f"The weights of {backbone} cannot be downloaded ({first_line(error)}); set model.backbone to one "
                f"with installed weights ({bundled}), or model.weights to a local file."
            ) from error
        raise PipelineError(
            f"Keras cannot build {backbone} with model.image_size={size} and model.weights={weights!r} "
            f"({first_line(error)})."
        ) from error
    network.name = "backbone"  # the argument name selects the architecture of EfficientNetV2
    return network


def _set_trainable(inner: Any, backbone: str, trainable: str | int, *, pretrained: bool) -> None:
    """Freeze the layers of the backbone that `trainable` excludes, and batch normalisation with pretrained weights."""
    import keras

    if trainable == "head":
        inner.trainable = False
        return
    if trainable != "all":
        matches = [_BLOCK.match(layer.name) for layer in inner.layers]
        blocks = list(dict.fromkeys(match[1] for match in matches if match))
        if trainable > len(blocks):
            raise PipelineError(
                f"Expected model.trainable to be head, all or at most {len(blocks)}, the number of named blocks of "
                f"{backbone}, got {trainable}."
            )
        chosen = blocks[-trainable:]
        first = next(index for index, match in enumerate(matches) if match and match[1] in chosen)
        for layer in inner.layers[:first]:
            layer.trainable = False
    if pretrained:
        for layer in inner.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
