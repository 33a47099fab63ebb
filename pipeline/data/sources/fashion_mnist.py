"""`fashion_mnist`: 70,000 grey pictures of clothes, 28×28 pixels in ten classes, 10,000 of them for the test.

The four IDX files, plain or compressed with gzip, are looked for in `data_dir` and its folder `fashion-mnist` (or
`fashion_mnist`); those that are missing are downloaded from the official address.

Source: H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms, 2017, https://github.com/zalandoresearch/fashion-mnist.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.data import download
from pipeline.data.source import Contents, Settings, Source, folder

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


def source(data_dir: Path | None, settings: Settings) -> Source:
    """Fashion-MNIST from `data_dir`; downloaded there, or into the cache folder where `data_dir` is None.

    Raises:
        PipelineError: `data_dir` does not exist, or a file is not there and cannot be downloaded.
    """
    if data_dir is None:
        home = settings.cache / "downloads" / "fashion_mnist"
        candidates = [home]
    else:
        data_dir = folder(data_dir, "fashion_mnist")
        inner = [data_dir / name for name in _FOLDERS if (data_dir / name).is_dir()]
        candidates = [*inner, data_dir]
        home = next((place for place in candidates if any(_find(name, [place]) for name in DIGESTS)), None)
        home = home or (data_dir if data_dir.name in _FOLDERS else data_dir / _FOLDERS[0])
    files = {}
    for name, digest in DIGESTS.items():
        files[name] = _find(name, candidates) or download.download(
            f"{ADDRESS}{name}.gz", home / f"{name}.gz", digest, progress=settings.progress
        )
    digest = "".join(download.digest_of([path], path.parent) for path in files.values())
    return Source(str(home), digest, lambda: read_files(files))


def read_files(files: dict[str, Path]) -> Contents:
    """The contents of the four IDX files, by their official names without ``.gz``.

    Raises:
        PipelineError: A file is damaged, of another kind, or has not as many labels as there are images.
    """
    pixels, labels = {}, {}
    for split, prefix in _PREFIXES.items():
        images_file, labels_file = files[f"{prefix}-images-idx3-ubyte"], files[f"{prefix}-labels-idx1-ubyte"]
        pixels[split] = read_idx(images_file, 3)[..., None]
        labels[split] = read_idx(labels_file, 1).astype(np.int32)
        if labels[split].max(initial=0) >= len(CLASS_NAMES):
            raise PipelineError(
                f"{labels_file} has the label {labels[split].max()}, and there are {len(CLASS_NAMES)} classes; put the "
                "official file there.",
                exit_code=1,
            )
        if len(pixels[split]) != len(labels[split]):
            raise PipelineError(
                f"{images_file} has {len(pixels[split])} images and {labels_file} {len(labels[split])} labels; "
                "both must be of the same split, so delete them and load again.",
                exit_code=1,
            )

    def images(split: str) -> Iterator[tuple[str, np.ndarray]]:
        name = f"{_PREFIXES[split]}-images-idx3-ubyte"
        return ((f"{name}#{index}", image) for index, image in enumerate(pixels[split]))

    return Contents(CLASS_NAMES, labels, images)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or compressed with gzip (http://yann.lecun.com/exdb/mnist).

    Two zero bytes, one for the type (8), one for the number of dimensions, each dimension as a big-endian 32-bit
    number, then the values.

    Args:
        path: The file; its first bytes, not its name, say whether it is compressed.
        dimensions: How many dimensions it must have.

    Returns:
        uint8 array of those dimensions, in host memory.

    Raises:
        PipelineError: The file cannot be read, is damaged, of another kind, or not as long as its header says.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PipelineError(
            f"{path} cannot be decompressed ({error}); delete it and load again.", exit_code=1
        ) from None
    except OSError as error:
        raise PipelineError(f"{path} cannot be read ({error.strerror or error}).", exit_code=1) from None
    magic = bytes([0, 0, 8, dimensions])
    if not content:
        raise PipelineError(f"{path} is empty; delete it and load again.", exit_code=1)
    if content[:4] != magic:
        raise PipelineError(
            f"{path} is no IDX file of bytes with {dimensions} dimensions: it begins with 0x{content[:4].hex()}, not "
            f"0x{magic.hex()}; put the official file there.",
            exit_code=1,
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise PipelineError(f"{path} is truncated inside its header; delete it and load again.", exit_code=1)
    shape = [int.from_bytes(content[offset : offset + 4], "big") for offset in range(4, start, 4)]
    expected, found = math.prod(shape), len(content) - start
    if expected != found:
        raise PipelineError(
            f"{path} is truncated or damaged: its header declares {expected} values and {found} follow; delete it and "
            "load again.",
            exit_code=1,
        )
    if 0 in shape[1:]:
        size = "×".join(map(str, shape[1:]))
        raise PipelineError(f"{path} declares images of {size} pixels; put the official file there.", exit_code=1)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find(name: str, candidates: list[Path]) -> Path | None:
    """The file of that name, plain or compressed, in the first of `candidates` that has it."""
    paths = (place / f"{name}{suffix}" for place in candidates for suffix in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)
