"""The arithmetic of augmentation for one pixel, written once and compiled for the CPU and for CUDA.

The functions are plain Python on scalars. `compiled(jit)` compiles all of them: ``compiled(numba.njit)`` for the CPU,
``compiled(numba.cuda.jit(device=True))`` for the GPU, so both draw the same random numbers and agree to float32
rounding. Explicit casts keep integers at 32 bits, because 64-bit arithmetic, Numba's default, takes twice as many
instructions on a GPU.
"""

from __future__ import annotations

import hashlib
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SOURCE_DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

# The number of an operation selects its random stream and never changes. The kernels define the order of application.
OPERATION_COUNT = 8
FLIP, TRANSLATE, ROTATE, BRIGHTNESS, CONTRAST, NOISE, SALT_AND_PEPPER, CUTOUT = range(OPERATION_COUNT)

# Positions in the float32 array that holds the random parameters of one image.
PARAMETER_COUNT = 12
FLIPPED, SHIFT_X, SHIFT_Y, COSINE, SINE, OFFSET, FACTOR, STDDEV, THRESHOLD, LEFT, TOP, SIDE = range(PARAMETER_COUNT)

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


def draw_parameters(operation, image, seed, epoch, settings, height, width, parameters, start):
    """Draw the random parameters of one operation for one image.

    Args:
        operation: FLIP to CUTOUT.
        image: Index of the image in its split. With the seed and the epoch it determines the result.
        settings: float32 [operations, 3]: probability, low and high end of the operation's range.
        parameters: float32; the results are written from position `start` on. If the operation is not applied, the
            values have no effect.
    """
    coin, word_1, word_2, _ = philox(image, operation, np.uint32(0), PER_IMAGE, seed, epoch)
    applied = uniform(coin) < settings[operation, 0]
    low, high = settings[operation, 1], settings[operation, 2]
    first, second = uniform(word_1), uniform(word_2)
    value = low + first * (high - low)
    if operation == FLIP:
        parameters[start + FLIPPED] = ONE if applied else ZERO
    elif operation == TRANSLATE:
        # The floor comes before the sum, so that a fused multiply-add cannot round differently on another device.
        span = np.float32(2) * high + ONE
        parameters[start + SHIFT_X] = np.float32(math.floor(first * span)) - high if applied else ZERO
        parameters[start + SHIFT_Y] = np.float32(math.floor(second * span)) - high if applied else ZERO
    elif operation == ROTATE:
        cosine, sine = cosine_and_sine(value if applied else ZERO)  # exactly 1 and 0 if not applied
        parameters[start + COSINE] = cosine
        parameters[start + SINE] = sine
    elif operation == BRIGHTNESS:
        parameters[start + OFFSET] = value if applied else ZERO
    elif operation == CONTRAST:
        parameters[start + FACTOR] = value if applied else ONE
    elif operation == NOISE:
        parameters[start + STDDEV] = value if applied else ZERO
    elif operation == SALT_AND_PEPPER:
        lowest = np.float32(math.floor(low * RESOLUTION))
        steps = np.float32(math.floor(high * RESOLUTION)) - lowest + ONE
        threshold = lowest + np.float32(math.floor(first * steps))
        parameters[start + THRESHOLD] = min(threshold, RESOLUTION) if applied else ZERO
    elif operation == CUTOUT:
        # The centre is uniform over the image, so the square may extend over the edge (DeVries and Taylor, 2017).
        reach = np.float32(math.floor(high * HALF))
        parameters[start + LEFT] = np.float32(math.floor(first * np.float32(width))) - reach
        parameters[start + TOP] = np.float32(math.floor(second * np.float32(height))) - reach
        parameters[start + SIDE] = high if applied else ZERO


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


def inverse_map(x, y, shift_x, shift_y, cosine, sine, height, width):
    """Map a pixel of the output to its position in the source: the inverse of rotation and translation.

    The forward map rotates the image anticlockwise about its centre by the angle of (`cosine`, `sine`), then moves it
    by (`shift_x`, `shift_y`).

    Returns:
        Two float32, x and y in the source; they may lie outside the image.
    """
    centre_x, centre_y = np.float32(width - 1) * HALF, np.float32(height - 1) * HALF
    right = np.float32(x) - shift_x - centre_x
    down = np.float32(y) - shift_y - centre_y
    return centre_x + cosine * right - sine * down, centre_y + sine * right + cosine * down


