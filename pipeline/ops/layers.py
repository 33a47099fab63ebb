"""Keras layers around the custom operations; importing this module registers them for loading.

It imports TensorFlow and Keras, so import it inside functions: ``from pipeline.ops import layers``.

Custom operations are a matter of training. A layer saves itself with ``operations="tensorflow"``, so a `.keras` file
and everything made from it (SavedModel, TFLite, TensorRT) holds TensorFlow's own operations, needs no compiler, and
gives the same numbers.
"""

from __future__ import annotations

from typing import Any

from pipeline import ops
from pipeline.core import device
from pipeline.core.errors import PipelineError

device.tensorflow()

import keras  # noqa: E402 - only after TensorFlow is prepared


class _WithOperation(keras.layers.Layer):
    """A layer that runs one of the project's operations, or TensorFlow's own.

    Args:
        operations: ``auto`` for the custom operation where it is available, ``custom`` to insist, ``tensorflow``.

    Raises:
        PipelineError: Another `operations`.
    """

    has_custom_operation = True

    def __init__(self, operations: str, **options: Any):
        super().__init__(**options)
        if operations not in ops.CHOICES:
            raise PipelineError(f"operations must be one of {', '.join(ops.CHOICES)}, got {operations!r}.")
        self.operations = operations
        self.supports_jit = operations == "tensorflow"  # Keras's own `fit` leaves XLA out then
        self.supports_masking = True

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "operations": "tensorflow"}


@keras.saving.register_keras_serializable("pipeline")
class LeakyReLU(_WithOperation):
    """`ops.leaky_relu` as a layer: any shape, in the layer's compute type.

    Args:
        alpha: The slope below zero.
        operations: ``auto``, ``custom`` or ``tensorflow``.
    """

    def __init__(self, alpha: float = 0.01, operations: str = "auto", **options: Any):
        super().__init__(operations, **options)
        self.alpha = float(alpha)

    def call(self, features: Any) -> Any:
        return ops.leaky_relu(features, self.alpha, operations=self.operations)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "alpha": self.alpha}


@keras.saving.register_keras_serializable("pipeline")
class BiasGELU(_WithOperation):
    """`ops.bias_gelu` as a layer that owns the bias: float [..., D] to [..., D]; it goes behind a dense layer without.

    Args:
        approximate: The form with tanh instead of the exact one.
        operations: ``auto``, ``custom`` or ``tensorflow``.
        bias_initializer: A Keras initializer, by name or object.
    """

    def __init__(
        self, approximate: bool = False, operations: str = "auto", bias_initializer: Any = "zeros", **options: Any
    ):
        super().__init__(operations, **options)
        self.approximate = bool(approximate)
        self.bias_initializer = keras.initializers.get(bias_initializer)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        if len(input_shape) == 0 or input_shape[-1] is None:
            raise PipelineError(f"BiasGELU needs to know the size of the last dimension, got shape {input_shape}.")
        self.bias = self.add_weight(shape=(input_shape[-1],), initializer=self.bias_initializer, name="bias")

    def call(self, features: Any) -> Any:
        bias = keras.ops.cast(self.bias, features.dtype)
        return ops.bias_gelu(features, bias, approximate=self.approximate, operations=self.operations)

    def get_config(self) -> dict[str, Any]:
        initializer = keras.initializers.serialize(self.bias_initializer)
        return {**super().get_config(), "approximate": self.approximate, "bias_initializer": initializer}
