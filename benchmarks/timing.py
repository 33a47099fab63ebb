"""Timing that the benchmarks share."""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any


def median_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of one call of `work`, after one call that compiles and fills caches."""
    work()
    return statistics.median(timeit.repeat(work, repeat=repeats, number=1))


def timed_epochs(loop: Any, dataset: Any, epochs: int) -> tuple[dict[str, Any], float]:
    """Train one epoch to compile the graphs, then measure `epochs` epochs.

    Returns:
        The figures ``images_per_second`` (median), ``first_epoch_seconds`` (with tracing and compilation) and
        ``epochs`` (images/s of each measured epoch); and the mean training loss of the last epoch.
    """
    compiling = time.perf_counter()
    loop.train_epoch(dataset.train, 0)
    first = time.perf_counter() - compiling
    logs = [loop.train_epoch(dataset.train, epoch) for epoch in range(1, epochs + 1)]
    speeds = [epoch["images_per_second"] for epoch in logs]
    figures = {"images_per_second": statistics.median(speeds), "first_epoch_seconds": first, "epochs": speeds}
    return figures, logs[-1]["loss"]
