"""The augmentation operations: one class each, with the settings and the arithmetic for the CPU and the GPU.

`compose` compiles the static methods for both devices. They are functions of scalars, see `Operation`. They can use the
functions and constants imported from `pixel`. The classes are in the order in which the operations are applied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipeline.augment.pixel import (
    GROUP,
    HALF,
    ONE,
    RESOLUTION,
    ZERO,
    between,
    box_muller,
    cosine_and_sine,
    image_words,
    pixel_words,
    reflect,
    reflect_position,
    uniform,
)


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("a number or a pair [low, high]")
    return pair


Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Range = Annotated[tuple[Fraction, Fraction], BeforeValidator(_pair), AfterValidator(_ordered)]
AreaRange = Annotated[tuple[PositiveFraction, PositiveFraction], BeforeValidator(_pair), AfterValidator(_ordered)]
Ratio = Annotated[float, Field(ge=0.1, le=10)]
RatioRange = Annotated[tuple[Ratio, Ratio], BeforeValidator(_pair), AfterValidator(_ordered)]


class Operation(BaseModel):
    """One operation of a policy; the docstring of a subclass describes it in one sentence.

    A subclass has a `number`, which selects its random numbers and never changes, the `neutral` parameters of an image
    to which it is not applied, and these static methods, of which only the first is required. p are the image's
    parameters.

    - ``draw(uniforms, values, height, width, stream)`` returns the random parameters of one image, a tuple of float32
      as long as `neutral`, from two uniform random numbers and the four numbers of `values`. `pixel.image_words` of
      `stream` gives more random numbers.
    - ``column(x, width, p)`` and ``line(y, height, p)`` return the column and the line of the source (int32), for an
      operation that moves whole pixels.
    - ``move(x, y, height, width, p)`` returns the position in the source (two float32), which may be outside the image.
    - ``affine(factor, offset, p)`` returns the new factor and offset of v − ½ = factor · byte / 255 + offset.
    - ``colour(red, green, blue, p)`` returns the new colour, as fractions of full scale; not called for grey images.
    - ``perturb(values, start, first, count, channels, stream, p)`` changes the values of `count` pixels, which are in
      the array `values` from `start` on; `first` is the number of the first pixel, a multiple of `pixel.GROUP` or the
      only pixel. The values are clipped to 0 … 1 afterwards.
    - ``replace`` has the same arguments and is called after clipping.
    - ``hides(x, y, p)`` says whether the pixel becomes the mean colour.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
    number: ClassVar[int]
    neutral: ClassVar[tuple[float, ...]] = (0,)
    separable: ClassVar[bool] = True  # `move` maps x independently of y

    probability: Fraction = 1.0

    def values(self) -> tuple[float, ...]:
        """Up to four numbers for `draw`."""
        return ()

    @classmethod
    def example(cls, side: int) -> dict[str, Any]:
        """Settings with a visible effect on images of `side` pixels, for the gallery."""
        return {}


class DrawnBetween:
    """For operations with one parameter, which is uniform between the two `values`."""

    @staticmethod
    def draw(uniforms, values, height, width, stream):
        return (between(values, uniforms[0]),)


class Factor(DrawnBetween):
    """For operations whose parameter is a factor from 1 - amount to 1 + amount."""

    neutral = (1,)

    def values(self) -> tuple[float, ...]:
        return 1 - self.amount, 1 + self.amount


class Flip(Operation):
    """Mirror left to right."""

    number = 0

    @staticmethod
    def draw(uniforms, values, height, width, stream):
        return (ONE,)

    @staticmethod
    def column(x, width, p):
        return np.int32(width - 1 - x) if p[0] > ZERO else np.int32(x)

    @staticmethod
    def line(y, height, p):
        return y


class VerticalFlip(Operation):
    """Mirror top to bottom."""

    number = 8

    @staticmethod
    def draw(uniforms, values, height, width, stream):
        return (ONE,)

    @staticmethod
    def column(x, width, p):
        return x

    @staticmethod
    def line(y, height, p):
        return np.int32(height - 1 - y) if p[0] > ZERO else np.int32(y)


