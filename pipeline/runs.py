"""The run folder: what training leaves, and how everything after it finds that.

run = runs.find()                 # runs/latest
run.load_model().predict(images)  # uint8 in, probabilities out
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shlex
import sys
from pathlib import Path
from typing import Any

from pipeline.core import files
from pipeline.core.errors import PipelineError, first_line
from pipeline.data.load import load_from_settings

RUNS = Path("runs")


LATEST = RUNS / "latest"


TRAIN_COMMAND = "python -m pipeline.train dataset=digits name=first"


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a trained model is and what it was trained on; everything a prediction needs beside the weights.

    Attributes:
        name: The run's name.
        model: The network's name in `pipeline.models`.
        dataset: The data set's name in `pipeline.datasets`.
        class_names: K names, in the order of the model's outputs.
        input_shape: (H, W, C) of the uint8 images the model takes.
        mean: Per-channel mean of the training split, in units of pixel / 255.
        std: Per-channel standard deviation, same units.
        precision: The precision the network was trained in.
        parameters: Number of weights.
        data_digest: Digest of the source data.
        versions: What `device.describe` gave when the run finished.
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
        """Read a `model_card.json`; raises `PipelineError` where it is missing or damaged."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields = {k: tuple(v) if k in ("input_shape", "mean", "std") else v for k, v in fields.items()}
            fields["class_names"] = [str(name) for name in fields["class_names"]]
            return cls(**fields)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise PipelineError(f"{path} is no readable model card ({error}); train again: {TRAIN_COMMAND}") from None

    def write(self, path: Path) -> None:
        files.write_json(path, dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run folder.

    Attributes:
        path: The folder, resolved (never the link ``runs/latest``).
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
        """Where exported artifacts are; the folder is there once something was exported."""
        return self.path / "export"

    def make_export_dir(self) -> Path:
        """`export_dir`, made where it is not there yet.

        Raises:
            PipelineError: It cannot be made.
        """
        try:
            self.export_dir.mkdir(exist_ok=True)
        except OSError as error:
            raise files.disk_error(self.export_dir, error) from None
        return self.export_dir

    @property
    def card(self) -> ModelCard:
        return ModelCard.read(self.path / "model_card.json")

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration the run was trained with."""
        from omegaconf import OmegaConf

        path = self.path / "config.yaml"
        try:
            settings = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except Exception as error:  # of the disk's, of OmegaConf's or of YAML's
            raise PipelineError(f"{path} cannot be read ({first_line(error)}).") from None
        if not isinstance(settings, dict) or not isinstance(settings.get("dataset"), dict):
            raise PipelineError(f"{path} is damaged (it names no data set); train again: {TRAIN_COMMAND}")
        return settings

    @property
    def metrics(self) -> dict[str, Any]:
        path = self.path / "metrics.json"
        try:
            figures = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PipelineError(f"{path} cannot be read ({error}).") from None
        if not isinstance(figures, dict):
            raise PipelineError(f"{path} is damaged (it holds no table of figures); remove it.")
        return figures

    def load_model(self) -> Any:
        """The trained Keras model: uint8 [N, H, W, C] in, float32 probabilities [N, K] out.

        Raises:
            PipelineError: The file is missing or damaged.
        """
        from pipeline import models

        return models.load(self.model_path)

    def load_dataset(self, **overrides: Any) -> Any:
        """The `pipeline.datasets.Dataset` the run was trained on; `overrides` replace its settings (`data_dir`, …)."""

        return load_from_settings(self.config["dataset"], **overrides)

    def check_dataset(self, dataset: Any) -> None:
        """Raise `PipelineError` unless `dataset` has the classes and the image shape the run was trained on.

        Where its images are others than then, a note on standard error says so: the splits are drawn anew, and images
        that were trained on may now be called test images.
        """
        card, shape = self.card, tuple(dataset.image_shape)
        if list(dataset.class_names) != list(card.class_names) or shape != tuple(card.input_shape):
            raise PipelineError(
                f"The data set {dataset.name} ({len(dataset.class_names)} classes, images of {shape}) is not what the "
                f"run {self.name} was trained on ({len(card.class_names)} classes, images of {card.input_shape}); give "
                "the run's own data, or where it is now (--data-dir)."
            )
        if dataset.digest != card.data_digest:
            print(
                f"note: the data set {dataset.name} has changed since {self.name} was trained; some of these images "
                "may have been trained on",
                file=sys.stderr,
            )


def find(run: str | os.PathLike[str] | None = None) -> Run:
    """The finished run in a folder, by path or by name; the newest one (``runs/latest``) by default.

    Raises:
        PipelineError: There is none; the sentence names the command that makes one.
    """
    wanted = Path(run) if run is not None else LATEST
    candidates = [wanted, RUNS / wanted]
    for folder in candidates:
        if (folder / "model.keras").is_file():
            return Run(folder.resolve())
    if run is None:
        raise PipelineError(f"There is no finished run yet ({LATEST} is missing); make one: {TRAIN_COMMAND}")
    import difflib

    every = names()
    near = difflib.get_close_matches(wanted.name, every, 3, 0.5)
    shown = every if len(every) <= 10 else list(dict.fromkeys([*near, *every[-5:]]))
    more = f" and {len(every) - len(shown)} more" if len(shown) < len(every) else ""
    known = (", ".join(shown) or "none") + more
    if any(folder.is_dir() for folder in candidates):
        started = next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)
        way_on = f"go on with it: python -m pipeline.train resume={shlex.quote(str(started))}; " if started else ""
        raise PipelineError(f"The run {wanted} is not finished (no model.keras in it); {way_on}finished runs: {known}.")
    raise PipelineError(f"There is no run {wanted}; finished runs: {known}. Make one: {TRAIN_COMMAND}")


def names() -> list[str]:
    """Names of the finished runs below ``runs/`` (a multirun's are named SWEEP/JOB), oldest first."""
    return [str(run.path.relative_to(RUNS.resolve())) for run in below(RUNS)]


def below(folder: Path) -> list[Run]:
    """The finished runs in a folder and in the folders of multiruns in it, oldest first."""
    models = [*folder.glob("*/model.keras"), *folder.glob("*/*/model.keras")]
    finished = {model.parent.resolve() for model in models if not model.parent.is_symlink()}
    return [Run(path) for path in sorted(finished, key=lambda path: (path / "model.keras").stat().st_mtime)]


def set_latest(run: Path) -> None:
    """Point ``runs/latest`` at `run`, in one step."""
    check_latest()
    link = RUNS / f".latest-{secrets.token_hex(4)}"
    try:
        link.symlink_to(os.path.relpath(run, RUNS), target_is_directory=True)
        link.replace(LATEST)
    except OSError as error:
        link.unlink(missing_ok=True)
        raise files.disk_error(LATEST, error) from None


def check_latest() -> None:
    """Raise `PipelineError` where something else has taken the place of the link ``runs/latest``."""
    if LATEST.exists() and not LATEST.is_symlink():
        raise PipelineError(f"{LATEST} is no link but a file or folder of its own; move it away or rename it.")
