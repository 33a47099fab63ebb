"""Run folders: find a finished run, load its model and dataset, and read its settings and metrics.

run = runs.find()                 # runs/latest
run.load_model().predict(images)  # uint8 in, probabilities out
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shlex
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline.core import files
from pipeline.core.errors import PipelineError, first_line
from pipeline.core.settings import Settings
from pipeline.data.load import load_from_settings

RUNS = Path("runs")
LATEST = RUNS / "latest"
TRAIN_COMMAND = "python -m pipeline.train dataset=digits name=first"


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """Description of a trained model; with the weights, it is all that a prediction needs.

    Attributes:
        name: The run's name.
        model: The network's name in `pipeline.models`.
        dataset: The dataset's name in `pipeline.data.load`.
        class_names: K names, in the order of the model's outputs.
        input_shape: (H, W, C) of the model's uint8 images.
        mean: Per-channel mean of the training split, in units of pixel / 255.
        std: Per-channel standard deviation, same units.
        precision: The precision in which the network was trained.
        parameters: Number of weights.
        data_digest: Digest of the source data.
        versions: Result of `device.describe()` at the end of the training.
    """

    name: str
    model: str
    dataset: str
    class_names: list[str]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str
    parameters: int
    data_digest: str
    versions: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> ModelCard:
        """Read a `model_card.json`.

        Raises:
            PipelineError: The file is missing or damaged.
        """
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            message = f"The model card {path} cannot be read ({first_line(error)}); train again: {TRAIN_COMMAND}"
            raise PipelineError(message) from error

    def write(self, path: Path) -> None:
        """Write the card as JSON; raises `DiskError` if that fails."""
        files.write_json(path, dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run folder.

    Attributes:
        path: The absolute path of the folder (not the link ``runs/latest``).
    """

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def model_path(self) -> Path:
        return self.path / "model.keras"

    @property
    def export_dir(self) -> Path:
        """The folder of exported models; the first export creates it."""
        return self.path / "export"

    @property
    def card(self) -> ModelCard:
        """The content of `model_card.json`; raises `PipelineError` if it is missing or damaged."""
        return ModelCard.read(self.path / "model_card.json")

    @property
    def config(self) -> Settings:
        """The resolved settings of the training.

        Raises:
            PipelineError: `config.yaml` is missing or damaged.
        """
        import yaml
        from omegaconf import OmegaConf

        path = self.path / "config.yaml"
        try:
            return Settings.parse(OmegaConf.to_container(OmegaConf.load(path)))
        except (OSError, ValueError, TypeError, yaml.YAMLError, PipelineError) as error:
            raise PipelineError(f"{path} cannot be read ({first_line(error)}); train again: {TRAIN_COMMAND}") from error

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of `metrics.json`.

        Raises:
            PipelineError: The file is missing or damaged.
        """
        path = self.path / "metrics.json"
        try:
            return TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise PipelineError(f"{path} cannot be read ({first_line(error)}); remove it.") from error

    def load_model(self) -> Any:
        """Load the trained Keras model.

        Returns:
            A `keras.Model` from uint8 images [N, H, W, C] to float32 probabilities [N, K].

        Raises:
            PipelineError: The file is missing or damaged.
        """
        from pipeline import models

        return models.load(self.model_path)

    def load_dataset(self, **overrides: Any) -> Any:
        """Load the dataset that the run was trained on.

        Args:
            overrides: Dataset settings to replace, such as `data_dir`; None keeps the setting.

        Returns:
            A `pipeline.data.dataset.Dataset`.

        Raises:
            PipelineError: As for `pipeline.data.load.load_dataset`.
        """
        return load_from_settings(self.config.dataset, **overrides)

    def check_dataset(self, dataset: Any) -> None:
        """Check that a dataset has the classes and the image shape of the training.

        If the images have changed since the training, this prints a note on standard error, because some of the test
        images may have been training images.

        Raises:
            PipelineError: The classes or the image shape differ.
        """
        card, shape = self.card, tuple(dataset.image_shape)
        if list(dataset.class_names) != list(card.class_names) or shape != tuple(card.input_shape):
            raise PipelineError(
                f"Expected the dataset of the run {self.name} ({len(card.class_names)} classes, images of "
                f"{tuple(card.input_shape)}), got {dataset.name} ({len(dataset.class_names)} classes, images of "
                f"{shape}); pass its folder with --data-dir."
            )
        if dataset.digest != card.data_digest:
            print(
                f"note: the dataset {dataset.name} has changed since {self.name} was trained; some of these images may "
                "have been training images",
                file=sys.stderr,
            )


def find(run: str | os.PathLike[str] | None = None) -> Run:
    """Find a finished run.

    Args:
        run: The path or the name of the run; default: the newest run (``runs/latest``).

    Raises:
        PipelineError: The run is missing or not finished; the message contains the command that trains or resumes it.
    """
    wanted = Path(run) if run is not None else LATEST
    candidates = [wanted, RUNS / wanted]
    for folder in candidates:
        if (folder / "model.keras").is_file():
            return Run(folder.resolve())
    if run is None:
        raise PipelineError(f"There is no finished run yet ({LATEST} is missing); train one: {TRAIN_COMMAND}")
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            resume = f"python -m pipeline.train resume={shlex.quote(str(folder))}"
            raise PipelineError(f"The run {wanted} is not finished; resume it: {resume}")
    known = ", ".join(str(model.parent.relative_to(RUNS)) for model in _models(RUNS)[-10:]) or "none"
    raise PipelineError(f"There is no finished run {wanted}; newest runs: {known}; train one: {TRAIN_COMMAND}")


def below(folder: Path) -> list[Run]:
    """The finished runs one or two levels below `folder`, oldest first."""
    return [Run(path) for path in dict.fromkeys(model.parent.resolve() for model in _models(folder))]


def _models(folder: Path) -> list[Path]:
    found = [*folder.glob("*/model.keras"), *folder.glob("*/*/model.keras")]
    return sorted((model for model in found if not model.parent.is_symlink()), key=lambda model: model.stat().st_mtime)


def set_latest(run: Path) -> None:
    """Point ``runs/latest`` to `run` atomically.

    Raises:
        PipelineError: ``runs/latest`` is not a link, or cannot be written.
    """
    check_latest()
    link = RUNS / f".latest-{secrets.token_hex(4)}"
    try:
        link.symlink_to(os.path.relpath(run, RUNS), target_is_directory=True)
        link.replace(LATEST)
    except OSError as error:
        link.unlink(missing_ok=True)
        raise files.disk_error(LATEST, error) from error


def check_latest() -> None:
    """Check that ``runs/latest`` is a link or does not exist.

    Raises:
        PipelineError: It is a file or a folder.
    """
    if LATEST.exists() and not LATEST.is_symlink():
        raise PipelineError(f"Expected {LATEST} to be a link, got a file or folder; rename or move it.")
