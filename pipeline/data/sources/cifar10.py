"""`cifar10`: 60,000 colour photographs of 32×32 pixels in ten classes, 10,000 of them for the test.

Looked for in `data_dir` and its folder `cifar10`, in this order: Parquet files as Hugging Face has them, the official
``cifar-10-binary.tar.gz``; else that archive is downloaded. The Python version of the archive is never read: it would
have to be unpickled.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.data import download
from pipeline.data.source import Contents, Settings, Source, folder
from pipeline.data.sources import parquet

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


DIGEST = "md5:c32a1d4ab5d03f1284b67883e8d87530"


ARCHIVE = "cifar-10-binary.tar.gz"


CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


_FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}


_RECORD = 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane


def source(data_dir: Path | None, settings: Settings) -> Source:
    """CIFAR-10 from `data_dir`; downloaded there, or into the cache folder where `data_dir` is None.

    Raises:
        PipelineError: `data_dir` does not exist, or the data is not there and cannot be downloaded.
    """
    if data_dir is None:
        home = settings.cache / "downloads" / "cifar10"
        candidates = [home]
    else:
        data_dir = folder(data_dir, "cifar10")
        inner = data_dir / "cifar10"
        home = data_dir if data_dir.name == "cifar10" and not inner.is_dir() else inner
        candidates = [inner, data_dir]
    for place in candidates:
        found = parquet.find(place, deep=place.name == "cifar10") if place.is_dir() else {}
        if found:
            return parquet.from_files(found, settings, CLASS_NAMES)
    archive = next((place / ARCHIVE for place in candidates if (place / ARCHIVE).is_file()), home / ARCHIVE)
    download.download(ADDRESS, archive, DIGEST, progress=settings.progress)
    return Source(str(archive), download.digest_of([archive], archive.parent), lambda: read_archive(archive, settings))


def read_archive(archive: Path, settings: Settings) -> Contents:
    """The contents of the official binary archive, unpacked into the cache folder.

    Raises:
        PipelineError: It is not the published file, or cannot be unpacked.
    """
    unpacked = settings.cache / "unpacked" / f"cifar10-{DIGEST.split(':')[1][:16]}"
    batches = unpacked / "cifar-10-batches-bin"
    if not batches.is_dir():
        download.check_digest(archive, DIGEST)
        shutil.rmtree(unpacked, ignore_errors=True)  # what is left of one whose inner folder was removed
        download.unpack(archive, unpacked)
    return read_binary(batches)


def read_binary(batches: Path) -> Contents:
    """The contents of the folder ``cifar-10-batches-bin``.

    Raises:
        PipelineError: A file is missing or is not made of whole records.
    """
    records = {split: [_records(batches / name) for name in names] for split, names in _FILES.items()}
    labels = {
        split: np.concatenate([part[:, 0] for part in parts]).astype(np.int32) for split, parts in records.items()
    }

    def images(split: str) -> Iterator[tuple[str, np.ndarray]]:
        for name, part in zip(_FILES[split], records[split], strict=True):
            pixels = part[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            yield from ((f"{name}#{index}", image) for index, image in enumerate(pixels))

    return Contents(CLASS_NAMES, labels, images)


def _records(path: Path) -> np.ndarray:
    try:
        values = np.fromfile(path, np.uint8)
    except OSError as error:
        raise PipelineError(f"{path} cannot be read ({error.strerror}); remove {path.parent} and load again.") from None
    if len(values) == 0 or len(values) % _RECORD:
        raise PipelineError(f"{path} has {len(values)} bytes, not whole records; remove {path.parent} and load again.")
    return values.reshape(-1, _RECORD)
