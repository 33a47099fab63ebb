"""Images with labels from many sources, always as the same thing.

dataset = datasets.load("digits")
dataset = datasets.load("cifar10", "../data", limit_per_class=100)
dataset = datasets.load("image_folder", "my_photos", image_size=64)
dataset.train.images       # uint8 [N, H, W, C], on the GPU where there is one

A new source is one file in this folder and one line in `_SOURCES`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import device, files
from pipeline.core.errors import PipelineError, is_number, is_whole
from pipeline.data import cache, statistics
from pipeline.data.dataset import Dataset, Rejected, Split
from pipeline.data.images import MAX_PIXELS
from pipeline.data.source import Settings, Source, check, decode

_SOURCES = {
    name: f"pipeline.data.sources.{name}"
    for name in ("digits", "cifar10", "fashion_mnist", "tiny_imagenet", "parquet", "image_folder")
}


_TEST_SEED = 0  # a test split made here is the same for every seed, so that no run trains on another's test images


_log = logging.getLogger(__name__)


def dataset_names() -> list[str]:
    """The names that `load` knows."""
    return list(_SOURCES)


@contextlib.contextmanager
def _memory_as_a_sentence() -> Iterator[None]:
    try:
        yield
    except MemoryError:  # CuPy's and cuDF's are of this kind too
        free = device.free_memory() / 1e9
        raise PipelineError(
            f"The data set does not fit into the memory that is free ({free:.1f} GB); set a smaller image_size or "
            "fewer classes, or PIPELINE_DEVICE=cpu where the machine has more memory than its GPU.",
            exit_code=1,
        ) from None


@_memory_as_a_sentence()
def load_dataset(
    name: str = "digits",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    class_names: Sequence[str] | None = None,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    limit_per_class: int | None = None,
    max_rejected: float = 0.01,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Dataset:
    """Load a data set: the first time by decoding its images in parallel, then from the columnar cache.

    Args:
        name: One of `names()`.
        data_dir: Where the data is; each source says what it looks for there.
        image_size: Height and width to bring every image to (one number for both): the shorter side is resized to
            fit, the longer one cropped around the centre. None keeps the size, which must then be the same for all.
        channels: 1 makes every image grey, 3 RGB. None keeps what they are, which must then be the same for all.
        class_names: The names of labels 0 to K - 1, for `parquet` files that do not name them.
        test_fraction: Share of each class that becomes the test split where the source has none; chosen once, not by
            `seed`.
        validation_fraction: Share of each class of the training images that becomes the validation split where the
            source has none, chosen by `seed`; 0 leaves it empty.
        seed: Seed of that choice, and of that of `limit_per_class`.
        classes: Keep only these classes, numbered anew in the order they have in the source.
        limit_per_class: Keep at most this many images of each class in each split of the source.
        max_rejected: Share of the images that may be unreadable; more of them stop the load.
        cache_dir: The cache folder; ``$PIPELINE_CACHE``, else the user's, by default.
        progress: Show progress bars on a terminal.

    Returns:
        The data set; arrays are CuPy on a GPU and NumPy without.

    Raises:
        PipelineError: An unknown name or class, missing or unusable data, too many unreadable images, no room on the
            disk or in memory.

    Example:
        >>> dataset = load_dataset("digits", progress=False)
        >>> dataset
        digits: 1,293 train, 145 validation, 359 test images of 32×32×1 in 10 classes
    """
    if not isinstance(name, str) or name not in _SOURCES:
        raise PipelineError(f"There is no data set {name!r}; the known ones are: {', '.join(dataset_names())}.")
    if class_names is not None and name != "parquet":
        raise PipelineError(f"class_names is for the data set 'parquet'; {name!r} has class names of its own.")
    check_sizes(image_size, channels, limit_per_class, max_rejected)
    for label, fraction in (("test_fraction", test_fraction), ("validation_fraction", validation_fraction)):
        if not is_number(fraction) or not 0 <= fraction < 1:
            raise PipelineError(f"{label} is {fraction!r}; pass a share of the images, from 0 to below 1.")
    if not is_whole(seed):
        raise PipelineError(f"seed is {seed!r}; pass a whole number.")
    settings = Settings(
        image_size=_size(image_size),
        channels=channels,
        class_names=_texts("class_names", class_names),
        cache=files.cache_folder(cache_dir),
        progress=progress,
    )
    place = Path(data_dir).expanduser().resolve() if data_dir is not None else None
    source: Source = importlib.import_module(_SOURCES[name]).source(place, settings)
    header, splits = _cached(name, source, settings)
    _check_rejected(header, source, max_rejected)

    kept = header.class_names
    if "test" not in splits:
        splits["train"], splits["test"] = _divide(splits["train"], test_fraction, _TEST_SEED)
    if (wanted := _texts("classes", classes)) is not None:
        for split_name, split in splits.items():
            indices, labels, kept = statistics.select_classes(split.labels, header.class_names, wanted)
            splits[split_name] = dataclasses.replace(split.take(indices), labels=labels)
        if len(kept) < 2:
            raise PipelineError(f"classes={wanted} leaves {len(kept)} class; a classifier needs at least two.")
    if limit_per_class is not None:
        splits = {
            split_name: split.take(statistics.limit_per_class(split.labels, limit_per_class, seed))
            for split_name, split in splits.items()
        }
    if "validation" not in splits:
        splits["train"], splits["validation"] = _divide(splits["train"], validation_fraction, seed)
    _check_train(splits["train"], kept, source)
    mean, std = statistics.channel_statistics(splits["train"].images)
    return Dataset(
        name, kept, splits["train"], splits["validation"], splits["test"], mean, std, header.content, header.rejected
    )


def check_sizes(
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    limit_per_class: int | None = None,
    max_rejected: float = 0.01,
) -> None:
    """Raise `PipelineError` where `load` would refuse one of these, before anything is read."""
    _size(image_size)
    if channels not in (None, 1, 3):
        raise PipelineError(f"channels is {channels!r}; pass 1 (grey), 3 (RGB), or leave it out.")
    if limit_per_class is not None and (not isinstance(limit_per_class, int) or limit_per_class < 1):
        raise PipelineError(f"limit_per_class is {limit_per_class!r}; pass a whole number of at least 1.")
    if not is_number(max_rejected) or not 0 <= max_rejected <= 1:
        raise PipelineError(f"max_rejected is {max_rejected!r}; pass a share of the images, from 0 to 1 (0.05 is 5 %).")


def _divide(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    kept, held_out = statistics.stratified_split(split.labels, fraction, seed)
    return split.take(kept), split.take(held_out)


def _size(value: int | Sequence[int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        height, width = (value, value) if isinstance(value, int) else value
        if int(height) == height >= 1 and int(width) == width >= 1 and height * width <= MAX_PIXELS:
            return int(height), int(width)
    except (TypeError, ValueError, OverflowError):
        pass
    raise PipelineError(f"image_size is {value!r}; pass one number of pixels, or height and width, up to 8000.")


def _texts(name: str, values: Iterable[str] | None) -> list[str] | None:
    if values is not None and (isinstance(values, str) or not isinstance(values, Iterable)):
        raise PipelineError(f"{name} is {values!r}; pass a list of names.")
    return [str(value) for value in values] if values is not None else None


def load_from_settings(settings: Mapping[str, Any], **replaced: Any) -> Dataset:
    """`load` with the settings' group ``dataset``; what is None there or in `replaced` does not count as given."""
    given = {key: value for key, value in settings.items() if value is not None}
    known = inspect.signature(load_dataset).parameters
    unknown = [key for key in given if key not in known]
    if unknown:
        raise PipelineError(f"There is no setting dataset.{unknown[0]}; there are: {', '.join(known)}.")
    return load_dataset(**given | {key: value for key, value in replaced.items() if value is not None})


