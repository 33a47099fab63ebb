"""The settings as validated, immutable objects; `pipeline.core.config.compose` makes them from `pipeline/conf`.

settings = Settings.parse({"dataset": {"name": "digits"}, "epochs": 5, ...})
settings.dataset.image_size
settings.model_copy(update={"precision": "float32"})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from pipeline.core.errors import PipelineError

MAX_PIXELS = 64_000_000


def _image_size(value: Any) -> int | tuple[int, int] | None:
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not all(type(side) is int and side >= 1 for side in pair) or pair[0] * pair[1] > MAX_PIXELS:
        raise ValueError("one number of pixels, or [height, width], of at most 64 megapixels")
    return pair if isinstance(value, list | tuple) else value


Name = Annotated[str, Field(coerce_numbers_to_str=True, strict=False)]
Names = Annotated[tuple[Name, ...] | None, Field(strict=False)]
PathText = Annotated[str | None, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any], prefix: str = "") -> Self:
        """Validate values and return the settings.

        Args:
            values: The settings by name, as plain Python objects.
            prefix: Name of the group in error messages, such as ``dataset``.

        Raises:
            PipelineError: A setting is missing, unknown, of the wrong type or out of range.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise settings_error(error, prefix) from error

    def plain(self) -> dict[str, Any]:
        """The settings that were set explicitly, as dictionaries and lists that can be written to a file."""
        return self.model_dump(mode="json", exclude_unset=True)


class DatasetSettings(_Model):
    """The arguments of `pipeline.data.load.load_dataset`, whose docstring describes them."""

    name: str = "digits"
    data_dir: PathText = None
    image_size: Annotated[Any, PlainValidator(_image_size)] = None
    channels: Literal[1, 3, None] = None
    class_names: Names = None
    file: PathText = None
    file_column: Name | None = None
    label_column: Name | None = None
    split_column: Name | None = None
    test_fraction: Fraction = 0.2
    validation_fraction: Fraction = 0.1
    seed: int = 0
    classes: Names = None
    limit_per_class: PositiveInt | None = None
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.01
    cache_dir: PathText = None
    progress: bool = True

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels, or None if the images keep their size."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


class OptimizerSettings(_Model):
    """The name, the peak learning rate and the other arguments of the Keras optimizer."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[float, Field(ge=0)] | None]

    name: str
    learning_rate: PositiveFloat
    backbone_factor: Annotated[float, Field(ge=0, le=1)] = 1.0
    global_clipnorm: PositiveFloat | None = None
    nesterov: bool = False


class ModelSettings(_Model):
    """The name of a network in `pipeline.models` and its options; the network checks the options."""

    model_config = ConfigDict(extra="allow")

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The network's options without its name."""
        return dict(self.model_extra or {})


class Settings(_Model):
    """All settings of a training; `pipeline/conf/config.yaml` describes each of them."""

    dataset: DatasetSettings
    optimizer: OptimizerSettings
    model: ModelSettings
    augment: dict[str, Any]  # checked by pipeline.augment.load_policy
    name: str | None
    resume: str | None
    data_dir: str | None
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    epochs: PositiveInt
    batch_size: PositiveInt
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"]
    schedule: Literal["one_cycle", "cosine", "constant"]
    warmup: Fraction
    learning_rate_scaling: Literal["auto", "none", "linear", "sqrt"] = "none"  # older runs do not contain it
    label_smoothing: Fraction
    class_weights: Literal["none", "balanced"] = "none"
    plan: Literal["auto", "only", "none"] = "none"
    init: PathText = None
    early_stopping: PositiveInt | None
    tracker: Literal["none", "wandb", None]
    cluster: Literal["none", "slurm", "environment"]
    communication: Literal["auto", "nccl", "ring"]
    xla: Literal["auto", True, False, "clusters"]
    data_digest: str | None = None  # of the dataset; written by the training


def settings_error(error: ValidationError, prefix: str = "") -> PipelineError:
    """Convert the first problem of a validation to a `PipelineError` that names the setting and both values.

    Args:
        prefix: Name of the group that was validated, such as ``dataset``.
    """
    first = error.errors()[0]
    name = ".".join([prefix] * bool(prefix) + [str(part) for part in first["loc"]])
    if first["type"] == "missing":
        return PipelineError(f"The setting {name} is missing.")
    if first["type"] == "extra_forbidden":
        return PipelineError(f"There is no setting {name}.")
    if first["type"] in ("model_type", "dict_type"):
        return PipelineError(f"{name} must be a group of settings, got {first['input']!r}.")
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    for python, yaml in (("valid tuple", "list"), ("True", "true"), ("False", "false"), ("None", "null")):
        expected = expected.replace(python, yaml)
    return PipelineError(f"{name} must be {expected}, got {first['input']!r}.")
