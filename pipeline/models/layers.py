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


@keras.saving.register_keras_serializable("pipeline")
class ScaledConv2D(keras.layers.Conv2D):
    """A convolution followed by a frozen batch normalisation: [N, H, W, C] to [N, H', W', F].

    Each filter is multiplied by its `scale`, then `shift` is added; neither is trained. Scaling the filters instead of
    the feature maps gives the same outputs and gradients in less time.
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        super().build(input_shape)
        self.scale = self.add_weight(shape=(self.filters,), initializer="ones", trainable=False, name="scale")
        self.shift = self.add_weight(shape=(self.filters,), initializer="zeros", trainable=False, name="shift")

    # The functions of Conv2D save the kernel and the bias only.
    save_own_variables = keras.layers.Layer.save_own_variables
    load_own_variables = keras.layers.Layer.load_own_variables

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        return super().convolution_op(inputs, kernel * self.scale) + self.shift


@keras.saving.register_keras_serializable("pipeline")
class ScaledDepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """A depthwise convolution followed by a frozen batch normalisation, as in `ScaledConv2D`."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        super().build(input_shape)
        channels = (input_shape[-1],)
        self.scale = self.add_weight(shape=channels, initializer="ones", trainable=False, name="scale")
        self.shift = self.add_weight(shape=channels, initializer="zeros", trainable=False, name="shift")

    def call(self, inputs: Any) -> Any:
        kernel = self.kernel * keras.ops.expand_dims(self.scale, -1)
        return keras.ops.depthwise_conv(inputs, kernel, strides=self.strides, padding=self.padding) + self.shift
