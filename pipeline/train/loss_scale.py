"""Loss scaling and gradient clipping."""

from __future__ import annotations

from typing import Any

from pipeline.core import device


class GradientScaler:
    """Loss scaling and clipping of gradients, together one factor on them.

    With float16 activations the loss is multiplied by a scale, so that small gradients do not vanish (Micikevicius et
    al., Mixed Precision Training, 2018); it halves when a gradient overflows and doubles after `GROWTH_STEPS` steps
    without an overflow. The gradients of a step that overflowed become zero. Keras's `LossScaleOptimizer` branches
    instead, and at a branch the GPU waits for the host in every step.

    Args:
        optimizer: A Keras optimizer; its `global_clipnorm` is taken over from it.
        precision: The dtype policy's name; only ``mixed_float16`` scales the loss.
    """

    GROWTH_STEPS = 2000
    START = 2.0**13

    def __init__(self, optimizer: Any, precision: str):
        device.tensorflow()
        import keras

        self.clip_norm, optimizer.global_clipnorm = optimizer.global_clipnorm, None
        self.variables: list[Any] = []  # float32: TensorFlow keeps int32 variables in the host's memory
        if precision == "mixed_float16":
            self.scale = keras.Variable(self.START, trainable=False, dtype="float32", name="loss_scale")
            self.good_steps = keras.Variable(0.0, trainable=False, dtype="float32", name="steps_since_overflow")
            self.variables = [self.scale, self.good_steps]

    def scaled(self, loss: Any) -> Any:
        """The loss to differentiate, a float32 scalar."""
        return loss * self.scale.value if self.variables else loss

    def unscale_and_clip(self, gradients: list[Any]) -> list[Any]:
        """The gradients of the unscaled loss, clipped; zeros where any of them overflowed."""
        if not self.variables and self.clip_norm is None:
            return gradients
        tf = device.tensorflow()
        norm = tf.linalg.global_norm(gradients)
        if not self.variables:
            factor = self._clipping(norm)
            return [gradient * factor for gradient in gradients]
        scale, steps = self.scale.value, self.good_steps.value + 1.0
        finite, grow = tf.math.is_finite(norm), steps >= self.GROWTH_STEPS
        factor = tf.where(finite, self._clipping(norm / scale) / scale, 0.0)
        self.scale.assign(tf.where(finite, tf.where(grow, scale * 2.0, scale), tf.maximum(scale / 2.0, 1.0)))
        self.good_steps.assign(tf.where(tf.logical_and(finite, tf.logical_not(grow)), steps, 0.0))
        return [tf.math.multiply_no_nan(gradient, factor) for gradient in gradients]

    def _clipping(self, norm: Any) -> Any:
        """The factor that brings a norm down to `clip_norm` (Pascanu et al., 2013)."""
        tf = device.tensorflow()
        if self.clip_norm is None:
            return tf.constant(1.0)
        return tf.minimum(1.0, self.clip_norm / tf.maximum(norm, 1e-12))
