"""The networks' own Keras layers; importing this module registers them for loading.

It imports TensorFlow and Keras, so import it inside functions: ``from pipeline.models import layers``.
"""

from __future__ import annotations

from typing import Any

from pipeline.core import device

device.tensorflow()

import keras  # noqa: E402 - only after TensorFlow is prepared

_INITIALIZER_STDDEV = 0.02  # Dosovitskiy et al., 2021


@keras.saving.register_keras_serializable("pipeline")
class ClassToken(keras.layers.Layer):
    """Prepend a learned token (Devlin et al., 2019): [N, T, D] to [N, T + 1, D]."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.token = self.add_weight(shape=(1, 1, input_shape[-1]), initializer="zeros", name="token")

    def call(self, tokens: Any) -> Any:
        token = keras.ops.cast(self.token, tokens.dtype)
        first = keras.ops.broadcast_to(token, (keras.ops.shape(tokens)[0], 1, tokens.shape[-1]))
        return keras.ops.concatenate([first, tokens], axis=1)


@keras.saving.register_keras_serializable("pipeline")
class Positions(keras.layers.Layer):
    """Add a learned vector to the token at each position: [N, T, D] to [N, T, D]."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        initializer = keras.initializers.TruncatedNormal(stddev=_INITIALIZER_STDDEV)
        self.positions = self.add_weight(shape=(1, *input_shape[1:]), initializer=initializer, name="positions")

    def call(self, tokens: Any) -> Any:
        return tokens + keras.ops.cast(self.positions, tokens.dtype)
