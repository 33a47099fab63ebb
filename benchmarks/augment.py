"""How fast is one augmentation launch? ``python -m benchmarks.augment``

Each policy on a CIFAR-sized epoch in shuffled order, uint8 in, normalised float16 (on a GPU) and float32 out. On a GPU
the time is the kernel's own, between two CUDA events, and stands beside a device-to-device copy that moves as many
bytes in the same run. Bytes are those read plus those written. Every figure is the median after a warm-up.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy

from benchmarks import results
from pipeline import augment
from pipeline.core import cli, device

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
POLICIES = ("standard", "none", "light", "strong")


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of one call, after two that warm up."""
    for _ in range(2):
        work()
    return statistics.median(_gpu_times(work, repeats) if device.has_gpu() else _cpu_times(work, repeats))


def _cpu_times(work: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def _gpu_times(work: Callable[[], Any], repeats: int) -> list[float]:
    """Between events on the GPU. The copies queued first keep it busy while the host prepares the launch, which
    would otherwise be timed with the kernel."""
    import cupy

    ballast = cupy.empty(2**30, cupy.uint8)
    halves = ballast[: 2**29], ballast[2**29 :]
    times = []
    for _ in range(repeats):
        for _ in range(12):
            cupy.copyto(*halves)
        before, after = cupy.cuda.Event(), cupy.cuda.Event()
        before.record()
        work()
        after.record()
        after.synchronize()
        times.append(cupy.cuda.get_elapsed_time(before, after) / 1000)
    return times


def measure(count: int, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Figures of every policy and output type, and of a plain copy."""
    xp = device.xp()
    generator = numpy.random.default_rng(0)
    images = device.to_device(generator.integers(0, 256, (count, *shape), dtype=numpy.uint8))
    order = device.to_device(generator.permutation(count))
    figures: dict[str, Any] = {"images": count, "shape": list(shape), "repeats": repeats, "launches": []}
    for dtype in ("float16", "float32") if device.has_gpu() else ("float32",):
        out = xp.empty(images.shape, dtype)
        moved = images.nbytes + out.nbytes
        # A copy reads as many bytes as it writes.
        source, target = xp.zeros(moved // 2, xp.uint8), xp.empty(moved // 2, xp.uint8)
        seconds = median_seconds(functools.partial(xp.copyto, target, source), repeats)
        copy = moved / seconds
        figures[f"copy_{dtype}"] = {"bytes": moved, "milliseconds": seconds * 1e3, "terabytes_per_second": copy / 1e12}
        for policy in POLICIES:
            launch = functools.partial(
                augment.apply, images, augment.load_policy(policy), MEAN, STD,
                seed=0, epoch=1, indices=order, dtype=dtype, out=out,
            )  # fmt: skip
            seconds = median_seconds(launch, repeats)
            figures["launches"].append(
                {
                    "policy": policy,
                    "dtype": dtype,
                    "milliseconds": seconds * 1e3,
                    "images_per_second": count / seconds,
                    "terabytes_per_second": moved / seconds / 1e12,
                    "of_copy": moved / seconds / copy,
                }
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.augment", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=50_000, help="images in the epoch (default 50000)")
    parser.add_argument("--repeats", type=int, default=None, help="timed launches (default 50 on a GPU, 5 without)")
    arguments = parser.parse_args()
    if arguments.images < 1 or (arguments.repeats is not None and arguments.repeats < 1):
        parser.error("--images and --repeats must be at least 1")
    figures = measure(arguments.images, (32, 32, 3), arguments.repeats or (50 if device.has_gpu() else 5))
    machine = device.describe()
    print(f"{machine['gpu'] or machine['cpu']}: {arguments.images:,} images of 32×32×3")
    print(f"{'policy':<10} {'output':<8} {'ms':>9} {'images/s':>15} {'TB/s':>8} {'of a copy':>10}")
    for row in figures["launches"]:
        print(
            f"{row['policy']:<10} {row['dtype']:<8} {row['milliseconds']:>9.3f} {row['images_per_second']:>15,.0f} "
            f"{row['terabytes_per_second']:>8.4f} {row['of_copy']:>10.1%}"
        )
    for key, copy in figures.items():
        if key.startswith("copy_"):
            print(
                f"{'copy':<10} {key[5:]:<8} {copy['milliseconds']:>9.3f} {'':>15} {copy['terabytes_per_second']:>8.4f}"
            )
    print(f"written to {results.save('augment', figures)}")


if __name__ == "__main__":
    cli.run(main)
