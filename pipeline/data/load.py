"""Load a dataset from any source into one type.

dataset = load_dataset("digits")
dataset = load_dataset("cifar10", "../data", limit_per_class=100)
dataset = load_dataset("image_folder", "my_photos", image_size=64)
dataset.train.images       # uint8 [N, H, W, C], on the GPU if there is one

To add a source, add a module to `pipeline.data.sources`, its name to `_SOURCES`, and a file to `pipeline/conf/dataset`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import device, files
from pipeline.core.errors import PipelineError
from pipeline.core.settings import DatasetSettings
from pipeline.data import cache, near_duplicates, statistics
from pipeline.data.dataset import Dataset, Rejected, Split
from pipeline.data.images import decoder_version
from pipeline.data.source import Source, check_contents, decode

_SOURCES = ("digits", "cifar10", "fashion_mnist", "tiny_imagenet", "parquet", "image_folder", "table")
_OWN_DATA = ("parquet", "image_folder", "table")  # whose splits the user can change
_ONLY_FOR = {  # the dataset of each setting that only one of them uses
    "class_names": "parquet", "file": "table", "file_column": "table", "label_column": "table", "split_column": "table",
}  # fmt: skip
_TEST_SEED = 0  # fixed, so that no run trains on another run's test images
_log = logging.getLogger(__name__)
_warn_once = functools.cache(_log.warning)


def dataset_names() -> list[str]:
    """The names that `load_dataset` accepts."""
    return list(_SOURCES)


def load_dataset(
    name: str = "digits",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    class_names: Sequence[str] | None = None,
    file: str | None = None,
    file_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    limit_per_class: int | None = None,
    max_rejected: float = 0.01,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Dataset:
    """Load a dataset: decode its images in parallel the first time, then read them from the Parquet cache.

    Args:
        name: One of `dataset_names()`.
        data_dir: The folder with the data; the module of each source describes what it searches for there.
        image_size: Height and width of all images in pixels (one number for both): the shorter side is resized to
            fit, the longer one cropped around the centre. None keeps the size, which must be the same for all images.
        channels: 1 converts all images to grey, 3 to RGB. None keeps the channels, which must be the same for all.
        class_names: The names of labels 0 to K - 1, for `parquet` files without class names.
        file: The name of the ``table`` in `data_dir`, if that is a folder with several CSV or Parquet files.
        file_column: The column of the ``table`` with the file names; by default ``file`` or another usual name.
        label_column: The column with the labels; by default ``label`` or ``class``.
        split_column: The column with the splits; by default ``split`` if the table has it.
        test_fraction: Fraction of each class for the test split if the source has none; the choice does not depend on
            `seed`.
        validation_fraction: Fraction of the training images of each class for the validation split if the source
            has none; `seed` chooses them, and 0 leaves the split empty.
        seed: Seed for the validation split and for `limit_per_class`.
        classes: Keep only these classes, with new labels in the order of the source.
        limit_per_class: Maximum number of images per class in each split of the source.
        max_rejected: Fraction of the images that may be unreadable.
        cache_dir: The cache folder; by default ``$PIPELINE_CACHE``, else the user's cache folder.
        progress: Show progress bars on a terminal.

    Returns:
        The dataset; arrays are CuPy on a GPU, otherwise NumPy.

    Raises:
        PipelineError: A setting is wrong, the data is missing or unusable, too many images are unreadable, or the disk
            or the memory is full.

    Example:
        >>> dataset = load_dataset("digits", progress=False)
        >>> dataset
        digits: 1,293 train, 145 validation, 359 test images of 32×32×1 in 10 classes
    """
    return load_from_settings(DatasetSettings(), **locals())


@device.explain_out_of_memory(
    "set a smaller image_size or fewer classes, or PIPELINE_DEVICE=cpu if the machine has more memory than its GPU"
)
def load_from_settings(settings: DatasetSettings, **replaced: Any) -> Dataset:
    """`load_dataset` with validated settings.

    Args:
        settings: The settings.
        replaced: Settings to replace; None keeps the setting.

    Raises:
        PipelineError: As for `load_dataset`.
    """
    replaced = {name: value for name, value in replaced.items() if value is not None}
    settings = DatasetSettings.parse(settings.model_dump() | replaced, "dataset")
    if settings.name not in _SOURCES:
        raise PipelineError(f"There is no dataset {settings.name!r}; choose one of: {', '.join(_SOURCES)}.")
    for setting, name in _ONLY_FOR.items():
        if getattr(settings, setting) is not None and settings.name != name:
            raise PipelineError(f"{setting} is only for the dataset {name!r}, got {settings.name!r}; leave it out.")
    data_dir = Path(settings.data_dir).expanduser().resolve() if settings.data_dir is not None else None
    source = importlib.import_module(f"pipeline.data.sources.{settings.name}").source(data_dir, settings)
    header, splits = _cached(source, settings)

    class_names = header.class_names
    if "test" not in splits:
        splits["train"], splits["test"] = _divide(splits["train"], settings.test_fraction, _TEST_SEED)
    if settings.classes is not None:
        for name, split in splits.items():
            indices, labels, class_names = statistics.select_classes(split.labels, header.class_names, settings.classes)
            splits[name] = dataclasses.replace(split.take(indices), labels=labels)
        if len(class_names) < 2:
            raise PipelineError(f"A classifier needs at least two classes, got classes={list(settings.classes)}.")
    if settings.limit_per_class is not None:
        for name, split in splits.items():
            chosen = statistics.limit_per_class(split.labels, settings.limit_per_class, settings.seed)
            splits[name] = split.take(chosen)
    if "validation" not in splits:
        splits["train"], splits["validation"] = _divide(splits["train"], settings.validation_fraction, settings.seed)
    counts = np.bincount(device.to_numpy(splits["train"].labels), minlength=len(class_names))
    if counts.min() == 0:
        raise PipelineError(
            f"The class {class_names[int(counts.argmin())]!r} of {source.location} has no readable training images; "
            "add some or remove the class.",
            exit_code=1,
        )
    mean, std = statistics.channel_statistics(splits["train"].images)
    if settings.name in _OWN_DATA:
        _report_near_duplicates(splits, source.location)
    parts = (splits["train"], splits["validation"], splits["test"])
    return Dataset(settings.name, class_names, *parts, mean, std, header.content, header.rejected)


def _divide(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    remaining, held_out = statistics.stratified_split(split.labels, fraction, seed)
    return split.take(remaining), split.take(held_out)


def _cached(source: Source, settings: DatasetSettings) -> tuple[cache.Header, dict[str, Split]]:
    """All splits of a source from its cache file, which is written if it is missing, outdated or damaged."""
    digest = _hash(f"{source.digest}\0{decoder_version()}")
    # One file for each location, size and channels: if the source changes, its file is replaced.
    key = _hash(f"{source.location}\0{settings.size}\0{settings.channels}")
    path = files.cache_folder(settings.cache_dir) / "datasets" / f"{settings.name}-{key[:16]}.parquet"
    rejected_list = path.with_suffix(".rejected.txt")
    header = cache.read_header(path)
    splits = None
    if header is not None and header.digest == digest:
        splits = cache.read(path, header)
        if splits is None:
            _log.warning("The cache file %s is damaged and will be written again.", path)
    if splits is None:
        contents = source.read()
        check_contents(contents, source.location)
        rejected: list[Rejected] = []
        rows = decode(contents, settings, rejected)
        cache.write(path, rows, digest=digest, class_names=contents.class_names, rejected=rejected)
        if rejected:
            text = "".join(f"{image.path}: {image.reason}\n" for image in rejected)
            files.write_bytes(rejected_list, text.encode(errors="backslashreplace"))
        else:
            rejected_list.unlink(missing_ok=True)
        header = cache.read_header(path)
        splits = cache.read(path, header) if header is not None else None
        if splits is None:
            raise PipelineError(f"{path} cannot be read after it was written; check the disk.", exit_code=1)
    _report_rejected(header, source, settings.max_rejected, rejected_list)
    return header, splits


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _report_rejected(header: cache.Header, source: Source, limit: float, full_list: Path) -> None:
    """Log the images that were left out; raise an error if there are too many."""
    rejected, total = header.rejected, sum(header.rows) + len(header.rejected)
    if not rejected:
        return
    listed = ", ".join(f"{image.path} ({image.reason})" for image in rejected[:10])
    listed += f" and {len(rejected) - 10} more, listed in {full_list}" if len(rejected) > 10 else ""
    found = f"{len(rejected)} of {total} images of {source.location} cannot be read"
    if len(rejected) > limit * total:
        raise PipelineError(
            f"{found}, more than max_rejected={limit:g} allows: {listed}; repair or remove them, or increase the limit "
            "(dataset.max_rejected=0.05, in the notebooks -p max_rejected 0.05).",
            exit_code=1,
        )
    _warn_once(f"{found} and were left out: {listed}")


def _report_near_duplicates(splits: dict[str, Split], location: str) -> None:
    """Log the number of validation and test images that show the same scene as a training image."""
    train = splits["train"]
    for name in ("validation", "test"):
        split = splits[name]
        found, partners = near_duplicates.find(split.images, train.images)
        if len(found):
            first, partner = split.sources.iloc[int(found[0])], train.sources.iloc[int(partners[0])]
            _warn_once(
                f"{location} contains near-duplicates in different splits: {len(found)} of {len(split)} {name} images "
                f"show the same scene as a training image, such as {first} and {partner}. This makes the {name} "
                "accuracy too high; put all images of a scene into the same split (folders train, validation and test, "
                "or the split column of a table)."
            )
