"""`vit_lite`: a Vision Transformer for small images, from 28×28 grey to 64×64 in colour.

Follows Dosovitskiy et al. (An Image is Worth 16×16 Words, ICLR 2021), with 4×4 patches and fewer parameters: a
convolution turns patches into tokens, learned positions are added, and blocks of pre-normalised attention and MLP
follow. Stochastic depth (Huang et al., Deep Networks with Stochastic Depth, ECCV 2016) skips branches of a block for
randomly chosen images in training.
"""

from __future__ import annotations

from typing import Any, Literal

from pipeline.core.errors import PipelineError
from pipeline.core.settings import Fraction, PositiveFloat, PositiveInt


def build(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    patch: PositiveInt = 4,
    depth: PositiveInt = 6,
    heads: PositiveInt = 4,
    width: PositiveInt = 128,
    mlp_ratio: PositiveFloat = 2.0,
    pooling: Literal["mean", "class_token"] = "mean",
    dropout: Fraction = 0.0,
    stochastic_depth: Fraction = 0.1,
    approximate_gelu: bool = False,
    operations: str = "auto",
) -> Any:
    """Build the network under Keras's current dtype policy.

    Args:
        input_shape: (H, W, C) of the normalised images; H and W multiples of `patch`.
        num_classes: K.
        patch: Height and width of a patch in pixels.
        depth: Number of blocks.
        heads: Number of attention heads; a divisor of `width`.
        width: D, the length of a token.
        mlp_ratio: Units of the hidden layer of each block's MLP, as a multiple of `width`.
        pooling: ``class_token`` classifies by a learned token, ``mean`` by the mean of the patches' tokens.
        dropout: Dropout rate of the embedded patches and of the output of each branch.
        stochastic_depth: Probability of skipping a branch of the last block in training; it rises linearly from 0 at
            the first block.
        approximate_gelu: Use the GELU approximation with tanh (Hendrycks and Gimpel, 2016).
        operations: ``custom`` requires the custom bias-GELU, ``tensorflow`` uses TensorFlow's own. ``auto`` uses
            the custom one if it can be built and XLA does not compile the network.

    Returns:
        A `keras.Model`: float [N, H, W, C] to float32 logits [N, K].

    Raises:
        PipelineError: `patch` does not divide the image size, or `heads` does not divide `width`.
    """
    import keras

    from pipeline.models.layers import ClassToken, Positions
    from pipeline.ops.layers import BiasGELU

    if input_shape[0] % patch or input_shape[1] % patch:
        raise PipelineError(
            f"vit_lite needs an image size divisible by patch={patch}, got {input_shape[0]}×{input_shape[1]}; set "
            "image_size or patch."
        )
    if width % heads:
        raise PipelineError(f"vit_lite needs a width divisible by heads, got width={width} and heads={heads}.")
    count = (input_shape[0] // patch) * (input_shape[1] // patch)
    images = keras.Input(input_shape, name="images")
    x = keras.layers.Conv2D(width, patch, strides=patch, name="patches_conv")(images)
    x = keras.layers.Reshape((count, width), name="patches")(x)
    if pooling == "class_token":
        x = ClassToken(name="class_token")(x)
    x = Positions(name="positions")(x)
    if dropout:
        x = keras.layers.Dropout(dropout, name="patches_dropout")(x)
    for block in range(depth):
        name = f"block{block + 1}"
        skip_rate = stochastic_depth * block / max(depth - 1, 1)
        branch = keras.layers.LayerNormalization(epsilon=1e-6, name=f"{name}_attention_norm")(x)
        branch = keras.layers.MultiHeadAttention(
            heads, width // heads, flash_attention=False, name=f"{name}_attention"
        )(branch, branch)
        x = _add_branch(x, branch, dropout, skip_rate, f"{name}_attention")
        branch = keras.layers.LayerNormalization(epsilon=1e-6, name=f"{name}_mlp_norm")(x)
        # BiasGELU adds the bias of this dense layer.
        branch = keras.layers.Dense(round(mlp_ratio * width), use_bias=False, name=f"{name}_mlp_expand")(branch)
        branch = BiasGELU(approximate=approximate_gelu, operations=operations, name=f"{name}_mlp_gelu")(branch)
        branch = keras.layers.Dense(width, name=f"{name}_mlp_project")(branch)
        x = _add_branch(x, branch, dropout, skip_rate, f"{name}_mlp")
    x = keras.layers.LayerNormalization(epsilon=1e-6, name="norm")(x)
    x = x[:, 0] if pooling == "class_token" else keras.layers.GlobalAveragePooling1D(name="mean")(x)
    # Logits are float32 under every policy: the exponentials of the loss overflow in float16.
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(x)
    return keras.Model(images, logits, name="network")


def _add_branch(x: Any, branch: Any, dropout: float, skip_rate: float, name: str) -> Any:
    """Add the output of a branch to the tokens; in training, skip it for a fraction `skip_rate` of the images."""
    import keras

    if dropout:
        branch = keras.layers.Dropout(dropout, name=f"{name}_dropout")(branch)
    if skip_rate:
        # One random number for all tokens of an image. Dropout scales the other images' branches by 1 / (1 - rate).
        branch = keras.layers.Dropout(skip_rate, noise_shape=(None, 1, 1), name=f"{name}_stochastic_depth")(branch)
    return keras.layers.Add(name=f"{name}_add")([x, branch])
