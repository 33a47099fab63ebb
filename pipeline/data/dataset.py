"""The types of a dataset: `Dataset`, its `Split`s, and the images that were `Rejected`."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.core import device

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        images: uint8 [N, H, W, C], C-contiguous, C is 1 or 3 (RGB); CuPy on a GPU, otherwise NumPy.
        labels: int32 [N], in the same memory.
        sources: N strings, the origin of each image: a cuDF Series on a GPU, otherwise a pandas Series.
    """

    images: Any
    labels: Any
    sources: Any

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Any) -> Split:
        """A copy of the images at `indices` (int64 [M], in the same memory as the images), in that order."""
        where = indices if type(self.sources).__module__.startswith("cudf") else device.to_numpy(indices)
        sources = self.sources.iloc[where].reset_index(drop=True)
        return Split(self.images[indices], self.labels[indices], sources)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """An image that was left out, and the reason."""

    path: str
    reason: str


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset:
    """A dataset in GPU memory, or in host memory if there is no GPU.

    Attributes:
        name: One of `pipeline.data.load.dataset_names()`.
        class_names: K names, in the order of the labels.
        train: The training split.
        validation: The validation split; may be empty.
        test: The test split.
        mean: Mean of each channel of the training split, in units of 0..1 (pixel / 255).
        std: Standard deviation of each channel, same units.
        digest: Digest of all decoded images, labels and class names; a copy of the data has the same digest.
        rejected: The images that could not be read and were left out.
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
