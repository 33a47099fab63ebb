"""`cifar10`: 60,000 colour photographs of 32×32 pixels in ten classes, 10,000 of them in the test split.

The source searches `data_dir` and its folder `cifar10` for Parquet files as published on Hugging Face, then for the
official ``cifar-10-binary.tar.gz``; if neither exists, it downloads that archive. It never reads the Python version of
the archive, which consists of pickles.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.core.settings import DatasetSettings
from pipeline.data import download
from pipeline.data.source import Contents, Source, digest_of, search_folders
from pipeline.data.sources import parquet

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
DIGEST = "md5:c32a1d4ab5d03f1284b67883e8d87530"
ARCHIVE = "cifar-10-binary.tar.gz"
CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
_RECORD = 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane


def source(data_dir: Path | None, settings: DatasetSettings) -> Source:
    """CIFAR-10 in `data_dir`; downloaded there, or into the cache folder if `data_dir` is None.

    Raises:
        PipelineError: `data_dir` does not exist, or the data is not there and cannot be downloaded.
    """
    candidates, home = search_folders(data_dir, settings, ["cifar10"])
    for place in candidates:
        if found := parquet.find(place, deep=place.name == "cifar10"):
            return parquet.from_files(found, settings, CLASS_NAMES)
    archive = next((place / ARCHIVE for place in candidates if (place / ARCHIVE).is_file()), home / ARCHIVE)
    if not archive.exists():
        download.download(ADDRESS, archive, DIGEST, progress=settings.progress)
    return Source(str(archive), digest_of([archive], archive.parent), lambda: read(archive))


def read(archive: Path) -> Contents:
    """Read the official binary archive, without unpacking it on the disk.

    Raises:
        PipelineError: The digest differs from the published one.
    """
    download.check_digest(archive, DIGEST)
    with tarfile.open(archive) as tar:
        members = ((PurePosixPath(member.name).name, member) for member in tar)
        data = {name: tar.extractfile(member).read() for name, member in members if name.endswith(".bin")}
    records = {name: np.frombuffer(values, np.uint8).reshape(-1, _RECORD) for name, values in data.items()}
    labels = {split: np.concatenate([records[name][:, 0] for name in names]) for split, names in _FILES.items()}

    def images(split: str) -> Iterator[tuple[str, np.ndarray]]:
        for name in _FILES[split]:
            pixels = records[name][:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            yield from ((f"{name}#{index}", image) for index, image in enumerate(pixels))

    return Contents(CLASS_NAMES, {split: part.astype(np.int32) for split, part in labels.items()}, images)
