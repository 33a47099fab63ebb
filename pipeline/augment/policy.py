"""Policies: which operations an image goes through, with what probability and range.

A policy is a file of the Hydra group `pipeline/conf/augment`, or the same as a mapping:

    load_policy("standard")
    load_policy({"flip": {"probability": 0.5}, "rotate": {"degrees": 10}})
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.augment import pixel
from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line

FOLDER = Path(__file__).parent.parent / "conf" / "augment"


def _as_given(low: float, high: float) -> tuple[float, float]:
    return low, high


def _either_way(low: float, high: float) -> tuple[float, float]:
    return -high, high


@dataclasses.dataclass(frozen=True)
class Operation:
    """What can be done to an image.

    Attributes:
        number: Its place in a policy's rows, and its random stream.
        summary: One sentence for listings.
        parameter: The name of its parameter in a policy; None without one.
        lowest, highest: The values the parameter may have.
        whole: The parameter is a number of pixels.
        ranged: The parameter may be a pair [low, high], from which each image draws.
        ends: Turns (low, high) of the policy into the ends of the range a draw is from, in the kernels' units.
    """

    number: int
    summary: str
    parameter: str | None = None
    lowest: float = 0
    highest: float = math.inf
    whole: bool = False
    ranged: bool = False
    ends: Callable[[float, float], tuple[float, float]] = _as_given


OPERATIONS: dict[str, Operation] = {
    "flip": Operation(pixel.FLIP, "Mirror left to right."),
    "translate": Operation(
        pixel.TRANSLATE, "Move by up to ±pixels along each axis; what is uncovered is the image, reflected.",
        "pixels", whole=True, ends=_either_way,
    ),
    "rotate": Operation(
        pixel.ROTATE, "Rotate about the centre by up to ±degrees, bilinear; the image is reflected outside.",
        "degrees", highest=180, ends=lambda low, high: (-high / 360, high / 360),
    ),
    "brightness": Operation(
        pixel.BRIGHTNESS, "Add up to ±delta of full scale (0.1 is 25.5 of 255) to every channel.",
        "delta", highest=1, ends=_either_way,
    ),
    "contrast": Operation(
        pixel.CONTRAST, "Scale about mid-grey (127.5) by a factor from 1 - amount to 1 + amount.",
        "amount", highest=1, ends=lambda low, high: (1 - high, 1 + high),
    ),
    "noise": Operation(
        pixel.NOISE, "Add Gaussian noise of this deviation, a fraction of full scale, to every value.",
        "deviation", highest=1, ranged=True,
    ),
    "salt_and_pepper": Operation(
        pixel.SALT_AND_PEPPER, "Make this fraction of the pixels white or black.", "rate", highest=1, ranged=True
    ),
    "cutout": Operation(
        pixel.CUTOUT, "Fill a square of side pixels, centred anywhere in the image, with the mean colour.",
        "side", lowest=1, whole=True,
    ),
}  # fmt: skip


if [operation.number for operation in OPERATIONS.values()] != list(range(pixel.OPERATION_COUNT)):
    raise AssertionError("OPERATIONS must be in the order of the numbers in pixel.py: a policy's rows are")


@dataclasses.dataclass(frozen=True)
class Policy:
    """A checked policy; made by `load_policy`.

    Attributes:
        name: For listings and logs.
        rows: By operation's number: its probability and the two ends of its range, in the kernels' units.
    """

    name: str
    rows: tuple[tuple[float, float, float], ...]

    @property
    def operations(self) -> tuple[int, ...]:
        """The numbers of the operations that are on."""
        return tuple(number for number, row in enumerate(self.rows) if row[0] > 0)

    @property
    def largest_shift(self) -> int:
        """Pixels that an image is moved by at most."""
        return int(self.rows[pixel.TRANSLATE][2]) if pixel.TRANSLATE in self.operations else 0

    @functools.cached_property
    def settings(self) -> Any:
        """`rows` as a float32 array [operations, 3], where the pipeline's arrays live."""
        return device.to_device(np.array(self.rows, np.float32))


