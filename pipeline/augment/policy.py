"""Augmentation policies: which operations are applied to an image, with what probability and range.

load_policy("standard")  # a file in pipeline/conf/augment
load_policy({"flip": {"probability": 0.5}, "rotate": {"degrees": 10}})
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line
from pipeline.core.settings import settings_error

FOLDER = Path(__file__).parent.parent / "conf" / "augment"


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("a number or a pair [low, high]")
    return pair


Fraction = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[tuple[Fraction, Fraction], BeforeValidator(_pair), AfterValidator(_ordered)]


class Operation(BaseModel):
    """One operation of a policy; the docstring of a subclass describes it in one sentence."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    probability: Fraction = 1.0

    def range(self) -> tuple[float, float]:
        """Lowest and highest value of the operation's random parameter, in the units of `pixel.draw_parameters`."""
        return 0.0, 0.0


class Flip(Operation):
    """Mirror left to right."""


class Translate(Operation):
    """Shift by up to ±pixels along each axis; uncovered pixels show the reflected image."""

    pixels: Annotated[int, Field(ge=0)]

    def range(self) -> tuple[float, float]:
        return -self.pixels, self.pixels


class Rotate(Operation):
    """Rotate about the centre by up to ±degrees with bilinear interpolation; outside, the image is reflected."""

    degrees: Annotated[float, Field(ge=0, le=180)]

    def range(self) -> tuple[float, float]:
        return -self.degrees / 360, self.degrees / 360


class Brightness(Operation):
    """Add up to ±delta, a fraction of full scale (0.1 is 25.5 of 255), to every channel."""

    delta: Fraction

    def range(self) -> tuple[float, float]:
        return -self.delta, self.delta


class Contrast(Operation):
    """Scale about mid-grey (127.5) by a factor from 1 - amount to 1 + amount."""

    amount: Fraction

    def range(self) -> tuple[float, float]:
        return 1 - self.amount, 1 + self.amount


class Noise(Operation):
    """Add Gaussian noise to every value; its standard deviation stddev is a fraction of full scale."""

    stddev: Range

    @model_validator(mode="before")
    @classmethod
    def _old_spelling(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "deviation" in values:
            return {"stddev" if key == "deviation" else key: values[key] for key in values if key != "stddev"}
        return values

    def range(self) -> tuple[float, float]:
        return self.stddev


class SaltAndPepper(Operation):
    """Set a fraction rate of the pixels to white or black."""

    rate: Range

    def range(self) -> tuple[float, float]:
        return self.rate


class Cutout(Operation):
    """Replace a square of side pixels, centred anywhere in the image, by the mean colour."""

    side: Annotated[int, Field(ge=1)]

    def range(self) -> tuple[float, float]:
        return self.side, self.side


class Policy(BaseModel):
    """A checked policy; made by `load_policy`. An operation that is None is not applied."""

    model_config = Operation.model_config

    name: str = "custom"
    flip: Flip | None = None  # the operations are in the order of their numbers in `pixel`
    translate: Translate | None = None
    rotate: Rotate | None = None
    brightness: Brightness | None = None
    contrast: Contrast | None = None
    noise: Noise | None = None
    salt_and_pepper: SaltAndPepper | None = None
    cutout: Cutout | None = None

    @property
    def operations(self) -> tuple[int, ...]:
        """Numbers of the operations with a probability above 0."""
        return tuple(int(number) for number in np.flatnonzero(self._rows()[:, 0]))

    @property
    def max_shift(self) -> int:
        """The largest possible translation in pixels."""
        return self.translate.pixels if self.translate and self.translate.probability > 0 else 0

    @functools.cached_property
    def settings(self) -> Any:
        """float32 [operations, 3]: probability, low and high end of each operation, on the pipeline's device."""
        return device.to_device(self._rows())

    def _rows(self) -> np.ndarray:
        chosen = (getattr(self, name) for name in OPERATIONS)
        rows = [(operation.probability, *operation.range()) if operation else (0, 0, 0) for operation in chosen]
        return np.array(rows, np.float32)


OPERATIONS: dict[str, type[Operation]] = {
    name: get_args(field.annotation)[0] for name, field in Policy.model_fields.items() if name != "name"
}


def read(name: str) -> dict[str, Any]:
    """Read a policy in `pipeline/conf/augment` as a mapping, including its `name`.

    Raises:
        PipelineError: The policy does not exist or its file cannot be parsed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = FOLDER / f"{name}.yaml"
    known = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    if name not in known:
        raise PipelineError(f"There is no augmentation policy {name!r}; known policies: {', '.join(known)}.")
    try:
        return {"name": name} | OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException) as error:
        raise PipelineError(f"{path} is not a valid policy file ({first_line(error)}); correct it.") from error


def names() -> list[str]:
    """Names of the policies in `pipeline/conf/augment`, sorted by the number of operations."""
    return sorted((path.stem for path in FOLDER.glob("*.yaml")), key=lambda name: (len(read(name)), name))


def load_policy(policy: str | Mapping[str, Any] | Policy) -> Policy:
    """Load and check a policy.

    Args:
        policy: A name from `names()`, or a mapping from each operation to its `probability` (default 1) and its
            parameter; an operation that is missing or None is not applied. The key `name` is optional. A `Policy` is
            returned unchanged.

    Raises:
        PipelineError: An unknown policy, operation or parameter, or a value out of range.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        policy = read(policy)
    try:
        return Policy.model_validate(dict(policy))
    except ValidationError as error:
        raise settings_error(error, "augment") from error
