"""`fashion_mlp`: two dense layers with the custom Leaky ReLU and dropout; 784-128-64-10 on Fashion-MNIST.

Dropout after Srivastava et al. (JMLR 2014), Leaky ReLU after Maas et al. (ICML workshop on deep learning, 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.core.errors import PipelineError, is_number


def build(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    hidden: Sequence[int] = (128, 64),
    dropout: float = 0.2,
    alpha: float = 0.01,
    operations: str = "auto",
) -> Any:
    """Build the network under Keras's current dtype policy.

    Args:
        input_shape: (H, W, C) of the normalised images, any size.
        num_classes: K.
        hidden: Units of each hidden layer.
        dropout: Fraction dropped after each hidden layer in training.
        alpha: Slope of the Leaky ReLU below zero.
        operations: ``auto`` for TensorFlow's own operation where XLA compiles the network and for the project's
            elsewhere, where it can be built; ``custom`` to insist on the project's, ``tensorflow`` on TensorFlow's.

    Returns:
        A `keras.Model`: float [N, H, W, C] to float32 logits [N, K].

    Raises:
        PipelineError: No hidden layer, or a dropout that is no fraction.
    """
    import keras

    from pipeline.ops.layers import LeakyReLU

    if not hidden or not all(isinstance(units, int) and units >= 1 for units in hidden):
        raise PipelineError(f"fashion_mlp needs hidden layers of at least one unit, got hidden={list(hidden)}.")
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise PipelineError(f"fashion_mlp needs a dropout from 0 to below 1, got {dropout}.")
    images = keras.Input(input_shape, name="images")
    x = keras.layers.Flatten(name="flatten")(images)
    for index, units in enumerate(hidden, start=1):
        x = keras.layers.Dense(units, kernel_initializer="he_normal", name=f"dense{index}")(x)
        x = LeakyReLU(alpha=alpha, operations=operations, name=f"dense{index}_leaky_relu")(x)
        if dropout:
            x = keras.layers.Dropout(dropout, name=f"dense{index}_dropout")(x)
    # Logits in float32 whatever the policy: the loss's exponentials overflow in float16.
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(x)
    return keras.Model(images, logits, name="network")