def _cached(name: str, source: Source, settings: Settings) -> tuple[cache.Header, dict[str, Split]]:
    """The whole of a source from its cache file, which is made where it is missing, stale or damaged."""
    digest = _hash(source.digest)
    # One file for each place and way of decoding: a source that changes replaces its file.
    key = _hash(f"{source.location}\0{settings.image_size}\0{settings.channels}")
    path = settings.cache / "datasets" / f"{name}-{key[:16]}.parquet"
    header = cache.read_header(path)
    if header is not None and header.digest == digest:
        splits = cache.read(path, header)
        if splits is not None:
            return header, splits
        _log.warning("The cache file %s is damaged; it is made again.", path)
    contents = source.read()
    check(contents, source.location)
    rejected: list[Rejected] = []
    batches = decode(contents, settings, rejected, name=name)
    cache.write(path, batches, digest=digest, class_names=contents.class_names, rejected=rejected)
    header = cache.read_header(path)
    splits = cache.read(path, header) if header is not None else None
    if splits is None:
        raise PipelineError(f"{path} cannot be read back after it was written; check the disk.", exit_code=1)
    return header, splits


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _check_rejected(header: cache.Header, source: Source, limit: float) -> None:
    """Name the images that were left out, and stop where they are too many."""
    rejected, total = header.rejected, sum(header.rows) + len(header.rejected)
    if not rejected:
        return
    listed = [f"{image.path} ({image.reason})" for image in rejected]
    if len(rejected) > limit * total:
        more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        raise PipelineError(
            f"{len(rejected)} of {total} images of {source.location} cannot be read, more than "
            f"max_rejected={limit:g} allows: {', '.join(listed[:5])}{more}; repair or remove them, "
            "or allow more (dataset.max_rejected=0.05, in the notebooks -p max_rejected 0.05).",
            exit_code=1,
        )
    _log.warning("Left out %d of %d images of %s: %s", len(rejected), total, source.location, ", ".join(listed))


def _check_train(split: Split, class_names: list[str], source: Source) -> None:
    counts = np.bincount(device.to_numpy(split.labels), minlength=len(class_names))
    if counts.min() == 0:
        empty = class_names[int(counts.argmin())]
        raise PipelineError(
            f"The class {empty!r} of {source.location} has no readable training image; add some or remove the class.",
            exit_code=1,
        )
