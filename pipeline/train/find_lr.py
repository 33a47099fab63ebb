"""The learning-rate range test (Smith, 2017): find a learning rate before a training.

result = range_test(config.compose(["dataset=cifar10", "model=resnet18"]))
result.suggestion, figures.learning_rate_figure(result.rates, result.losses, result.suggestion)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy

from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.core.settings import Settings
from pipeline.data.dataset import Split
from pipeline.train import setup
from pipeline.train.head import fit_new_head
from pipeline.train.loop import permutation

LOWEST, HIGHEST, STEPS = 1e-6, 10.0, 120
SMOOTHING = 0.9  # weight of the previous mean loss, as in fastai
DIVERGED = 4.0  # the test ends at this multiple of the lowest mean loss
DECREASE = 0.9  # the suggestion is the smallest rate that reaches this fraction of the whole decrease of the loss
FIRST_STEPS = 10  # whose median is the loss before the training


@dataclasses.dataclass(frozen=True, eq=False)
class RangeTest:
    """The result of a range test.

    Attributes:
        rates: float64 [S], the learning rate of each step.
        losses: float64 [S], the exponential moving average of the training loss (with bias correction).
        suggestion: The suggested peak learning rate, rounded to one significant digit.
    """

    rates: numpy.ndarray
    losses: numpy.ndarray
    suggestion: float


def range_test(
    settings: Settings, dataset: Any, lowest: float = LOWEST, highest: float = HIGHEST, steps: int = STEPS
) -> RangeTest:
    """Train with a learning rate that grows exponentially, until the loss diverges; nothing is saved.

    Args:
        settings: The settings of the training, from `config.compose`; its schedule is not used.
        dataset: A `pipeline.data.dataset.Dataset`.
        lowest: First learning rate.
        highest: Last learning rate.
        steps: Number of steps from `lowest` to `highest`.

    Raises:
        PipelineError: The loss decreases at none of the rates, or as for `train.train`.
    """
    settings = setup.resolve(settings).model_copy(update={"schedule": "constant"})
    setup.seed_everything(settings.seed)
    with device.explain_out_of_memory("choose a smaller network"):
        loop = setup.build_loop(settings, dataset)
    fit_new_head(loop, settings, dataset)
    rates, losses, mean = [], [], 0.0
    for step, rate in enumerate(numpy.geomspace(lowest, highest, steps)):
        loop.optimizer.learning_rate = rate
        try:
            loss = loop.train_epoch(_batch(dataset.train, settings, step), step)["loss"]
        except PipelineError:
            if step == 0:
                raise
            break  # the loss is no longer finite
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        rates.append(float(rate))
        losses.append(mean / (1 - SMOOTHING ** (step + 1)))
        if losses[-1] > DIVERGED * min(losses):
            break
    return RangeTest(numpy.array(rates), numpy.array(losses), suggest(numpy.array(rates), numpy.array(losses)))


def _batch(split: Any, settings: Settings, step: int) -> Split:
    """The images of one step as a split, so that an epoch of it is one step."""
    size = min(settings.batch_size, len(split.labels))
    epoch, position = divmod(step, len(split.labels) // size)
    indices = permutation(settings.seed, epoch, len(split.labels))[position * size : (position + 1) * size]
    indices = device.to_device(indices)
    return Split(split.images[indices], split.labels[indices], None)


def suggest(rates: numpy.ndarray, losses: numpy.ndarray) -> float:
    """The smallest learning rate that reaches 90 % of the decrease of the loss, rounded to one significant digit.

    At the rate with the lowest loss the training is already close to divergence.

    Args:
        rates: float [S], ascending.
        losses: float [S], the mean losses.

    Raises:
        PipelineError: The loss does not decrease.
    """
    before, lowest = float(numpy.median(losses[:FIRST_STEPS])), float(losses.min())
    if int(losses.argmin()) < FIRST_STEPS:
        raise PipelineError(
            f"The loss did not decrease at any learning rate from {rates[0]:.0e} to {rates[-1]:.0e}; check the labels, "
            "or set a larger batch_size."
        )
    rate = rates[numpy.flatnonzero(losses <= before - DECREASE * (before - lowest))[0]]
    return round(rate, -math.floor(math.log10(rate)))
