"""`resnet18`: the 18-layer residual network of He et al. (Deep Residual Learning for Image Recognition, CVPR 2016).

Four stages of two basic blocks with 64, 128, 256 and 512 filters. The paper's ImageNet stem, for 224×224 pixels,
reduces the resolution by a factor of four. The CIFAR stem does not; at 32×32 it needs 15 times the arithmetic and
improves the accuracy by several percentage points.
"""

from __future__ import annotations

from typing import Any, Literal

from pipeline.models.cnn import BATCH_NORMALIZATION_MOMENTUM

WIDTHS = (64, 128, 256, 512)


def build(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    stem: Literal["cifar", "imagenet"] = "cifar",
    zero_gamma: bool = True,
) -> Any:
    """Build the network under Keras's current dtype policy.

    Args:
        input_shape: (H, W, C) of the normalised images.
        num_classes: K.
        stem: ``cifar`` (3×3, no pooling) or ``imagenet`` (7×7 with stride 2, then 3×3 max pooling with stride 2).
        zero_gamma: Initialise the last normalisation of each block with zero, so that every block starts as the
            identity. This makes the first steps at high learning rates stable (Goyal et al., Accurate, Large Minibatch
            SGD, 2017, section 5.1).

    Returns:
        A `keras.Model`: float [N, H, W, C] to float32 logits [N, K].
    """
    import keras

    images = keras.Input(input_shape, name="images")
    size, stride = (3, 1) if stem == "cifar" else (7, 2)
    x = _convolution(images, 64, size, stride, "stem")
    x = keras.layers.ReLU(name="stem_relu")(x)
    if stem == "imagenet":
        x = keras.layers.MaxPooling2D(3, strides=2, padding="same", name="stem_pool")(x)
    for stage, filters in enumerate(WIDTHS, start=1):
        for block in (1, 2):
            stride = 2 if stage > 1 and block == 1 else 1
            x = _basic_block(x, filters, stride, zero_gamma, f"stage{stage}_{block}")
    x = keras.layers.GlobalAveragePooling2D(name="global_pool")(x)
    # Logits are float32 under every policy: the exponentials of the loss overflow in float16.
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(x)
    return keras.Model(images, logits, name="network")


def _basic_block(x: Any, filters: int, stride: int, zero_gamma: bool, name: str) -> Any:
    """Two 3×3 convolutions and a shortcut, which is projected where the shape changes (option B of the paper)."""
    import keras

    shortcut = x
    x = _convolution(x, filters, 3, stride, f"{name}_a")
    x = keras.layers.ReLU(name=f"{name}_a_relu")(x)
    x = _convolution(x, filters, 3, 1, f"{name}_b", gamma="zeros" if zero_gamma else "ones")
    if stride != 1 or shortcut.shape[-1] != filters:
        shortcut = _convolution(shortcut, filters, 1, stride, f"{name}_shortcut")
    x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return keras.layers.ReLU(name=f"{name}_relu")(x)


def _convolution(x: Any, filters: int, size: int, stride: int, name: str, gamma: str = "ones") -> Any:
    """A convolution without bias, and batch normalisation, which would cancel a bias."""
    import keras

    options = {"padding": "same", "use_bias": False, "kernel_initializer": "he_normal"}
    x = keras.layers.Conv2D(filters, size, strides=stride, name=f"{name}_conv", **options)(x)
    momentum = BATCH_NORMALIZATION_MOMENTUM
    return keras.layers.BatchNormalization(momentum=momentum, gamma_initializer=gamma, name=f"{name}_norm")(x)
