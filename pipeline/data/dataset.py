"""The types of a dataset: `Split`, `Dataset`, and images that were rejected."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.core import device


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        images: uint8 [N, H, W, C], C-contiguous, C is 1 or 3 (RGB); CuPy on a GPU, NumPy without.
        labels: int32 [N], in the same place.
        sources: N strings, where each image came from: a cuDF Series on a GPU, a pandas Series without.
    """

    images: Any
    labels: Any
    sources: Any

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Any) -> Split:
        """The images at `indices` (int64 [M], where the images live), in that order; a copy in the same place."""
        where = indices if _on_device(self.sources) else device.to_numpy(indices)
        sources = self.sources.iloc[where].reset_index(drop=True)
        return Split(self.images[indices], self.labels[indices], sources)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """An image that was left out, and why."""

    path: str
    reason: str


def _on_device(series: Any) -> bool:
    return type(series).__module__.startswith("cudf")


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset:
    """A data set, ready to compute with.

    Attributes:
        name: Its name in this package.
        class_names: K names, in the order of the labels.
        train: The training split.
        validation: The validation split; empty where none was asked for.
        test: The test split.
        mean: Per-channel mean of the training split, in units of 0..1 (pixel / 255).
        std: Per-channel standard deviation, same units.
        digest: Digest of all decoded images, labels and class names; a copy elsewhere has the same.
        rejected: The images that could not be read and were left out, with the reason.
    """

    name: str
    class_names: list[str]
    train: Split
    validation: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    rejected: list[Rejected]

    @property
    def splits(self) -> dict[str, Split]:
        """The three splits by name: train, validation, test."""
        return {name: getattr(self, name) for name in SPLITS}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return tuple(self.train.images.shape[1:])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        return f"{self.name}: {sizes} images of {'×'.join(map(str, self.image_shape))} in {self.num_classes} classes"


SPLITS = ("train", "validation", "test")


SPLITS = ("train", "validation", "test")
