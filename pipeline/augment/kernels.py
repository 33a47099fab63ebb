"""The augmentation kernel for the CPU: parallel over images.

`cuda_kernel` is its counterpart for the GPU; both call the functions of `compose`.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from pipeline.augment import compose
from pipeline.augment import pixel as px
from pipeline.augment.operations import OPERATIONS
from pipeline.augment.policy import Policy

IMAGES_AT_ONCE = 1024  # float16 output is computed in float32 in blocks of this size


def _cpu_kernel(images, indices, settings, seed, epoch, scale, shift, out):
    """Augment images [N, H, W, C] uint8 at `indices` [M] into `out` [M, H·W·C] float32."""
    height, width, channels = images.shape[1:]
    size = height * width * channels
    for row in numba.prange(len(indices)):
        index = indices[row]
        image = images[index].reshape(size)
        values = out[row]
        parameters = np.copy(px.NEUTRAL)
        for operation in range(len(settings)):
            if settings[operation, 1] > px.ZERO:
                px.draw(operation, index, seed, epoch, settings, height, width, parameters, 0)
        drawn = px.load(parameters, 0)
        factor, offset = px.affine(drawn)

        if px.entangled(drawn):
            across, down = np.empty(width, np.float32), np.empty(width, np.float32)
            for y in range(height):
                for x in range(width):
                    across[x], down[x] = np.float32(x), np.float32(y)
                px.moves(across, down, height, width, drawn)
                for x in range(width):
                    columns = px.columns(across[x], width, drawn)
                    taps = px.corners(columns, px.lines(down[x], height, drawn), width)
                    for channel in range(channels):
                        value = px.bilinear(image, 0, taps, channel, channels)
                        values[(y * width + x) * channels + channel] = value * factor + offset
        elif px.fractional(drawn):
            side = max(height, width)
            across, down = np.empty(side, np.float32), np.empty(side, np.float32)
            for i in range(side):
                across[i] = down[i] = np.float32(i)
            px.moves(across, down, height, width, drawn)
            first, second, distance = np.empty(width, np.int32), np.empty(width, np.int32), np.empty(width, np.float32)
            for x in range(width):
                first[x], second[x], distance[x] = px.columns(across[x], width, drawn)
            for y in range(height):
                lines = px.lines(down[y], height, drawn)
                for x in range(width):
                    taps = px.corners((first[x], second[x], distance[x]), lines, width)
                    for channel in range(channels):
                        value = px.bilinear(image, 0, taps, channel, channels)
                        values[(y * width + x) * channels + channel] = value * factor + offset
        else:
            starts = np.empty(width, np.int64)
            for x in range(width):
                starts[x] = px.whole_column(np.int32(x), width, drawn) * channels
            for y in range(height):
                start = px.whole_line(np.int32(y), height, drawn) * width * channels
                for x in range(width):
                    for channel in range(channels):
                        value = np.float32(image[start + starts[x] + channel])
                        values[(y * width + x) * channels + channel] = value * factor + offset

        if channels == 3 and px.colours(drawn):
            for i in range(0, size, 3):
                values[i], values[i + 1], values[i + 2] = px.colour(values[i], values[i + 1], values[i + 2], drawn)
        if px.perturbs(drawn):
            for first_pixel in range(0, height * width, px.GROUP):
                count = min(px.GROUP, height * width - first_pixel)
                start = first_pixel * channels
                px.perturb(values, start, first_pixel, count, channels, index, seed, epoch, drawn)
        if px.replaces(drawn):  # the values are 0 or 1, so the order of this and clipping does not matter
            for first_pixel in range(0, height * width, px.GROUP):
                count = min(px.GROUP, height * width - first_pixel)
                start = first_pixel * channels
                px.replace(values, start, first_pixel, count, channels, index, seed, epoch, drawn)
        for position in range(0, size, channels):
            for channel in range(channels):
                value = px.clip(values[position + channel])
                values[position + channel] = value * scale[channel] + shift[channel]
        if px.covers(drawn):
            for y in range(height):
                for x in range(width):
                    if px.hides(x, y, drawn):
                        for channel in range(channels):
                            values[(y * width + x) * channels + channel] = px.ZERO


@functools.cache
def _compiled() -> Any:
    # Numba's cache on disk only detects changes of this file; the name also changes with the operations.
    scope = {**globals(), "px": compose.compiled(numba.njit(error_model="numpy", forceinline=True))}
    kernel = compose.rebound(_cpu_kernel, scope, f"augment_{compose.DIGEST[:12]}")
    return numba.njit(parallel=True, cache=True, error_model="numpy")(kernel)


def launch(
    images: Any, indices: Any, policy: Policy, seed: int, epoch: int,
    scale: tuple[float, ...], shift: tuple[float, ...], out: Any,
) -> None:  # fmt: skip
    """Augment on the CPU and wait for the result.

    The arguments are those of `cuda_kernel.launch`, as NumPy arrays; M is at least 1, and indices are from 0 to N - 1.
    """
    kernel = _compiled()
    rows = out.reshape(len(indices), -1)
    settings = policy.rows(tuple(OPERATIONS))
    fixed = settings, np.uint32(seed), np.uint32(epoch), np.array(scale, np.float32), np.array(shift, np.float32)
    if out.dtype == np.float32:
        kernel(images, indices, *fixed, rows)
        return
    scratch = np.empty((min(IMAGES_AT_ONCE, len(indices)), rows.shape[1]), np.float32)
    for start in range(0, len(indices), IMAGES_AT_ONCE):
        some = indices[start : start + IMAGES_AT_ONCE]
        kernel(images, some, *fixed, scratch[: len(some)])
        rows[start : start + len(some)] = scratch[: len(some)]
