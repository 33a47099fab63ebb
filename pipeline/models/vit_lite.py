"""`vit_lite`: a Vision Transformer for small images, from 28×28 grey to 64×64 in colour.

Dosovitskiy et al. (An Image is Worth 16×16 Words, ICLR 2021) with patches of 4×4 and a width for small data: patches
become tokens by a convolution, learned positions are added, and blocks of pre-normalised attention and MLP follow. A
block's two branches are skipped at random for whole images in training (Huang et al., Deep Networks with Stochastic
Depth, ECCV 2016), the deeper the more often.
"""

from __future__ import annotations

from typing import Any

from pipeline.core.errors import PipelineError, is_number, is_whole

POOLINGS = ("class_token", "mean")


def build(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    patch: int = 4,
    depth: int = 6,
    heads: int = 4,
    width: int = 128,
    mlp_ratio: float = 2.0,
    pooling: str = "mean",
    dropout: float = 0.0,
    stochastic_depth: float = 0.1,
    approximate_gelu: bool = False,
    operations: str = "auto",
) -> Any:
    """Build the network under Keras's current dtype policy.

    Args:
        input_shape: (H, W, C) of the normalised images; H and W multiples of `patch`.
        num_classes: K.
        patch: Height and width of a patch in pixels.
        depth: Blocks.
        heads: Attention heads; a divisor of `width`.
        width: D, the length of a token.
        mlp_ratio: Units of the hidden layer of each block's MLP, as a multiple of `width`.
        pooling: ``class_token`` classifies by a learned token beside the patches, ``mean`` by the patches' mean.
        dropout: Fraction dropped of the embedded patches and of each branch's result in training.
        stochastic_depth: Probability with which the last block's branches are skipped in training; it rises linearly
            from 0 over the depth.
        approximate_gelu: The tanh form of the GELU (Hendrycks and Gimpel, 2016) instead of the exact one.
        operations: ``auto`` for TensorFlow's own operation where XLA compiles the network and for the project's
            elsewhere, where it can be built; ``custom`` to insist on the project's, ``tensorflow`` on TensorFlow's.

    Returns:
        A `keras.Model`: float [N, H, W, C] to float32 logits [N, K].

    Raises:
        PipelineError: Images that are not whole patches, or an option out of range.
    """
    import keras

    from pipeline.models.layers import ClassToken, Positions
    from pipeline.ops.layers import BiasGELU

    _check(input_shape, patch, depth, heads, width, mlp_ratio, pooling, dropout, stochastic_depth)
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
        skipped = stochastic_depth * block / max(depth - 1, 1)
        branch = keras.layers.LayerNormalization(epsilon=1e-6, name=f"{name}_attention_norm")(x)
        branch = keras.layers.MultiHeadAttention(
            heads, width // heads, flash_attention=False, name=f"{name}_attention"
        )(branch, branch)
        x = _joined(x, branch, dropout, skipped, f"{name}_attention")
        branch = keras.layers.LayerNormalization(epsilon=1e-6, name=f"{name}_mlp_norm")(x)
        # The bias of the first dense layer is added by the fused operation.
        branch = keras.layers.Dense(round(mlp_ratio * width), use_bias=False, name=f"{name}_mlp_expand")(branch)
        branch = BiasGELU(approximate=approximate_gelu, operations=operations, name=f"{name}_mlp_gelu")(branch)
        branch = keras.layers.Dense(width, name=f"{name}_mlp_project")(branch)
        x = _joined(x, branch, dropout, skipped, f"{name}_mlp")
    x = keras.layers.LayerNormalization(epsilon=1e-6, name="norm")(x)
    x = x[:, 0] if pooling == "class_token" else keras.layers.GlobalAveragePooling1D(name="mean")(x)
    # Logits in float32 whatever the policy: the loss's exponentials overflow in float16.
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(x)
    return keras.Model(images, logits, name="network")


def _joined(x: Any, branch: Any, dropout: float, skipped: float, name: str) -> Any:
    """Add a branch's result to the tokens; in training, without it for a fraction `skipped` of the images."""
    import keras

    if dropout:
        branch = keras.layers.Dropout(dropout, name=f"{name}_dropout")(branch)
    if skipped:
        # One draw for all tokens of an image; what is kept is scaled, so that nothing changes without training.
        branch = keras.layers.Dropout(skipped, noise_shape=(None, 1, 1), name=f"{name}_stochastic_depth")(branch)
    return keras.layers.Add(name=f"{name}_add")([x, branch])


def _check(
    input_shape: tuple[int, int, int],
    patch: int,
    depth: int,
    heads: int,
    width: int,
    mlp_ratio: float,
    pooling: str,
    dropout: float,
    stochastic_depth: float,
) -> None:
    for name, value in (("patch", patch), ("depth", depth), ("heads", heads), ("width", width)):
        if not is_whole(value) or value < 1:
            raise PipelineError(f"vit_lite needs a {name} that is a whole number of at least 1, got {value!r}.")
    if input_shape[0] % patch or input_shape[1] % patch:
        raise PipelineError(
            f"vit_lite needs images of whole patches of {patch}×{patch} pixels, got {input_shape[0]}×{input_shape[1]}; "
            "set image_size or patch."
        )
    if width % heads:
        raise PipelineError(f"vit_lite needs a width that its heads divide, got width={width} and heads={heads}.")
    if not is_number(mlp_ratio) or mlp_ratio * width < 1:
        raise PipelineError(f"vit_lite needs an mlp_ratio above 0, got {mlp_ratio}.")
    if pooling not in POOLINGS:
        raise PipelineError(f"vit_lite has no pooling {pooling!r}; known ones: {', '.join(POOLINGS)}.")
    for name, value in (("dropout", dropout), ("stochastic_depth", stochastic_depth)):
        if not is_number(value) or not 0 <= value < 1:
            raise PipelineError(f"vit_lite needs a {name} from 0 to below 1, got {value}.")
