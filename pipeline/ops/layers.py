"""Keras layers around the custom operations; importing this module registers them for loading.

It imports TensorFlow and Keras, so import it inside functions: ``from pipeline.ops import layers``.

Custom operations are used only for training. A layer is saved with ``operations="tensorflow"``, so a `.keras` file and
every export contains TensorFlow's own operations and needs no compiler.
"""

from __future__ import annotations

from typing import Any

from pipeline import ops
from pipeline.core import device

device.tensorflow()

import keras  # noqa: E402 - only after TensorFlow is prepared


class _WithOperation(keras.layers.Layer):
    """Base class: a layer that runs a custom operation or TensorFlow's own, as `operations` of `ops.leaky_relu`."""

    has_custom_operation = True

    def __init__(self, operations: str, **options: Any):
        super().__init__(**options)
        self.operations = ops.check_choice(operations)
        self.supports_jit = operations == "tensorflow"  # otherwise Keras `fit` does not use XLA
        self.supports_masking = True

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "operations": "tensorflow"}


@keras.saving.register_keras_serializable("pipeline")
class LeakyReLU(_WithOperation):
    """`ops.leaky_relu` as a layer for any shape, in the layer's compute dtype.

    Args:
        negative_slope: The slope for negative values.
        operations: ``auto``, ``custom`` or ``tensorflow``.
        alpha: The former name of `negative_slope`, which older `.keras` files contain.
    """

    def __init__(
        self, negative_slope: float = 0.01, operations: str = "auto", alpha: float | None = None, **options: Any
    ):
        super().__init__(operations, **options)
        self.negative_slope = float(negative_slope if alpha is None else alpha)

    def call(self, features: Any) -> Any:
        return ops.leaky_relu(features, self.negative_slope, operations=self.operations)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "negative_slope": self.negative_slope}


@keras.saving.register_keras_serializable("pipeline")
class BiasGELU(_WithOperation):
    """`ops.bias_gelu` as a layer that has the bias as its weight: float [..., D] to [..., D].

    Use it after a `Dense` layer with ``use_bias=False``.

    Args:
        approximate: Use the approximation with tanh.
        operations: ``auto``, ``custom`` or ``tensorflow``.
        bias_initializer: A Keras initializer or its name.
    """

    def __init__(
        self, approximate: bool = False, operations: str = "auto", bias_initializer: Any = "zeros", **options: Any
    ):
        super().__init__(operations, **options)
        self.approximate = bool(approximate)
        self.bias_initializer = keras.initializers.get(bias_initializer)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.bias = self.add_weight(shape=(input_shape[-1],), initializer=self.bias_initializer, name="bias")

    def call(self, features: Any) -> Any:
        bias = keras.ops.cast(self.bias, features.dtype)
        return ops.bias_gelu(features, bias, approximate=self.approximate, operations=self.operations)

    def get_config(self) -> dict[str, Any]:
        initializer = keras.initializers.serialize(self.bias_initializer)
        return {**super().get_config(), "approximate": self.approximate, "bias_initializer": initializer}
