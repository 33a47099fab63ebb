"""Optimizers and learning-rate schedules by name, from the settings."""

from __future__ import annotations

import functools
import math
from typing import Any

from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.core.settings import OptimizerSettings

START_DIVISOR = 25.0  # the learning rate starts at its peak divided by this
END_DIVISOR = 1e3  # and ends at its peak divided by this


def build(settings: OptimizerSettings, *, schedule: str, warmup: float, total_steps: int) -> Any:
    """Build a Keras optimizer whose learning rate follows a schedule.

    Args:
        settings: ``name`` (sgd or adam), ``learning_rate`` (the peak), ``weight_decay`` (decoupled, Loshchilov and
            Hutter, 2019; not applied to biases and normalisation), and for sgd ``momentum`` and ``nesterov``.
        schedule: ``one_cycle`` (Smith, 2018: linear up, linear down), ``cosine`` (linear up, then Loshchilov and
            Hutter, 2017, without restarts) or ``constant``.
        warmup: Fraction of the steps in which the rate rises.
        total_steps: Steps of the whole training.

    Raises:
        PipelineError: The optimizer or an option is unknown.
    """
    device.tensorflow()
    import keras

    options = settings.model_dump(
        exclude={"name", "learning_rate", "backbone_factor"}, exclude_unset=True, exclude_none=True
    )
    name, rate = settings.name, settings.learning_rate
    known = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}
    if name not in known:
        raise PipelineError(f"There is no optimizer {name!r}; known names: {', '.join(known)}.")
    if schedule != "constant":
        rate = schedule_class()(rate, schedule, warmup, total_steps)
    try:
        optimizer = known[name](rate, **options)
    except (TypeError, ValueError) as error:
        raise PipelineError(f"The optimizer {name} does not accept the options {options} ({error}).") from error
    if optimizer.weight_decay is not None:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


@functools.cache
def schedule_class() -> Any:
    """The class of the Keras schedule; defined in a function, so that Keras is imported only when needed."""
    tf = device.tensorflow()
    import keras

    @keras.saving.register_keras_serializable("pipeline")
    class WarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
        """Linear warm-up from peak / 25, then a linear (one_cycle) or cosine decay to peak / 1000."""

        def __init__(self, peak: float, shape: str, warmup: float, total_steps: int):
            super().__init__()
            self.peak, self.shape, self.warmup, self.total_steps = peak, shape, warmup, total_steps

        def __call__(self, step: Any) -> Any:
            step = tf.cast(step, tf.float32)
            rise = self.warmup * self.total_steps
            up = 1 / START_DIVISOR + (1 - 1 / START_DIVISOR) * step / max(rise, 1e-9)
            done = tf.clip_by_value((step - rise) / max(self.total_steps - rise, 1), 0.0, 1.0)
            fall = 1 - done if self.shape == "one_cycle" else (1 + tf.cos(math.pi * done)) / 2
            return self.peak * tf.where(step < rise, up, tf.maximum(fall, 1 / END_DIVISOR))

        def get_config(self) -> dict[str, Any]:
            return {k: getattr(self, k) for k in ("peak", "shape", "warmup", "total_steps")}

    return WarmupDecay
