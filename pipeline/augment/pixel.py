"""Random numbers and interpolation for the augmentation operations, compiled for the CPU and for CUDA by `compose`.

The functions are plain Python on scalars, so both devices draw the same random numbers and agree to float32 rounding.
Explicit casts keep integers at 32 bits, because 64-bit arithmetic, Numba's default, takes twice as many instructions
on a GPU.
"""

from __future__ import annotations

import math

import numpy as np

# Philox-4x32: multipliers, key increments, and the last word of the counter.
MULTIPLIER_0, MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
INCREMENT_0, INCREMENT_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
ROUNDS = 7
LOW_HALF, HALF_BITS = np.uint64(0xFFFFFFFF), np.uint64(32)
PER_IMAGE, PER_PIXEL = np.uint32(0), np.uint32(1)

GROUP = 4  # neighbouring pixels that share one hash
RESOLUTION, STEP = np.float32(2**24), np.float32(2**-24)  # of a uniform random number; exact in float32
HALF, ONE, ZERO = np.float32(0.5), np.float32(1), np.float32(0)
BYTE = np.float32(1 / 255)
QUARTER_TURN = np.float32(math.pi / 2)
SINE_SERIES = tuple(np.float32((-1) ** k / math.factorial(2 * k + 1)) for k in range(5))
COSINE_SERIES = tuple(np.float32((-1) ** k / math.factorial(2 * k)) for k in range(5))


def philox(counter_0, counter_1, counter_2, counter_3, key_0, key_1):
    """Hash a 128-bit counter under a 64-bit key: Philox-4x32 with 7 rounds, the fewest that pass BigCrush.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3, table 2.

    Returns:
        Four uint32.
    """
    a, b, c, d = np.uint32(counter_0), np.uint32(counter_1), np.uint32(counter_2), np.uint32(counter_3)
    k, m = np.uint32(key_0), np.uint32(key_1)
    for _ in range(ROUNDS):
        first = MULTIPLIER_0 * np.uint64(a)
        second = MULTIPLIER_1 * np.uint64(c)
        a = np.uint32(np.uint32(second >> HALF_BITS) ^ b ^ k)
        b = np.uint32(second & LOW_HALF)
        c = np.uint32(np.uint32(first >> HALF_BITS) ^ d ^ m)
        d = np.uint32(first & LOW_HALF)
        k = np.uint32((np.uint64(k) + INCREMENT_0) & LOW_HALF)
        m = np.uint32((np.uint64(m) + INCREMENT_1) & LOW_HALF)
    return a, b, c, d


def uniform(word):
    """A float32 in [0, 1) from the upper 24 bits of a uint32."""
    return np.float32(np.uint32(word >> np.uint32(8))) * STEP


def cosine_and_sine(turns):
    """Cosine and sine of an angle in turns (1 is 360 degrees), float32, accurate to 1e-7.

    Uses the Taylor series around the nearest quarter turn. On a GPU, `math.sin` includes a slow branch for large
    angles and rounds differently from the CPU.
    """
    quarter = np.float32(math.floor(np.float32(4) * turns + HALF))
    angle = QUARTER_TURN * (np.float32(4) * turns - quarter)
    square = angle * angle
    s, c = SINE_SERIES, COSINE_SERIES
    sine = angle * (s[0] + square * (s[1] + square * (s[2] + square * (s[3] + square * s[4]))))
    cosine = c[0] + square * (c[1] + square * (c[2] + square * (c[3] + square * c[4])))
    number = np.int32(quarter) & np.int32(3)
    if number & np.int32(1):
        cosine, sine = -sine, cosine
    if number & np.int32(2):
        cosine, sine = -cosine, -sine
    return cosine, sine


def image_words(stream, block):
    """Four random uint32 for an image and an operation; `block` numbers further sets of four.

    Args:
        stream: Index of the image in its split, number of the operation, seed and epoch.
    """
    return philox(stream[0], stream[1], block, PER_IMAGE, stream[2], stream[3])


def pixel_words(stream, block):
    """Four random uint32 for `GROUP` neighbouring pixels of an image."""
    return philox(stream[0], stream[1], block, PER_PIXEL, stream[2], stream[3])


def between(values, fraction):
    """The number at `fraction` of the way from `values[0]` to `values[1]`."""
    return values[0] + fraction * (values[1] - values[0])


def reflect(position, size):
    """Reflect a position that lies at most `size` - 1 pixels outside the image; the edge pixel is not repeated."""
    inside = np.int32(abs(np.int32(position)))
    mirrored = np.int32(np.int32(2 * (size - 1)) - inside)
    return min(inside, mirrored)


def reflect_far(position, size):
    """Like `reflect`, for a position at any distance outside the image."""
    inside = np.int32(abs(np.int32(position)))
    if inside > np.int32(2 * (size - 1)):  # a division is slow and rarely needed
        inside = np.int32(inside % np.int32(max(2 * (size - 1), 1)))
    return reflect(inside, size)


def reflect_position(position, size):
    """Reflect a float32 position at any distance outside the image; the edge pixel is not repeated."""
    span = np.float32(2 * (size - 1))
    inside = abs(position)
    if inside > span:
        inside = inside - span * np.float32(math.floor(inside / max(span, ONE)))
    return min(inside, span - inside)


def neighbours(position, size):
    """The two whole positions around a float32 position, and its distance from the first; outside, reflected."""
    first = np.float32(math.floor(position))
    return reflect_far(np.int32(first), size), reflect_far(np.int32(first) + np.int32(1), size), position - first


def corners(columns, lines, width):
    """The four pixels around a position, from two columns and two lines, each followed by a distance (`neighbours`).

    Returns:
        The pixel numbers (top left, top right, bottom left, bottom right), then the distance in x and in y.
    """
    upper, lower = np.uint32(lines[0] * width), np.uint32(lines[1] * width)
    return (
        np.uint32(upper + columns[0]),
        np.uint32(upper + columns[1]),
        np.uint32(lower + columns[0]),
        np.uint32(lower + columns[1]),
        columns[2],
        lines[2],
    )


def bilinear(pixels, start, taps, channel, channels):
    """Interpolate one channel between four pixels; float32 from 0 to 255.

    Args:
        pixels: uint8 [≥ start + H·W·C], images with the channels last.
        start: Position of the image's first byte.
        taps: From `corners`.
    """
    first = np.uint64(start) + np.uint64(channel)
    top_left = np.float32(pixels[first + np.uint64(taps[0] * channels)])
    top_right = np.float32(pixels[first + np.uint64(taps[1] * channels)])
    bottom_left = np.float32(pixels[first + np.uint64(taps[2] * channels)])
    bottom_right = np.float32(pixels[first + np.uint64(taps[3] * channels)])
    upper = top_left + taps[4] * (top_right - top_left)
    lower = bottom_left + taps[4] * (bottom_right - bottom_left)
    return upper + taps[5] * (lower - upper)


def box_muller(word_0, word_1):
    """Two independent standard normal float32 from two uint32 (Box and Muller, 1958)."""
    radius = np.float32(math.sqrt(np.float32(-2) * np.float32(math.log(ONE - uniform(word_0)))))
    cosine, sine = cosine_and_sine(uniform(word_1))
    return radius * cosine, radius * sine


def clip(value):
    """Limit a fraction of full scale to 0 … 1."""
    return min(max(value, ZERO), ONE)
