"""Augmentation policies: which operations are applied to an image, with what probability and range.

load_policy("standard")  # a file in pipeline/conf/augment
load_policy({"flip": {"probability": 0.5}, "rotate": {"degrees": 10}})
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError, create_model

from pipeline.augment.operations import OPERATIONS, Operation
from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line
from pipeline.core.settings import settings_error

FOLDER = Path(__file__).parent.parent / "conf" / "augment"


class _Policy(BaseModel):
    """A checked policy; made by `load_policy`. An operation that is None is not applied.

    `mixup` and `cutmix` are the settings alpha of the batch operations (`pipeline.augment.mix`); 0 switches them off.
    """

    model_config = Operation.model_config

    name: str = "custom"
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of the operations with a probability above 0, in the order in which they are applied."""
        chosen = ((name, getattr(self, name)) for name in OPERATIONS)
        return tuple(name for name, operation in chosen if operation and operation.probability > 0)

    @property
    def max_shift(self) -> int:
        """The largest possible translation in pixels."""
        return self.translate.pixels if "translate" in self.operations else 0

    @functools.cached_property
    def settings(self) -> Any:
        """`rows` of `operations` on the pipeline's device."""
        return device.to_device(self.rows(self.operations))

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """float32 [operations, 6]: number, probability and four values of each operation, in host memory."""
        rows = np.zeros((len(names), 6), np.float32)
        for row, name in zip(rows, names, strict=True):
            operation = getattr(self, name)
            if operation:
                values = operation.values()
                row[: 2 + len(values)] = OPERATIONS[name].number, operation.probability, *values
        return rows


Policy = create_model(
    "Policy", __base__=_Policy, **{name: (operation | None, None) for name, operation in OPERATIONS.items()}
)
Policy.__doc__ = _Policy.__doc__


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
            parameter; an operation that is missing or None is not applied. The keys `name`, `mixup` and `cutmix` are
            optional. A `Policy` is returned unchanged.

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
