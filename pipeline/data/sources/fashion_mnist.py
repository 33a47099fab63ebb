"""`fashion_mnist`: 70,000 grey images of clothes, 28×28 pixels in ten classes, 10,000 of them in the test split.

The source searches `data_dir` and its folder `fashion-mnist` (or `fashion_mnist`) for the four IDX files, plain or
compressed with gzip, and downloads missing files from the official address.

Source: H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms, 2017, https://github.com/zalandoresearch/fashion-mnist.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.settings import DatasetSettings
from pipeline.data import download
from pipeline.data.source import Contents, Source, digest_of, search_folders

ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DIGESTS = {
    "train-images-idx3-ubyte": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "md5:25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "md5:bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "md5:bb300cfdad3c16e7a12a480ee83cd310",
}
CLASS_NAMES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
_PREFIXES = {"train": "train", "test": "t10k"}
_FOLDERS = ("fashion-mnist", "fashion_mnist")


def source(data_dir: Path | None, settings: DatasetSettings) -> Source:
    """Fashion-MNIST in `data_dir`; downloaded there, or into the cache folder if `data_dir` is None.

    Raises:
        PipelineError: `data_dir` does not exist, or a file is not there and cannot be downloaded.
    """
    candidates, home = search_folders(data_dir, settings, _FOLDERS)
    files = {}
    for name, digest in DIGESTS.items():
        paths = (place / f"{name}{suffix}" for place in candidates for suffix in ("", ".gz"))
        found = next((path for path in paths if path.is_file()), None)
        files[name] = path = found or download.download(
            f"{ADDRESS}{name}.gz", home / f"{name}.gz", digest, progress=settings.progress
        )

    def read() -> Contents:
        if data_dir is None:  # files in data_dir may differ from the official ones, for example recompressed
            for name, path in files.items():
                download.check_digest(path, DIGESTS[name])
        return read_files(files)

    return Source(str(path.parent), "".join(digest_of([path], path.parent) for path in files.values()), read)


def read_files(files: dict[str, Path]) -> Contents:
    """Read the four IDX files.

    Args:
        files: The path of each file, by its official name without ``.gz``.

    Raises:
        PipelineError: A file is damaged or not an IDX file.
    """
    pixels, labels = {}, {}
    for split, prefix in _PREFIXES.items():
        pixels[split] = read_idx(files[f"{prefix}-images-idx3-ubyte"], 3)[..., None]
        labels[split] = read_idx(files[f"{prefix}-labels-idx1-ubyte"], 1).astype(np.int32)

    def images(split: str) -> Iterator[tuple[str, np.ndarray]]:
        name = f"{_PREFIXES[split]}-images-idx3-ubyte"
        return ((f"{name}#{index}", image) for index, image in enumerate(pixels[split]))

    return Contents(CLASS_NAMES, labels, images)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or compressed with gzip (http://yann.lecun.com/exdb/mnist).

    The format is: two zero bytes, one byte for the type (8), one for the number of dimensions, each dimension as a
    big-endian 32-bit number, then the values.

    Args:
        path: The file; its first bytes, not its name, tell whether it is compressed.
        dimensions: Expected number of dimensions.

    Returns:
        uint8 array with that number of dimensions, in host memory.

    Raises:
        PipelineError: The file is unreadable or damaged, or has another type or length than expected.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise PipelineError(f"{path} cannot be read ({error}); delete it and load again.", exit_code=1) from error
    magic, start = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    shape = struct.unpack_from(f">{dimensions}I", content.ljust(start), 4)
    if content[:4] != magic or len(content) != start + math.prod(shape):
        raise PipelineError(
            f"{path} is not a complete IDX file of bytes with {dimensions} dimensions, which begins with "
            f"0x{magic.hex()}, but {len(content)} bytes with 0x{content[:4].hex()}; delete it and load again.",
            exit_code=1,
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
