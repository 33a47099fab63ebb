"""Timing of training epochs, shared by the benchmarks."""

from __future__ import annotations

import statistics
import time
from typing import Any


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
