"""Measure the speed of the augmentation kernel: ``python -m benchmarks.augment``

Measures each policy on one epoch of images in shuffled order, with float16 (GPU only) and float32 output. On a GPU,
CUDA events measure the kernel's time, which is compared with a device-to-device copy of the same number of bytes (read
plus written). Every figure is the median after a warm-up. ``--size 224 --images 2000`` measures photos.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import numpy

from benchmarks import results, timing
from pipeline import augment
from pipeline.core import cli, device

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
POLICIES = ("standard", "none", "light", "strong", "photos")


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of one call, after one to warm up; on a GPU, the seconds between two events.

    Copies queued first keep the GPU busy while the host prepares the launch, so that the preparation is not measured.
    """
    if not device.has_gpu():
        return timing.median_seconds(work, repeats)
    import cupy

    work()
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
    return statistics.median(times)


def measure(count: int, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Measure every policy and output type, and a copy.

    Args:
        count: Number of images.
        shape: (H, W, C) of the images.
        repeats: Timed launches.

    Returns:
        The content of the result file.
    """
    xp = device.xp()
    generator = numpy.random.default_rng(0)
    images = device.to_device(generator.integers(0, 256, (count, *shape), dtype=numpy.uint8))
    order = device.to_device(generator.permutation(count))
    figures: dict[str, Any] = {"images": count, "shape": list(shape), "repeats": repeats, "launches": []}
    for dtype in ("float16", "float32") if device.has_gpu() else ("float32",):
        out = xp.empty(images.shape, dtype)
        moved = images.nbytes + out.nbytes
        # A copy reads half of the bytes and writes the other half.
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.augment", description=__doc__.split(":")[0])
    parser.add_argument("--images", type=cli.positive, default=50_000, help="images in the epoch (default: 50000)")
    parser.add_argument("--size", type=cli.positive, default=32, help="width and height of the images (default: 32)")
    repeats = 50 if device.has_gpu() else 5
    parser.add_argument("--repeats", type=cli.positive, default=repeats, help="timed launches (default: %(default)s)")
    arguments = parser.parse_args()
    size = arguments.size
    figures = measure(arguments.images, (size, size, 3), arguments.repeats)
    machine = device.describe()
    print(f"{machine['gpu'] or machine['cpu']}: {arguments.images:,} images of {size}×{size}×3")
    print(f"{'policy':<10} {'output':<8} {'ms':>9} {'images/s':>15} {'TB/s':>8} {'of a copy':>10}")
    for row in figures["launches"]:
        print(
            f"{row['policy']:<10} {row['dtype']:<8} {row['milliseconds']:>9.3f} {row['images_per_second']:>15,.0f} "
            f"{row['terabytes_per_second']:>8.4f} {row['of_copy']:>10.1%}"
        )
    for key, copy in figures.items():
        if key.startswith("copy_"):
            print(f"{'copy':<10} {key[5:]:<8} {copy['milliseconds']:>9.3f} {copy['terabytes_per_second']:>24.4f}")
    print(f"written to {results.save('augment', figures)}")


if __name__ == "__main__":
    cli.run(main)
