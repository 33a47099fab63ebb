"""A summary of a folder of images, which takes a second because no pixel is decoded.

summary = inspect_folder("photos")
summary.images_per_class, summary.widths, summary.grey_fraction
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.data.images import ImageError, image_shape
from pipeline.data.source import Contents, check_contents
from pipeline.data.sources import image_folder

_SAMPLE = 500  # images whose headers are read


@dataclasses.dataclass(frozen=True)
class FolderSummary:
    """What a folder for the dataset `image_folder` contains.

    Widths, heights, `grey_fraction` and `unreadable` come from the headers of `sampled` images; unreadable ones count
    only in `unreadable`.

    Attributes:
        class_names: K names, in the order of the labels.
        images_per_class: Number of training images by class; all images if there is no test folder.
        images_per_split: Number of images by split; the only split is ``train`` if there are no split folders.
        widths: The smallest, median and largest width in pixels.
        heights: The smallest, median and largest height in pixels.
        grey_fraction: Fraction of the images with one channel.
        sampled: Number of images whose headers were read, at most 500, spread evenly over the classes.
        unreadable: Number of these images whose header cannot be read.
    """

    class_names: list[str]
    images_per_class: dict[str, int]
    images_per_split: dict[str, int]
    widths: tuple[int, int, int]
    heights: tuple[int, int, int]
    grey_fraction: float
    sampled: int
    unreadable: int

    @property
    def total(self) -> int:
        """Number of images in all splits."""
        return sum(self.images_per_split.values())

    @property
    def smallest_class(self) -> tuple[str, int]:
        """Name and number of training images of the smallest class."""
        return min(self.images_per_class.items(), key=lambda item: item[1])

    @property
    def largest_class(self) -> tuple[str, int]:
        """Name and number of training images of the largest class."""
        return max(self.images_per_class.items(), key=lambda item: item[1])


def inspect_folder(data_dir: str | os.PathLike[str]) -> FolderSummary:
    """Count the images of a folder by the rules of the dataset `image_folder`, and read some of their headers.

    Args:
        data_dir: The folder.

    Returns:
        The summary.

    Raises:
        PipelineError: As for loading the dataset: the folder is missing, has fewer than two classes, or a class has no
            training images; or no header of the sample can be read.
        OSError: A folder cannot be read.
    """
    root = Path(data_dir).expanduser().resolve()
    class_names, files = image_folder.find(root)
    labels = image_folder.labels_of(files)
    check_contents(Contents(class_names, labels, lambda _: ()), str(root))
    counts = np.bincount(labels["train"], minlength=len(class_names)).tolist()
    sample = _spread(files, len(class_names))
    shapes, reason = [], ""
    for path in sample:
        try:
            shapes.append(image_shape(path))
        except ImageError as error:
            reason = f"{error.path} ({error.reason})"
    if not shapes:
        raise PipelineError(f"None of {len(sample)} images can be read, such as {reason}; replace them.", exit_code=1)
    heights, widths, channels = np.array(shapes).T
    return FolderSummary(
        class_names=class_names,
        images_per_class=dict(zip(class_names, counts, strict=True)),
        images_per_split={split: len(part) for split, part in files.items()},
        widths=_range(widths),
        heights=_range(heights),
        grey_fraction=float((channels == 1).mean()),
        sampled=len(sample),
        unreadable=len(sample) - len(shapes),
    )


def _spread(files: dict[str, list[tuple[Path, int]]], classes: int) -> list[Path]:
    """At most `_SAMPLE` images, the same number of each class, at even distances in the order of the files."""
    members: list[list[Path]] = [[] for _ in range(classes)]
    for part in files.values():
        for path, label in part:
            members[label].append(path)
    return _evenly([path for paths in members for path in _evenly(paths, -(-_SAMPLE // classes))], _SAMPLE)


def _evenly(items: list[Path], limit: int) -> list[Path]:
    return [items[index * len(items) // limit] for index in range(limit)] if len(items) > limit else items


def _range(values: np.ndarray) -> tuple[int, int, int]:
    return int(values.min()), round(float(np.median(values))), int(values.max())
