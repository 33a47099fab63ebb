"""Choose the settings of a training from a folder of images, where the user has not set them.

planned = plan.complete(["dataset=image_folder", "data_dir=photos"])
print("\n".join(planned.lines))
run = train(planned.settings)
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core import config, device
from pipeline.core.errors import PipelineError
from pipeline.core.settings import Settings

PLANNED_DATASETS = ("image_folder",)
SMALLEST_PHOTO = 32  # pixels; smaller images contain little that a pretrained network knows
LARGEST_CLASS = 1000  # images per class; with more, training from scratch is an alternative
GREY = 0.5  # fraction of grey images from which on the dataset counts as grey
IMBALANCE = 3.0
NATIVE_SIZE = 224
MIN_STEPS = 800
MEMORY_FRACTION = 0.5
BYTES_PER_PIXEL = {"pretrained": 1600, "other": 2600}  # of layer outputs and gradients, per input pixel of the network
CPU_IMAGES_PER_SECOND = {"pretrained": 12.5, "head": 80.0}  # for each core, at 224×224


def read_overrides(words: list[str], unknown: list[str]) -> list[str]:
    """Check the words of the command line, and replace a folder of images at the beginning by its settings.

    Args:
        words: Arguments without a leading ``-``.
        unknown: Options that the command does not have.

    Raises:
        PipelineError: An argument is not a setting; the message says how to write it.
    """
    if unknown:
        name, _, value = unknown[0].lstrip("-").partition("=")
        following = value or next((word for word in words if "=" not in word), "VALUE")
        raise PipelineError(f"There is no option {unknown[0]}; write {name.replace('-', '_')}={following}")
    if words and "=" not in words[0] and Path(words[0]).is_dir():
        words = ["dataset=image_folder", f"data_dir={words[0]}", *words[1:]]
    for index, word in enumerate(words):
        if "=" not in word and not word.startswith("~"):
            before = words[index - 1] if index else ""
            advice = f"quote a value with spaces: {shlex.quote(f'{before} {word}')}" if before else "see --help"
            raise PipelineError(f"Expected SETTING=VALUE, got {word!r}; {advice}")
    return words


class Plan(NamedTuple):
    """The result of `complete`.

    Attributes:
        overrides: The planned overrides and those of the user.
        settings: The settings that they compose.
        lines: The plan as text; empty if nothing was planned.
    """

    overrides: list[str]
    settings: Settings
    lines: list[str]


def complete(overrides: Sequence[str]) -> Plan:
    """Add the planned settings to those of the user, which have priority.

    Args:
        overrides: As for `config.compose`.

    Returns:
        The plan. Nothing is added, and there is no text, for a resumed run, for an experiment, for ``plan=none`` and
        for datasets other than a folder of images.

    Raises:
        PipelineError: A setting is invalid, or the folder contains no classes.
    """
    settings = config.compose(overrides)
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    planned = settings.dataset.name in PLANNED_DATASETS and settings.plan != "none"
    if not planned or settings.resume is not None or "experiment" in given:
        return Plan(list(overrides), settings, [])
    from pipeline.data.inspect import inspect_folder

    summary = inspect_folder(settings.dataset.data_dir)
    chosen, reasons = choose(summary, settings, given)
    added = [f"{key}={value}" for key, value in chosen.items() if key not in given]
    overrides = [*added, *overrides]
    settings = config.compose(overrides)
    return Plan(overrides, settings, describe(summary, settings, reasons))


def choose(summary: Any, settings: Settings, given: set[str]) -> tuple[dict[str, Any], str]:
    """The planned settings by name, and the reason for the network in a few words."""
    dataset = settings.dataset
    images = training_images(summary, settings)
    shorter = min(summary.widths[1], summary.heights[1])
    size = min(dataset.size) if dataset.size else shorter
    if dataset.channels == 1 or (dataset.channels is None and summary.grey_fraction > GREY):
        pretrained, reason = False, "the images are grey"
    elif size < SMALLEST_PHOTO:
        pretrained, reason = False, f"the images are smaller than {SMALLEST_PHOTO} pixels"
    elif images > LARGEST_CLASS * len(summary.class_names):
        pretrained, reason = False, f"there are more than {LARGEST_CLASS} images per class"
    else:
        pretrained, reason = True, "colour photos, few per class"
    chosen: dict[str, Any] = {}
    same_size = summary.widths[0] == summary.widths[2] and summary.heights[0] == summary.heights[2]
    if dataset.size is None and (not same_size or shorter > NATIVE_SIZE):
        chosen["dataset.image_size"] = min(NATIVE_SIZE, shorter) if pretrained else min(64, shorter)
    if dataset.channels is None and 0 < summary.grey_fraction < 1:
        chosen["dataset.channels"] = 1 if summary.grey_fraction > GREY else 3
    if "model" not in given:
        chosen["model"] = "pretrained" if pretrained else "cnn"
    name = chosen.get("model", settings.model.name)
    if name == "pretrained":
        chosen |= {"optimizer": "adamw", "augment": "photos", "epochs": 5, "batch_size": 16}
        if "optimizer" not in given:
            chosen |= {"optimizer.learning_rate": 1e-3, "optimizer.backbone_factor": 0.2}
    else:
        batch = next(
            batch for batch, most in ((16, 2_000), (32, 5_000), (64, 20_000), (128, math.inf)) if images < most
        )
        epochs = max(10, math.ceil(MIN_STEPS / max(images // batch, 1)))
        chosen |= {"optimizer": "adam", "epochs": epochs, "batch_size": batch}
        if "optimizer" not in given:
            chosen["optimizer.learning_rate"] = 2e-3
    side = chosen.get("dataset.image_size", size)
    chosen["batch_size"] = fitting_batch(
        chosen["batch_size"], name, NATIVE_SIZE if name == "pretrained" else side, images
    )
    if summary.largest_class[1] > IMBALANCE * summary.smallest_class[1]:
        chosen["class_weights"] = "balanced"
    return chosen, reason


def fitting_batch(batch: int, network: str, side: int, images: int) -> int:
    """Halve a batch size until the layer outputs of a step fit into half of the free memory."""
    bytes_per_image = side**2 * BYTES_PER_PIXEL["pretrained" if network == "pretrained" else "other"]
    while batch > 1 and (batch > images or batch * bytes_per_image > MEMORY_FRACTION * device.free_memory()):
        batch //= 2
    return batch


def training_images(summary: Any, settings: Settings) -> int:
    """The number of images in the training split."""
    images = sum(summary.images_per_class.values())
    if "test" not in summary.images_per_split:
        images -= round(images * settings.dataset.test_fraction)
    return images - round(images * settings.dataset.validation_fraction)


def describe(summary: Any, settings: Settings, reason: str) -> list[str]:
    """The plan as lines of text."""
    images = training_images(summary, settings)
    sizes = [f"{width}×{height}" for width, height in zip(summary.widths, summary.heights, strict=True)]
    height, width = settings.dataset.size or (summary.heights[1], summary.widths[1])
    steps = max(images // settings.batch_size, 1)
    network = settings.model.name
    if network == "pretrained":
        network = f"{settings.model.options.get('backbone', 'efficientnet_lite0')}, pretrained on ImageNet ({reason})"
    (smallest, least), (largest, most) = summary.smallest_class, summary.largest_class
    lines = [
        f"plan for {os.path.relpath(settings.dataset.data_dir)} (set any value yourself, as in epochs=20 or model=cnn)",
        f"  images    {summary.total:,} in {len(summary.class_names)} classes, {images:,} for training; "
        f"smallest class: {smallest} ({least:,}), largest: {largest} ({most:,})",
        f"  sizes     {' to '.join(dict.fromkeys(sizes[::2]))} pixels, used as {width}×{height}",
        f"  network   {network}",
        f"  training  {settings.epochs} epochs of {steps} steps with {settings.batch_size} images; "
        f"{settings.optimizer.name} with learning rate {settings.optimizer.learning_rate:g}",
    ]
    if settings.class_weights == "balanced":
        lines.append(
            f"  classes   weighted in the loss, because their sizes differ by more than a factor of {IMBALANCE:g}"
        )
    seconds = expected_seconds(settings, images, summary.total)
    if seconds is not None:
        lines.append(f"  time      about {max(1, math.ceil(seconds / 60))} min on {device.usable_cores()} cores")
    return lines


def expected_seconds(settings: Settings, images: int, total: int) -> float | None:
    """Estimate the training time on a CPU from speeds measured on two cores; None where nothing was measured."""
    if device.has_gpu() or settings.model.name != "pretrained":
        return None
    frozen = settings.model.options.get("trainable") == "head"
    cores = device.usable_cores()
    speed, forward = (cores * CPU_IMAGES_PER_SECOND[kind] for kind in ("head" if frozen else "pretrained", "head"))
    return 20 + settings.epochs * (images / speed + (total - images) / 4 / forward) + total / forward