def read(name: str) -> dict[str, Any]:
    """The file of a policy of the Hydra group as a mapping, with its `name`.

    Raises:
        PipelineError: There is no such policy, or its file is damaged.
    """
    from omegaconf import OmegaConf

    path = FOLDER / f"{name}.yaml"
    if path not in FOLDER.glob("*.yaml"):
        raise PipelineError(f"There is no augmentation policy {name!r}; known ones: {', '.join(names())}.")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # of OmegaConf's or of YAML's
        raise PipelineError(f"{path} is no readable policy ({first_line(error)}).") from None
    return {"name": name} | content


def names() -> list[str]:
    """The policies that `load_policy` knows by name, those of few operations first and damaged files last."""
    return sorted(sorted(path.stem for path in FOLDER.glob("*.yaml")), key=_operations)


def _operations(name: str) -> float:
    try:
        return len(read(name))
    except PipelineError:
        return math.inf


def load_policy(policy: str | Mapping[str, Any] | Policy) -> Policy:
    """Check a policy.

    Args:
        policy: A name from `names()`, or a mapping: operation to its `probability` (1 unless given) and its parameter,
            or to None for off. A key `name` names it. A `Policy` passes through.

    Raises:
        PipelineError: An unknown policy, operation or parameter (the sentence lists the known ones), or a value out of
            range.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        policy = read(policy)
    if not isinstance(policy, Mapping):
        raise PipelineError(f"An augmentation policy is a name or a mapping of operations, got {policy!r}.")
    given = dict(policy)
    name = str(given.pop("name", "custom"))
    unknown = [key for key in given if key not in OPERATIONS]
    if unknown:
        raise PipelineError(f"There is no augmentation {unknown[0]!r}; known ones: {', '.join(OPERATIONS)}.")
    return Policy(name, tuple(_row(key, operation, given.get(key)) for key, operation in OPERATIONS.items()))


def _row(name: str, operation: Operation, given: Any) -> tuple[float, float, float]:
    """Probability, low and high of one operation."""
    if given is None:
        return 0.0, 0.0, 0.0
    known = ["probability"] + ([operation.parameter] if operation.parameter else [])
    if not isinstance(given, Mapping):
        raise PipelineError(f"{name} must be null or have {' and '.join(known)}, got {given!r}.")
    for key in given:
        if key not in known:
            raise PipelineError(f"{name} has no {key!r}; it has {' and '.join(known)}.")
    probability = _number(f"{name}.probability", given.get("probability", 1), 0, 1)
    if operation.parameter is None:
        return probability, 0.0, 0.0
    label = f"{name}.{operation.parameter}"
    if operation.parameter not in given:
        raise PipelineError(f"{label} is missing; give a number, for example from `augment=strong`.")
    value = given[operation.parameter]
    pair = list(value) if isinstance(value, list | tuple) or type(value).__name__ == "ListConfig" else [value, value]
    if len(pair) != 2 or (pair[0] != pair[1] and not operation.ranged):
        wanted = "a number or a pair [low, high]" if operation.ranged else "one number"
        raise PipelineError(f"{label} must be {wanted}, got {value!r}.")
    low, high = (_number(label, end, operation.lowest, operation.highest, operation.whole) for end in pair)
    if low > high:
        raise PipelineError(f"{label} is {value!r}; the low end comes first.")
    return (probability, *(float(end) for end in operation.ends(low, high)))


def _number(label: str, value: Any, lowest: float, highest: float, whole: bool = False) -> float:
    right_type = isinstance(value, int) if whole else isinstance(value, int | float)
    if not right_type or isinstance(value, bool) or not lowest <= value <= highest or math.isinf(value):
        kind = "a whole number" if whole else "a number"
        limits = f"of at least {lowest}" if math.isinf(highest) else f"from {lowest} to {highest}"
        raise PipelineError(f"{label} must be {kind} {limits}, got {value!r}.")
    return float(value)