class Zoom(Operation):
    """Cut out a random part of the image, a fraction area of it with a width : height of aspect, and enlarge it."""

    # As torchvision's RandomResizedCrop: ten attempts, then the largest centred crop with an allowed aspect ratio.
    number = 9
    neutral = (0, 0, 0, 0)

    area: AreaRange
    aspect: RatioRange = (3 / 4, 4 / 3)

    def values(self) -> tuple[float, ...]:
        return *self.area, *self.aspect

    @classmethod
    def example(cls, side: int) -> dict[str, Any]:
        return {"area": [0.15, 0.6]}

    @staticmethod
    def draw(uniforms, values, height, width, stream):
        # float64, so that rounding to whole pixels gives the same result on each device.
        low, high, narrow, wide = values
        lowest = math.log(np.float64(narrow))
        span = math.log(np.float64(wide)) - lowest
        across, down = np.float64(0), np.float64(0)
        for attempt in range(10):
            if across == 0:
                words = image_words(stream, np.uint32(attempt))
                area = np.float64(low) + np.float64(uniform(words[1])) * (np.float64(high) - np.float64(low))
                area = area * np.float64(height * width)
                ratio = math.exp(lowest + np.float64(uniform(words[2])) * span)
                across = np.float64(math.floor(math.sqrt(area * ratio) + 0.5))
                down = np.float64(math.floor(math.sqrt(area / ratio) + 0.5))
                if across < 1 or down < 1 or across > width or down > height:
                    across = np.float64(0)
        if across == 0:
            across = min(np.float64(width), np.float64(math.floor(height * np.float64(wide) + 0.5)))
            down = min(np.float64(height), np.float64(math.floor(width / np.float64(narrow) + 0.5)))
            left, top = math.floor((width - across) * 0.5), math.floor((height - down) * 0.5)
        else:
            words = image_words(stream, np.uint32(10))
            left = math.floor(np.float64(uniform(words[0])) * (width - across + 1))
            top = math.floor(np.float64(uniform(words[1])) * (height - down + 1))
        return np.float32(across), np.float32(down), np.float32(left), np.float32(top)

    @staticmethod
    def move(x, y, height, width, p):
        if p[0] == ZERO:
            return x, y
        x, y = reflect_position(x, width), reflect_position(y, height)  # a rotation or shift may be outside
        x = (x + HALF) * (p[0] / np.float32(width)) - HALF
        y = (y + HALF) * (p[1] / np.float32(height)) - HALF
        return p[2] + min(max(x, ZERO), p[0] - ONE), p[3] + min(max(y, ZERO), p[1] - ONE)


class Rotate(Operation):
    """Rotate about the centre by up to ±degrees with bilinear interpolation; outside, the image is reflected."""

    number = 2
    neutral = (1, 0)
    separable = False

    degrees: Annotated[float, Field(ge=0, le=180)]

    def values(self) -> tuple[float, ...]:
        return -self.degrees / 360, self.degrees / 360

    @classmethod
    def example(cls, side: int) -> dict[str, Any]:
        return {"degrees": 30}

    @staticmethod
    def draw(uniforms, values, height, width, stream):
        return cosine_and_sine(between(values, uniforms[0]))

    @staticmethod
    def move(x, y, height, width, p):
        centre_x, centre_y = np.float32(width - 1) * HALF, np.float32(height - 1) * HALF
        right, down = x - centre_x, y - centre_y
        return centre_x + p[0] * right - p[1] * down, centre_y + p[1] * right + p[0] * down


