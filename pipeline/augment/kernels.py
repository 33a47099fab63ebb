"""The launch on the CPU: over the images on all cores, one image's row of the output staying in the cache.

`cuda_kernel` is its counterpart; both call the functions of `pixel`.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from pipeline.augment import pixel
from pipeline.augment.pixel import (
    COSINE,
    DEVIATION,
    FACTOR,
    FLIPPED,
    GROUP,
    LEFT,
    NOISE,
    OFFSET,
    ONE,
    OPERATION_COUNT,
    PARAMETER_COUNT,
    PER_PIXEL,
    SALT_AND_PEPPER,
    SHIFT_X,
    SHIFT_Y,
    SIDE,
    SINE,
    THRESHOLD,
    TOP,
    ZERO,
    bias,
    bilinear,
    bilinear_taps,
    clip,
    corrupted,
    cut_out,
    draw,
    gain,
    grain,
    inverse_map,
    normalise,
    normals,
    philox,
    reflect,
)

IMAGES_AT_ONCE = 1024  # float16 output is made by way of a float32 copy this large


def _cpu_kernel(images, indices, settings, seed, epoch, scale, shift, out):
    """Augment images [N, H, W, C] uint8 at `indices` [M] into `out` [M, H·W·C] float32."""
    height, width, channels = images.shape[1:]
    size = height * width * channels
    for row in numba.prange(len(indices)):
        index = indices[row]
        image = images[index].reshape(size)
        drawn = np.empty(PARAMETER_COUNT, np.float32)
        for operation in range(OPERATION_COUNT):
            draw(operation, index, seed, epoch, settings, height, width, drawn, 0)
        flipped = drawn[FLIPPED] > ZERO
        factor = gain(drawn[FACTOR])
        offset = bias(drawn[FACTOR], drawn[OFFSET])

        if drawn[COSINE] != ONE or drawn[SINE] != ZERO:
            for y in range(height):
                for x in range(width):
                    place = inverse_map(x, y, drawn[SHIFT_X], drawn[SHIFT_Y], drawn[COSINE], drawn[SINE], height, width)
                    around = bilinear_taps(place[0], place[1], flipped, height, width)
                    for channel in range(channels):
                        value = bilinear(image, 0, around, channel, channels)
                        out[row, (y * width + x) * channels + channel] = value * factor + offset
        else:
            columns = np.empty(width, np.int64)
            for x in range(width):
                column = reflect(x - np.int32(drawn[SHIFT_X]), width)
                columns[x] = (width - 1 - column if flipped else column) * channels
            for y in range(height):
                start = reflect(y - np.int32(drawn[SHIFT_Y]), height) * width * channels
                for x in range(width):
                    for channel in range(channels):
                        value = np.float32(image[start + columns[x] + channel])
                        out[row, (y * width + x) * channels + channel] = value * factor + offset

        if drawn[DEVIATION] > ZERO:
            for first in range(0, height * width, GROUP):
                for channel in range(channels):
                    words = philox(index, NOISE, first // GROUP * channels + channel, PER_PIXEL, seed, epoch)
                    noise = normals(words[0], words[1]) + normals(words[2], words[3])
                    for k in range(min(GROUP, height * width - first)):
                        out[row, (first + k) * channels + channel] += drawn[DEVIATION] * noise[k]
        if drawn[THRESHOLD] > ZERO:
            for first in range(0, height * width, GROUP):
                words = philox(index, SALT_AND_PEPPER, first // GROUP, PER_PIXEL, seed, epoch)
                for k in range(min(GROUP, height * width - first)):
                    if corrupted(words[k], drawn[THRESHOLD]):
                        for channel in range(channels):
                            out[row, (first + k) * channels + channel] = grain(words[k])
        for position in range(0, size, channels):
            for channel in range(channels):
                value = clip(out[row, position + channel])
                out[row, position + channel] = normalise(value, scale[channel], shift[channel])
        if drawn[SIDE] > ZERO:
            for y in range(height):
                for x in range(width):
                    if cut_out(x, y, drawn[LEFT], drawn[TOP], drawn[SIDE]):
                        for channel in range(channels):
                            out[row, (y * width + x) * channels + channel] = ZERO


@functools.cache
def _compiled() -> Any:
    # Numba's disk cache notices a change of this file only; the name makes it notice one of pixel.py.
    name = f"augment_{pixel.SOURCE_DIGEST[:12]}"
    scope = {**globals(), **pixel.compiled(numba.njit)}
    return numba.njit(parallel=True, cache=True)(pixel.rebound(_cpu_kernel, scope, name))


def launch(
    images: Any,
    indices: Any,
    settings: Any,
    seed: int,
    epoch: int,
    scale: tuple[float, ...],
    shift: tuple[float, ...],
    out: Any,
) -> None:
    """Augment on the CPU; returns when it is done.

    Args:
        images: uint8 [N, H, W, C], contiguous, NumPy.
        indices: int64 [M], M at least 1, each from 0 to N - 1.
        settings: float32 [operations, 3], the policy's probabilities and ranges.
        seed: From 0 to 2**32 - 1.
        epoch: Likewise.
        scale: C numbers, 1 / std.
        shift: C numbers, - mean / std.
        out: float32 or float16 [M, H, W, C], contiguous; written.
    """
    kernel = _compiled()
    rows = out.reshape(len(indices), -1)
    fixed = settings, np.uint32(seed), np.uint32(epoch), np.array(scale, np.float32), np.array(shift, np.float32)
    if out.dtype == np.float32:
        kernel(images, indices, *fixed, rows)
        return
    scratch = np.empty((min(IMAGES_AT_ONCE, len(indices)), rows.shape[1]), np.float32)
    for start in range(0, len(indices), IMAGES_AT_ONCE):
        some = indices[start : start + IMAGES_AT_ONCE]
        kernel(images, some, *fixed, scratch[: len(some)])
        rows[start : start + len(some)] = scratch[: len(some)]
