"""What a source of images hands over, and how that becomes batches of decoded pixels.

A source is one file here with a function ``source(data_dir, settings) -> Source``. It looks and does not read: the
contents are asked for only where the cache does not hold them yet.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.data import cache
from pipeline.data.dataset import SPLITS, Rejected
from pipeline.data.images import ImageError, decode_image, resize_and_center_crop

_BATCH = 32  # images that a thread decodes at once


# An image: encoded, in a file, as pixels, known to be unreadable, or missing.
Encoded = bytes | Path | np.ndarray | ImageError | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user may ask of any source.

    Attributes:
        image_size: (H, W) to bring every image to, or None to keep the one size they have.
        channels: 1 or 3 to make every image grey or RGB, or None where they are alike.
        class_names: The names of labels 0 to K - 1, for a source of numbers without names.
        cache: The cache folder, for downloads and unpacked archives.
        progress: Show progress bars on a terminal.
    """

    image_size: tuple[int, int] | None
    channels: int | None
    class_names: list[str] | None
    cache: Path
    progress: bool


@dataclasses.dataclass(frozen=True)
class Contents:
    """All of a source.

    Attributes:
        class_names: K names.
        labels: Split name to its labels, integers [N] from 0 to K - 1.
        images: Gives a split's images in the order of its labels, each with its name for listings.
    """

    class_names: list[str]
    labels: dict[str, np.ndarray]
    images: Callable[[str], Iterable[tuple[str, Encoded]]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A source that was found.

    Attributes:
        location: Where it is, for messages and for the name of its cache file.
        digest: Changes when the source does.
        read: Gives the contents; called only where the cache does not hold them.
    """

    location: str
    digest: str
    read: Callable[[], Contents]


def folder(data_dir: Path | None, name: str) -> Path:
    """`data_dir`, checked.

    Raises:
        PipelineError: It is not given, or there is no such folder.
    """
    if data_dir is None:
        raise PipelineError(f"The data set {name!r} needs data_dir=…, the folder that holds the images.")
    if data_dir.is_file():
        raise PipelineError(
            f"{data_dir} is a file; name the folder that holds the {name} data (data_dir=…, or --data-dir)."
        )
    if not data_dir.is_dir():
        raise PipelineError(
            f"There is no folder {data_dir}; name the one that holds the {name} data (data_dir=…, or --data-dir)."
        )
    return data_dir


def check(contents: Contents, location: str) -> None:
    """Everything about labels and classes that can be found wrong before an image is decoded.

    Raises:
        PipelineError: One class only, a name given twice, a label out of range, no training images, or a class
            without any.
    """
    names = contents.class_names
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise PipelineError(f"The class name {twice[0]!r} is given twice for {location}; every class needs its own.")
    if len(names) < 2:
        found = f"one class only ({names[0]!r})" if names else "no classes"
        raise PipelineError(f"{location} has {found}; a classifier needs at least two.")
    for split, labels in contents.labels.items():
        wrong = labels[(labels < 0) | (labels >= len(names))]
        if len(wrong):
            raise PipelineError(
                f"{location} has the label {wrong[0]} in its {split} split, but {len(names)} classes, so labels are 0 "
                f"to {len(names) - 1}; correct the labels or set class_names."
            )
    if not len(contents.labels.get("train", ())):
        raise PipelineError(f"{location} has no training images; put some into its train split.")
    counts = np.bincount(contents.labels["train"], minlength=len(names))
    if counts.min() == 0:
        empty = names[int(counts.argmin())]
        raise PipelineError(f"The class {empty!r} of {location} has no training image; add some or remove the class.")


def decode(contents: Contents, settings: Settings, rejected: list[Rejected], *, name: str) -> Iterator[cache.Batch]:
    """Decode every image, in parallel, in order; those that cannot be read are added to `rejected` and left out.

    Threads are enough: Pillow decodes and resizes without Python's lock.

    Raises:
        PipelineError: Images of different sizes without `image_size`, grey and colour mixed without `channels`, or
            not as many images as labels.
    """
    first: tuple[str, tuple[int, ...]] | None = None
    total = sum(map(len, contents.labels.values()))
    bar = tqdm(total=total, desc=f"{name}: decoding", unit=" images", disable=None if settings.progress else True)
    with bar, ThreadPoolExecutor(device.usable_cores()) as pool:
        for split in SPLITS:
            labels = contents.labels.get(split, np.empty(0, np.int32))
            position = 0
            for results in _in_order(pool, contents.images(split) if len(labels) else (), settings):
                good = []
                for index, (source, image) in enumerate(results, start=position):
                    if isinstance(image, Rejected):
                        rejected.append(image)
                        continue
                    first = first or (source, image.shape)
                    _check_alike(source, image.shape, *first)
                    good.append((index, source, image))
                position += len(results)
                if position > len(labels):
                    break
                bar.update(len(results))
                if good:
                    indices, sources, images = zip(*good, strict=True)
                    yield cache.Batch(split, np.stack(images), labels[list(indices)], list(sources))
            if position != len(labels):
                more = "more than " if position > len(labels) else f"{position} images for "
                raise PipelineError(f"The {split} split of {name} has {more}{len(labels)} labels; they must be equal.")


def _in_order(
    pool: ThreadPoolExecutor, images: Iterable[tuple[str, Encoded]], settings: Settings
) -> Iterator[list[tuple[str, np.ndarray | Rejected]]]:
    """The results of `_decode_some` in order, with only a few batches under way, so that memory stays bounded."""
    waiting: deque[Future] = deque()
    images = iter(images)
    while batch := list(itertools.islice(images, _BATCH)):
        waiting.append(pool.submit(_decode_some, batch, settings))
        if len(waiting) > 2 * device.usable_cores():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _decode_some(batch: list[tuple[str, Encoded]], settings: Settings) -> list[tuple[str, np.ndarray | Rejected]]:
    results: list[tuple[str, np.ndarray | Rejected]] = []
    for name, source in batch:
        if source is None:
            results.append((name, Rejected(name, "there is no image data")))
            continue
        try:
            if isinstance(source, ImageError):
                raise source
            image = source if isinstance(source, np.ndarray) else decode_image(source)
        except ImageError as error:
            results.append((name, Rejected(name, error.reason)))
            continue
        height, width = settings.image_size or image.shape[:2]
        results.append((name, resize_and_center_crop(image, (height, width, settings.channels or image.shape[2]))))
    return results


def _check_alike(name: str, shape: tuple[int, ...], first: str, expected: tuple[int, ...]) -> None:
    if shape[2] != expected[2]:
        grey, colour = (name, first) if shape[2] == 1 else (first, name)
        raise PipelineError(
            f"{grey} is grey and {colour} is in colour; set channels to 3 or 1 to make them alike "
            "(dataset.channels=3, in the notebooks -p channels 3)."
        )
    if shape != expected:
        sizes = f"{name} is {shape[1]}×{shape[0]} pixels and {first} is {expected[1]}×{expected[0]}"
        raise PipelineError(
            f"{sizes}; set image_size, one number or height and width, to make them alike (dataset.image_size=64, in "
            "the notebooks -p image_size 64)."
        )