def bilinear_taps(x, y, flipped, height, width):
    """The four pixels around a position, and the position's distance from the first; outside, the image is reflected.

    Args:
        x, y: float32.
        flipped: Whether the image is mirrored left to right.

    Returns:
        The pixel numbers (top left, top right, bottom left, bottom right), then the distance in x and in y.
    """
    left, top = np.float32(math.floor(x)), np.float32(math.floor(y))
    x_0, x_1 = reflect_far(np.int32(left), width), reflect_far(np.int32(left) + np.int32(1), width)
    y_0, y_1 = reflect_far(np.int32(top), height), reflect_far(np.int32(top) + np.int32(1), height)
    if flipped:
        x_0, x_1 = np.int32(width - 1 - x_0), np.int32(width - 1 - x_1)
    upper, lower = np.uint32(y_0 * width), np.uint32(y_1 * width)
    return (
        np.uint32(upper + x_0),
        np.uint32(upper + x_1),
        np.uint32(lower + x_0),
        np.uint32(lower + x_1),
        x - left,
        y - top,
    )


def bilinear(pixels, start, taps, channel, channels):
    """Interpolate one channel between four pixels; float32 from 0 to 255.

    Args:
        pixels: uint8 [≥ start + H·W·C], images with the channels last.
        start: Position of the image's first byte.
        taps: From `bilinear_taps`.
    """
    first = np.uint64(start) + np.uint64(channel)
    top_left = np.float32(pixels[first + np.uint64(taps[0] * channels)])
    top_right = np.float32(pixels[first + np.uint64(taps[1] * channels)])
    bottom_left = np.float32(pixels[first + np.uint64(taps[2] * channels)])
    bottom_right = np.float32(pixels[first + np.uint64(taps[3] * channels)])
    upper = top_left + taps[4] * (top_right - top_left)
    lower = bottom_left + taps[4] * (bottom_right - bottom_left)
    return upper + taps[5] * (lower - upper)


def scale_and_offset(factor, offset):
    """Brightness and contrast as one affine map from a byte to a fraction of full scale: byte · scale + offset.

    Args:
        factor: Contrast, applied about mid-grey (0.5).
        offset: Brightness, added before the contrast.
    """
    return factor * BYTE, (offset - HALF) * factor + HALF


def box_muller(word_0, word_1):
    """Two independent standard normal float32 from two uint32 (Box and Muller, 1958)."""
    radius = np.float32(math.sqrt(np.float32(-2) * np.float32(math.log(ONE - uniform(word_0)))))
    cosine, sine = cosine_and_sine(uniform(word_1))
    return radius * cosine, radius * sine


def is_salt_or_pepper(word, threshold):
    """Whether salt and pepper replaces the pixel with the random `word`; `threshold` is the rate times 2**24."""
    return np.uint32(word >> np.uint32(8)) < np.uint32(threshold)


def salt_or_pepper(word):
    """1.0 (salt) or 0.0 (pepper) with equal probability, from a bit that `is_salt_or_pepper` does not use."""
    return np.float32(np.uint32(word & np.uint32(1)))


def clip(value):
    """Limit a fraction of full scale to 0 … 1."""
    return min(max(value, ZERO), ONE)


def in_square(x, y, left, top, side):
    """Whether the pixel (x, y) lies in the square of `side` pixels with the top left corner (`left`, `top`)."""
    across, down = np.float32(x) - left, np.float32(y) - top
    return ZERO <= across < side and ZERO <= down < side


# In the order of definition: a function calls only functions above it.
FUNCTIONS = [value for value in list(globals().values()) if isinstance(value, types.FunctionType)]


def compiled(jit: Callable[[Callable[..., Any]], Any]) -> types.ModuleType:
    """A copy of this module with all functions above compiled.

    Args:
        jit: Numba decorator, such as ``numba.njit``.
    """
    module = types.ModuleType(__name__)
    vars(module).update(globals())
    for function in FUNCTIONS:
        setattr(module, function.__name__, jit(rebound(function, vars(module), function.__name__)))
    return module


def rebound(function: Callable[..., Any], scope: dict[str, Any], name: str) -> Callable[..., Any]:
    """A copy of a function under another name, which looks up its global variables in `scope`."""
    copy = types.FunctionType(function.__code__, scope, name, function.__defaults__, function.__closure__)
    copy.__doc__, copy.__qualname__ = function.__doc__, name
    return copy
