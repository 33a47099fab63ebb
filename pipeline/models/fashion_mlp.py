"""`fashion_mlp`: dense layers with the custom Leaky ReLU and dropout; 784-128-64-10 on Fashion-MNIST.

Dropout follows Srivastava et al. (JMLR 2014), Leaky ReLU follows Maas et al. (ICML workshop on deep learning, 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from pipeline.core.settings import Fraction, PositiveInt


def build(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    hidden: Annotated[Sequence[PositiveInt], Field(min_length=1)] = (128, 64),
    dropout: Fraction = 0.2,
    negative_slope: float = 0.01,
    operations: str = "auto",
    alpha: float | None = None,
) -> Any:
    """Build the network under Keras's current dtype policy.

    Args:
        input_shape: (H, W, C) of the normalised images, any size.
        num_classes: K.
        hidden: Units of each hidden layer.
        dropout: Dropout rate after each hidden layer.
        negative_slope: Slope of the Leaky ReLU for negative values.
        operations: ``custom`` requires the custom Leaky ReLU, ``tensorflow`` uses TensorFlow's own. ``auto`` uses
            the custom one if it can be built and XLA does not compile the network.
        alpha: The former name of `negative_slope`, which the settings of older runs contain.

    Returns:
        A `keras.Model`: float [N, H, W, C] to float32 logits [N, K].
    """
    import keras

    from pipeline.ops.layers import LeakyReLU

    slope = negative_slope if alpha is None else alpha
    images = keras.Input(input_shape, name="images")
    x = keras.layers.Flatten(name="flatten")(images)
    for index, units in enumerate(hidden, start=1):
        x = keras.layers.Dense(units, kernel_initializer="he_normal", name=f"dense{index}")(x)
        x = LeakyReLU(slope, operations=operations, name=f"dense{index}_leaky_relu")(x)
        if dropout:
            x = keras.layers.Dropout(dropout, name=f"dense{index}_dropout")(x)
    # Logits are float32 under every policy: the exponentials of the loss overflow in float16.
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(x)
    return keras.Model(images, logits, name="network")
