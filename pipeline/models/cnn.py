"""`cnn`: a plain convolutional network that trains CIFAR-10 in minutes on two CPU cores.

Blocks of 3×3 convolution, batch normalisation and ReLU with a max pooling between the widths, as in VGG (Simonyan and
Zisserman, 2015), global max pooling and one dense layer. The widest maps have the fewest filters, because on a CPU the
time goes where the map is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Keras's default momentum of 0.99 leaves validation at chance for the first hundreds of steps.
BATCH_NORMALIZATION_MOMENTUM = 0.9


def build(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    stages: Sequence[Sequence[int]] = ((32,), (64,), (128, 128), (256,)),
    dropout: float = 0.0,
) -> Any:
    """Build the network under Keras's current dtype policy.

    Args:
        input_shape: (H, W, C) of the normalised images; H and W at least 2 to the power of ``len(stages) - 1``.
        num_classes: K.
        stages: Filters of each convolution, one list a resolution; each resolution is half the one before.
        dropout: Fraction dropped before the last layer.

    Returns:
        A `keras.Model`: float [N, H, W, C] to float32 logits [N, K].

    Raises:
        PipelineError: The images are too small for that many stages, or the dropout is no fraction.
    """
    import keras

    from pipeline.core.errors import PipelineError, is_number

    smallest = 2 ** (len(stages) - 1)
    if min(input_shape[:2]) < smallest:
        raise PipelineError(
            f"cnn with {len(stages)} stages needs images of at least {smallest}×{smallest}, got "
            f"{input_shape[0]}×{input_shape[1]}; set image_size or fewer stages."
        )
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise PipelineError(f"cnn needs a dropout from 0 to below 1, got {dropout}.")
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
    # Logits in float32 whatever the policy: the loss's exponentials overflow in float16.
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(x)
    return keras.Model(images, logits, name="network")
