"""The augmentation kernel for the CPU: parallel over images.

`cuda_kernel` is its counterpart for the GPU; both call the functions of `pixel`.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from pipeline.augment import pixel as px

IMAGES_AT_ONCE = 1024  # float16 output is computed in float32 in blocks of this size


def _cpu_kernel(images, indices, settings, seed, epoch, scale, shift, out):
    """Augment images [N, H, W, C] uint8 at `indices` [M] into `out` [M, H·W·C] float32."""
    height, width, channels = images.shape[1:]
    size = height * width * channels
    for row in numba.prange(len(indices)):
        index = indices[row]
        image = images[index].reshape(size)
        drawn = np.empty(px.PARAMETER_COUNT, np.float32)
        for operation in range(px.OPERATION_COUNT):
            px.draw_parameters(operation, index, seed, epoch, settings, height, width, drawn, 0)
        flipped = drawn[px.FLIPPED] > px.ZERO
        factor, offset = px.scale_and_offset(drawn[px.FACTOR], drawn[px.OFFSET])

        if drawn[px.COSINE] != px.ONE or drawn[px.SINE] != px.ZERO:
            for y in range(height):
                for x in range(width):
                    at = px.inverse_map(
                        x, y, drawn[px.SHIFT_X], drawn[px.SHIFT_Y], drawn[px.COSINE], drawn[px.SINE], height, width
                    )
                    taps = px.bilinear_taps(at[0], at[1], flipped, height, width)
                    for channel in range(channels):
                        value = px.bilinear(image, 0, taps, channel, channels)
                        out[row, (y * width + x) * channels + channel] = value * factor + offset
        else:
            columns = np.empty(width, np.int64)
            for x in range(width):
                column = px.reflect(x - np.int32(drawn[px.SHIFT_X]), width)
                columns[x] = (width - 1 - column if flipped else column) * channels
            for y in range(height):
                start = px.reflect(y - np.int32(drawn[px.SHIFT_Y]), height) * width * channels
                for x in range(width):
                    for channel in range(channels):
                        value = np.float32(image[start + columns[x] + channel])
                        out[row, (y * width + x) * channels + channel] = value * factor + offset

        if drawn[px.STDDEV] > px.ZERO:
            for first in range(0, height * width, px.GROUP):
                for channel in range(channels):
                    words = px.philox(
                        index, px.NOISE, first // px.GROUP * channels + channel, px.PER_PIXEL, seed, epoch
                    )
                    noise = px.box_muller(words[0], words[1]) + px.box_muller(words[2], words[3])
                    for k in range(min(px.GROUP, height * width - first)):
                        out[row, (first + k) * channels + channel] += drawn[px.STDDEV] * noise[k]
        if drawn[px.THRESHOLD] > px.ZERO:
            for first in range(0, height * width, px.GROUP):
                words = px.philox(index, px.SALT_AND_PEPPER, first // px.GROUP, px.PER_PIXEL, seed, epoch)
                for k in range(min(px.GROUP, height * width - first)):
                    if px.is_salt_or_pepper(words[k], drawn[px.THRESHOLD]):
                        for channel in range(channels):
                            out[row, (first + k) * channels + channel] = px.salt_or_pepper(words[k])
        for position in range(0, size, channels):
            for channel in range(channels):
                value = px.clip(out[row, position + channel])
                out[row, position + channel] = value * scale[channel] + shift[channel]
        if drawn[px.SIDE] > px.ZERO:
            for y in range(height):
                for x in range(width):
                    if px.in_square(x, y, drawn[px.LEFT], drawn[px.TOP], drawn[px.SIDE]):
                        for channel in range(channels):
                            out[row, (y * width + x) * channels + channel] = px.ZERO


@functools.cache
def _compiled() -> Any:
    # Numba's cache on disk only detects changes of this file; the digest in the name also detects those of pixel.py.
    name = f"augment_{px.SOURCE_DIGEST[:12]}"
    scope = {**globals(), "px": px.compiled(numba.njit)}
    return numba.njit(parallel=True, cache=True)(px.rebound(_cpu_kernel, scope, name))


def launch(
    images: Any, indices: Any, settings: Any, seed: int, epoch: int,
    scale: tuple[float, ...], shift: tuple[float, ...], out: Any,
) -> None:  # fmt: skip
    """Augment on the CPU and wait for the result.

    The arguments are those of `cuda_kernel.launch` without `operations`, as NumPy arrays; M is at least 1, and each
    index is from 0 to N - 1.
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
