"""`cnn`: a plain convolutional network that trains CIFAR-10 in minutes on two CPU cores.

Stages of 3×3 convolutions with batch normalisation and ReLU, separated by max pooling as in VGG (Simonyan and
Zisserman, 2015), then global max pooling and one dense layer. The first stages have few filters, because convolutions
of large feature maps take most of the time on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.settings import Fraction, PositiveInt

# With Keras's default momentum of 0.99, validation accuracy stays at chance for a few hundred steps.
BATCH_NORMALIZATION_MOMENTUM = 0.9


def build(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    stages: Sequence[Sequence[PositiveInt]] = ((32,), (64,), (128, 128), (256,)),
    dropout: Fraction = 0.0,
) -> Any:
    """Build the network under Keras's current dtype policy.

    Args:
        input_shape: (H, W, C) of the normalised images; H and W at least 2 to the power of ``len(stages) - 1``.
        num_classes: K.
        stages: Filters of each convolution, one list per stage; each stage has half the resolution of the previous one.
        dropout: Dropout rate before the last layer.

    Returns:
        A `keras.Model`: float [N, H, W, C] to float32 logits [N, K].

    Raises:
        PipelineError: The images are too small for the number of stages.
    """
    import keras

    smallest = 2 ** (len(stages) - 1)
    if min(input_shape[:2]) < smallest:
        raise PipelineError(
            f"cnn with {len(stages)} stages needs images of at least {smallest}×{smallest}, got "
            f"{input_shape[0]}×{input_shape[1]}; set image_size or fewer stages."
        )
    images = keras.Input(input_shape, name="images")
    x = images
    for stage, widths in enumerate(stages):
        if stage > 0:
            x = keras.layers.MaxPooling2D(name=f"pool{stage}")(x)
        for index, filters in enumerate(widths):
            name = f"stage{stage + 1}_{index + 1}"
            x = keras.layers.Conv2D(
                filters, 3, padding="same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv"
            )(x)
            x = keras.layers.BatchNormalization(momentum=BATCH_NORMALIZATION_MOMENTUM, name=f"{name}_norm")(x)
            x = keras.layers.ReLU(name=f"{name}_relu")(x)
    x = keras.layers.GlobalMaxPooling2D(name="global_pool")(x)
    if dropout:
        x = keras.layers.Dropout(dropout, name="dropout")(x)
    # Logits are float32 under every policy: the exponentials of the loss overflow in float16.
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(x)
    return keras.Model(images, logits, name="network")
