"""The interface of a source of images, and the decoding of its images in parallel.

A source is a module in `pipeline.data.sources` with a function ``source(data_dir, settings) -> Source``. It finds the
data but does not read it: `Source.read` is called only if the cache does not contain the data.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.core import device, files
from pipeline.core.errors import PipelineError
from pipeline.core.settings import DatasetSettings
from pipeline.data import cache
from pipeline.data.dataset import SPLITS, Rejected
from pipeline.data.images import ImageError, decode_image, resize_and_center_crop

_BATCH = 32  # images that a decode thread takes at a time

# Names of folders and files that contain a split.
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
               "dev": "validation", "test": "test"}  # fmt: skip

# An image: encoded bytes, a file, decoded pixels, or the reason why it cannot be read.
Encoded = bytes | Path | np.ndarray | ImageError


@dataclasses.dataclass(frozen=True)
class Contents:
    """All images and labels of a source.

    Attributes:
        class_names: K names.
        labels: The labels of each split, integers [N] from 0 to K - 1.
        images: Returns (name, image) for each image of a split, in the order of its labels.
        channels: 1 or 3 to convert all images unless the user sets `channels`, or None to keep their channels.
    """

    class_names: list[str]
    labels: dict[str, np.ndarray]
    images: Callable[[str], Iterable[tuple[str, Encoded]]]
    channels: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset that was found, but not read yet.

    Attributes:
        location: Its path or description, for error messages and for the name of its cache file.
        digest: Changes when the data changes.
        read: Reads and returns the contents.
    """

    location: str
    digest: str
    read: Callable[[], Contents]


def check_folder(data_dir: Path | None, name: str) -> Path:
    """Check that `data_dir` is a folder, and return it.

    Raises:
        PipelineError: `data_dir` is None or not a folder.
    """
    if data_dir is None or not data_dir.is_dir():
        raise PipelineError(
            f"The dataset {name!r} needs a folder, got data_dir={str(data_dir) if data_dir else None!r}; "
            "set data_dir (or --data-dir) to the folder that contains the data."
        )
    return data_dir


def search_folders(data_dir: Path | None, settings: DatasetSettings, names: Sequence[str]) -> tuple[list[Path], Path]:
    """The folders to search for the files of a dataset, and the one to download missing files to.

    Args:
        data_dir: Searched after its folders `names`; None means the cache folder.
        settings: `name` and `cache_dir`.
        names: Names of the dataset's folder; the first is the one for downloads.

    Raises:
        PipelineError: `data_dir` is not a folder, or the cache folder cannot be created.
    """
    if data_dir is None:
        home = files.cache_folder(settings.cache_dir) / "downloads" / settings.name
        return [home], home
    check_folder(data_dir, settings.name)
    home = data_dir if data_dir.name in names else data_dir / names[0]
    return [*(data_dir / name for name in names), data_dir], home


def digest_of(paths: Iterable[Path], root: Path) -> str:
    """Hash the paths, sizes and times of files; this takes about a second for 100,000 files.

    It changes when a file is added, removed, renamed, written or made readable. For a file that cannot be accessed, the
    error number is hashed; the error is reported when the file is read.
    """
    result = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            status = path.stat()
            facts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except OSError as error:
            facts = (error.errno,)
        words = (path.relative_to(root).as_posix(), *map(str, facts))
        result.update(("\0".join(words) + "\n").encode(errors="surrogateescape"))
    return result.hexdigest()


def check_contents(contents: Contents, location: str) -> None:
    """Check labels and class names before any image is decoded.

    Raises:
        PipelineError: There are fewer than two classes, a name is used twice, a label is out of range, or a class has
            no training images.
    """
    names = contents.class_names
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise PipelineError(f"The class name {twice[0]!r} of {location} is used twice; rename one of the classes.")
    if len(names) < 2:
        raise PipelineError(f"A classifier needs at least two classes, {location} has {list(names)}; add a class.")
    for split, labels in contents.labels.items():
        wrong = labels[(labels < 0) | (labels >= len(names))]
        if len(wrong):
            raise PipelineError(
                f"Expected labels from 0 to {len(names) - 1}, got {wrong[0]} in the {split} split of {location}; "
                "correct the labels or set class_names."
            )
    counts = np.bincount(contents.labels.get("train", np.empty(0, int)), minlength=len(names))
    if counts.min() == 0:
        empty = names[int(counts.argmin())]
        raise PipelineError(f"The class {empty!r} of {location} has no training images; add some or remove the class.")


def decode(contents: Contents, settings: DatasetSettings, rejected: list[Rejected]) -> Iterator[cache.Row]:
    """Decode all images in parallel, in order; images that cannot be read are added to `rejected` and left out.

    Threads are sufficient, because Pillow releases the GIL while it decodes and resizes.

    Args:
        contents: The encoded images and their labels.
        settings: `image_size`, `channels` and `progress`.
        rejected: Receives the images that cannot be read.

    Yields:
        Decoded images, ordered by split.

    Raises:
        PipelineError: Images differ in size but `image_size` is not set, or in channels but `channels` is not set.
    """
    first: tuple[str, tuple[int, ...]] | None = None
    work = functools.partial(_decode_rows, size=settings.size, channels=settings.channels or contents.channels)
    bar = tqdm(
        total=sum(map(len, contents.labels.values())),
        desc=f"{settings.name}: decoding",
        unit=" images",
        disable=None if settings.progress else True,
    )
    with bar, ThreadPoolExecutor(device.usable_cores()) as pool:
        for split in (split for split in SPLITS if split in contents.labels):
            rows = zip(contents.labels[split], contents.images(split), strict=True)
            for label, name, image in _map_in_order(pool, work, rows):
                bar.update()
                if isinstance(image, ImageError):
                    rejected.append(Rejected(name, image.reason))
                    continue
                first = first or (name, image.shape)
                if image.shape != first[1]:
                    raise PipelineError(
                        f"All images must have the same height, width and channels, but {name} has {image.shape} and "
                        f"{first[0]} has {first[1]}; set image_size or channels (dataset.image_size=64 or "
                        "dataset.channels=3, in the notebooks -p image_size 64 or -p channels 3)."
                    )
                yield cache.Row(split, image, label, name)


_Row = tuple[int, tuple[str, Encoded]]  # label, (name, image)
_Decoded = tuple[int, str, np.ndarray | ImageError]


def _map_in_order(
    pool: ThreadPoolExecutor, work: Callable[[list[_Row]], list[_Decoded]], rows: Iterator[_Row]
) -> Iterator[_Decoded]:
    """The results of `work` for batches of rows, in order; only a few batches are in progress, to limit memory."""
    waiting: deque[Future] = deque()
    while batch := list(itertools.islice(rows, _BATCH)):
        waiting.append(pool.submit(work, batch))
        if len(waiting) > 2 * device.usable_cores():
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _decode_rows(rows: list[_Row], *, size: tuple[int, int] | None, channels: int | None) -> list[_Decoded]:
    results: list[_Decoded] = []
    for label, (name, image) in rows:
        try:
            image = decode_image(image, size) if isinstance(image, bytes | Path) else image
        except ImageError as error:
            image = error
        if isinstance(image, np.ndarray):
            image = resize_and_center_crop(image, (*(size or image.shape[:2]), channels or image.shape[2]))
        results.append((label, name, image))
    return results
