"""Loss scaling and gradient clipping that never make the GPU wait for the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.core import device


class GradientScaler:
    """Applies gradients to the variables, after clipping and, with float16, after undoing the loss scale.

    With float16 activations the loss is multiplied by a scale, so that small gradients do not vanish (Micikevicius et
    al., Mixed Precision Training, 2018). If the gradients of a step overflow, the step only halves the scale.
    After `GROWTH_STEPS` steps without an overflow, the scale doubles. Keras's `LossScaleOptimizer` skips a step with a
    branch, for which the GPU waits for the host in every step; this class selects the old or the new value of each
    variable instead.

    Args:
        optimizer: A Keras optimizer; this class replaces its `global_clipnorm`, which is set to None.
        precision: Name of the dtype policy; only ``mixed_float16`` scales the loss.
    """

    GROWTH_STEPS = 2000
    START = 2.0**13

    def __init__(self, optimizer: Any, precision: str):
        device.tensorflow()
        import keras

        self.clip_norm, optimizer.global_clipnorm = optimizer.global_clipnorm, None
        self.variables: list[Any] = []  # float32: TensorFlow keeps int32 variables in host memory
        if precision == "mixed_float16":
            self.scale = keras.Variable(self.START, trainable=False, dtype="float32", name="loss_scale")
            self.good_steps = keras.Variable(0.0, trainable=False, dtype="float32", name="steps_since_overflow")
            self.variables = [self.scale, self.good_steps]

    def scaled(self, loss: Any) -> Any:
        """The loss to differentiate, a float32 scalar."""
        return loss * self.scale.value if self.variables else loss

    def apply(
        self,
        optimizer: Any,
        gradients: list[Any],
        variables: Sequence[Any],
        moving: Sequence[Any] = (),
        moving_before: Sequence[Any] = (),
    ) -> None:
        """Do one optimisation step.

        Args:
            optimizer: The Keras optimizer.
            gradients: Gradients of the scaled loss, one per variable.
            variables: The variables of the gradients, in the same order.
            moving: Variables that the forward pass has updated already, such as the statistics of normalisation.
            moving_before: The values of `moving` before the forward pass.
        """
        if not self.variables:
            optimizer.apply(self._clip(gradients), variables)
            return
        tf = device.tensorflow()
        changed = [*variables, *optimizer.variables, *moving]
        before = [*(tf.identity(v.value) for v in [*variables, *optimizer.variables]), *moving_before]
        gradients, finite = self._unscale_and_clip(gradients)
        optimizer.apply(gradients, variables)
        for variable, old in zip(changed, before, strict=True):
            variable.assign(tf.where(finite, variable.value, old))

    def _clip(self, gradients: list[Any]) -> list[Any]:
        if self.clip_norm is None:
            return gradients
        factor = self._clipping(device.tensorflow().linalg.global_norm(gradients))
        return [gradient * factor for gradient in gradients]

    def _unscale_and_clip(self, gradients: list[Any]) -> tuple[list[Any], Any]:
        """The clipped gradients of the unscaled loss, and whether all are finite; updates the scale."""
        tf = device.tensorflow()
        norm, scale, steps = tf.linalg.global_norm(gradients), self.scale.value, self.good_steps.value + 1.0
        finite, grow = tf.math.is_finite(norm), steps >= self.GROWTH_STEPS
        factor = tf.where(finite, self._clipping(norm / scale) / scale, 0.0)
        self.scale.assign(tf.where(finite, tf.where(grow, scale * 2.0, scale), tf.maximum(scale / 2.0, 1.0)))
        self.good_steps.assign(tf.where(tf.logical_and(finite, tf.logical_not(grow)), steps, 0.0))
        return [tf.math.multiply_no_nan(gradient, factor) for gradient in gradients], finite

    def _clipping(self, norm: Any) -> Any:
        """The factor that brings a norm down to `clip_norm` (Pascanu et al., 2013)."""
        tf = device.tensorflow()
        if self.clip_norm is None:
            return tf.constant(1.0)
        return tf.minimum(1.0, self.clip_norm / tf.maximum(norm, 1e-12))
