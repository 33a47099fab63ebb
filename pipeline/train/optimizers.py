"""Optimizers and learning-rate schedules by name, from the configuration, and the scaling of losses and gradients."""

from __future__ import annotations

import math
from typing import Any

from pipeline.core import device
from pipeline.core.errors import PipelineError

OPTIMIZERS = ("sgd", "adam")


START_DIVISOR = 25.0  # the learning rate starts at this fraction of its peak


END_DIVISOR = 1e3  # and ends at this one


def build(options: dict[str, Any], *, schedule: str, warmup: float, total_steps: int) -> Any:
    """A Keras optimizer whose learning rate follows a schedule over `total_steps`.

    Args:
        options: ``name`` (sgd or adam), ``learning_rate`` (the peak), ``weight_decay`` (decoupled, Loshchilov and
            Hutter, 2019; not applied to biases and normalisation), and for sgd ``momentum`` and ``nesterov``.
        schedule: ``one_cycle`` (Smith, 2018: linear up, linear down), ``cosine`` (linear up, then Loshchilov and
            Hutter, 2017, without restarts) or ``constant``.
        warmup: Fraction of the steps in which the rate rises.
        total_steps: Steps of the whole training.

    Raises:
        PipelineError: An unknown optimizer or option.
    """
    device.tensorflow()
    import keras

    options = dict(options)
    name, peak = options.pop("name"), float(options.pop("learning_rate"))
    if name not in OPTIMIZERS:
        raise PipelineError(f"There is no optimizer {name!r}; known ones: {', '.join(OPTIMIZERS)}.")
    rate = peak if schedule == "constant" else schedule_class()(peak, schedule, warmup, total_steps)
    try:
        optimizer = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}[name](rate, **options)
    except (TypeError, ValueError) as error:
        raise PipelineError(f"The optimizer {name} does not take these options ({error}).") from None
    if optimizer.weight_decay is not None:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def rate_at(step: float, peak: float, schedule: str, warmup: float, total_steps: int) -> float:
    """The learning rate at a step, as a plain number; the reference for the graph below and the notebook's plot."""
    rise = warmup * total_steps
    if step < rise:
        return peak * (1 / START_DIVISOR + (1 - 1 / START_DIVISOR) * step / rise)
    done = min(1.0, (step - rise) / max(total_steps - rise, 1))
    fall = 1 - done if schedule == "one_cycle" else (1 + math.cos(math.pi * done)) / 2
    return peak * max(fall, 1 / END_DIVISOR)


_class: Any = None


def schedule_class() -> Any:
    """The Keras schedule class of `rate_at`; made on first use, because Keras is imported as late as possible."""
    global _class
    if _class is not None:
        return _class
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

    _class = WarmupDecay
    return _class