class Translate(Operation):
    """Shift by up to ±pixels along each axis; uncovered pixels show the reflected image."""

    number = 1
    neutral = (0, 0)

    pixels: Annotated[int, Field(ge=0)]

    def values(self) -> tuple[float, ...]:
        return (self.pixels,)

    @classmethod
    def example(cls, side: int) -> dict[str, Any]:
        return {"pixels": side // 6}

    @staticmethod
    def draw(uniforms, values, height, width, stream):
        # The floor comes before the sum, so that a fused multiply-add cannot round differently on another device.
        reach = values[0]
        span = np.float32(2) * reach + ONE
        return (
            np.float32(math.floor(uniforms[0] * span)) - reach,
            np.float32(math.floor(uniforms[1] * span)) - reach,
        )

    @staticmethod
    def column(x, width, p):
        return reflect(np.int32(x - np.int32(p[0])), width)

    @staticmethod
    def line(y, height, p):
        return reflect(np.int32(y - np.int32(p[1])), height)

    @staticmethod
    def move(x, y, height, width, p):
        return x - p[0], y - p[1]


class Brightness(DrawnBetween, Operation):
    """Add up to ±delta, a fraction of full scale (0.1 is 25.5 of 255), to every channel."""

    number = 3

    delta: Fraction

    def values(self) -> tuple[float, ...]:
        return -self.delta, self.delta

    @classmethod
    def example(cls, side: int) -> dict[str, Any]:
        return {"delta": 0.3}

    @staticmethod
    def affine(factor, offset, p):
        return factor, offset + p[0]


class Contrast(Factor, Operation):
    """Scale about mid-grey (127.5) by a factor from 1 - amount to 1 + amount."""

    number = 4

    amount: Fraction

    @classmethod
    def example(cls, side: int) -> dict[str, Any]:
        return {"amount": 0.7}

    @staticmethod
    def affine(factor, offset, p):
        return factor * p[0], offset * p[0]


class Saturation(Factor, Operation):
    """Scale the distance of a colour from the grey of equal luma by a factor from 1 - amount to 1 + amount."""

    number = 10

    amount: Fraction

    @classmethod
    def example(cls, side: int) -> dict[str, Any]:
        return {"amount": 0.9}

    @staticmethod
    def colour(red, green, blue, p):
        grey = np.float32(0.299) * red + np.float32(0.587) * green + np.float32(0.114) * blue  # ITU-R BT.601
        return grey + p[0] * (red - grey), grey + p[0] * (green - grey), grey + p[0] * (blue - grey)


class Hue(DrawnBetween, Operation):
    """Rotate the hue in HSV by up to ±turns (0.5 reaches every hue)."""

    number = 11

    turns: Annotated[float, Field(ge=0, le=0.5)]

    def values(self) -> tuple[float, ...]:
        return -self.turns, self.turns

    @classmethod
    def example(cls, side: int) -> dict[str, Any]:
        return {"turns": 0.3}

    @staticmethod
    def colour(red, green, blue, p):
        highest, lowest = max(red, max(green, blue)), min(red, min(green, blue))
        chroma = highest - lowest
        if chroma == ZERO:  # grey has no hue
            return red, green, blue
        if highest == red:  # the hue in sixths of a turn
            sixths = (green - blue) / chroma
        elif highest == green:
            sixths = (blue - red) / chroma + np.float32(2)
        else:
            sixths = (red - green) / chroma + np.float32(4)
        sixths = sixths + np.float32(6) * p[0]
        return (
            lowest + chroma * hue_weight(sixths),
            lowest + chroma * hue_weight(sixths - np.float32(2)),
            lowest + chroma * hue_weight(sixths + np.float32(2)),
        )


def hue_weight(sixths):
    """The share of a channel in a pure hue, at a distance of `sixths` of a turn from the channel: 1 … 1, then to 0."""
    turns = sixths * np.float32(1 / 6)
    distance = abs(sixths - np.float32(6) * np.float32(math.floor(turns + HALF)))  # 0 to 3
    return min(max(np.float32(2) - distance, ZERO), ONE)


class Noise(DrawnBetween, Operation):
    """Add Gaussian noise to every value; its standard deviation stddev is a fraction of full scale."""

    number = 5

    stddev: Range

    @model_validator(mode="before")
    @classmethod
    def _old_spelling(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "deviation" in values:
            return {"stddev" if key == "deviation" else key: values[key] for key in values if key != "stddev"}
        return values

    def values(self) -> tuple[float, ...]:
        return self.stddev

    @classmethod
    def example(cls, side: int) -> dict[str, Any]:
        return {"stddev": [0.0, 0.15]}

    @staticmethod
    def perturb(values, start, first, count, channels, stream, p):
        for channel in range(channels):
            block = np.uint32((np.uint32(first) // np.uint32(GROUP)) * np.uint32(channels) + np.uint32(channel))
            words = pixel_words(stream, block)
            noise = box_muller(words[0], words[1]) + box_muller(words[2], words[3])
            for k in range(count):
                values[start + k * channels + channel] += p[0] * noise[(first + k) % GROUP]


class SaltAndPepper(Operation):
    """Set a fraction rate of the pixels to white or black."""

    number = 6

    rate: Range

    def values(self) -> tuple[float, ...]:
        return self.rate

    @classmethod
    def example(cls, side: int) -> dict[str, Any]:
        return {"rate": [0.0, 0.15]}

    @staticmethod
    def draw(uniforms, values, height, width, stream):
        lowest = np.float32(math.floor(values[0] * RESOLUTION))
        steps = np.float32(math.floor(values[1] * RESOLUTION)) - lowest + ONE
        threshold = lowest + np.float32(math.floor(uniforms[0] * steps))
        return (min(threshold, RESOLUTION),)

    @staticmethod
    def replace(values, start, first, count, channels, stream, p):
        words = pixel_words(stream, np.uint32(first) // np.uint32(GROUP))
        for k in range(count):
            word = words[(first + k) % GROUP]
            if np.uint32(word >> np.uint32(8)) < np.uint32(p[0]):
                for channel in range(channels):  # salt or pepper by a bit that the comparison does not use
                    values[start + k * channels + channel] = np.float32(np.uint32(word & np.uint32(1)))


class Cutout(Operation):
    """Replace a square of side pixels, centred anywhere in the image, by the mean colour."""

    number = 7
    neutral = (0, 0, 0)

    side: Annotated[int, Field(ge=1)]

    def values(self) -> tuple[float, ...]:
        return (self.side,)

    @classmethod
    def example(cls, side: int) -> dict[str, Any]:
        return {"side": max(side // 3, 1)}

    @staticmethod
    def draw(uniforms, values, height, width, stream):
        # The centre is uniform over the image, so the square may extend over the edge (DeVries and Taylor, 2017).
        reach = np.float32(math.floor(values[0] * HALF))
        left = np.float32(math.floor(uniforms[0] * np.float32(width))) - reach
        top = np.float32(math.floor(uniforms[1] * np.float32(height))) - reach
        return values[0], left, top

    @staticmethod
    def hides(x, y, p):
        across, down = np.float32(x) - p[1], np.float32(y) - p[2]
        return ZERO <= across < p[0] and ZERO <= down < p[0]


def _name(operation: type[Operation]) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in operation.__name__)[1:]


OPERATIONS: dict[str, type[Operation]] = {_name(operation): operation for operation in Operation.__subclasses__()}
