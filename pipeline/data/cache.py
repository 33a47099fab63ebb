"""The Parquet cache of decoded images.

A file contains one dataset, with the columns `pixels` (list<uint8>, H·W·C values), `label` (int32) and `source`
(string). Rows are ordered by split, in row groups of 8 MiB of pixels, compressed with zstd. The metadata contains a
`Header`. On a GPU, cuDF decodes the file in device memory and CuPy views the result; otherwise pyarrow decodes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import device
from pipeline.core.device import usable_cores
from pipeline.core.errors import PipelineError
from pipeline.core.files import atomic_write
from pipeline.data.dataset import Rejected, Split

FORMAT = 2
ROW_GROUP_BYTES = 8 * 2**20  # small enough to decode a dataset on several cores
LIST_LIMIT = 2**31 - 1  # cuDF counts a list column's values in 32 bits
_METADATA = b"pipeline"
# Not nullable, so that Parquet stores one bit of structure per pixel instead of two.
_PIXELS = pa.list_(pa.field("element", pa.uint8(), nullable=False))
_SCHEMA = pa.schema(
    [
        pa.field("pixels", _PIXELS, nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A decoded image, uint8 [H, W, C] in host memory, to write to the cache."""

    split: str
    image: np.ndarray
    label: int
    source: str


@dataclasses.dataclass(frozen=True)
class Header:
    """The metadata of a cache file.

    Attributes:
        format: Version of the file format.
        digest: Digest of the source data and of the decoder.
        class_names: K names, in the order of the labels.
        image_shape: (H, W, C).
        row_groups: The split of each row group.
        rows: Number of rows of each row group.
        checksums: Result of `checksum` for each split.
        content: Digest of class names, splits, pixels and labels in their order; the same for a copy of the data.
        rejected: The images that were left out.
    """

    format: int
    digest: str
    class_names: list[str]
    image_shape: tuple[int, int, int]
    row_groups: list[str]
    rows: list[int]
    checksums: dict[str, int]
    content: str
    rejected: list[Rejected]


def write(path: Path, rows: Iterable[Row], *, digest: str, class_names: list[str], rejected: list[Rejected]) -> None:
    """Write a cache file atomically.

    Args:
        path: The file.
        rows: The images, ordered by split; all have the same shape.
        digest: Digest of the source data and of the decoder.
        class_names: The names of labels 0 to K - 1.
        rejected: The images that were left out; read after the last row, so the generator of `rows` may add to it.

    Raises:
        PipelineError: There are no images, or the disk is full.
    """
    header = Header(FORMAT, digest, class_names, (0, 0, 0), [], [], {}, "", rejected)
    content = hashlib.blake2b(json.dumps(class_names).encode(), digest_size=16)
    with (
        atomic_write(path, cache=True) as temporary,
        temporary.open("wb") as file,
        pq.ParquetWriter(
            file, _SCHEMA, compression="zstd", compression_level=1, use_dictionary=["pixels.list.element"]
        ) as writer,
    ):
        for group in _row_groups(rows):
            images = np.stack([row.image for row in group])
            labels = np.array([row.label for row in group], np.int32)
            split, values = group[0].split, images[0].size
            offsets = np.arange(0, len(images) * values + 1, values, dtype=np.int32)
            pixels = pa.ListArray.from_arrays(pa.array(offsets), pa.array(images.reshape(-1)), type=_PIXELS)
            # A file name may contain bytes that are not UTF-8.
            sources = [row.source.encode(errors="backslashreplace").decode() for row in group]
            table = pa.table([pixels, pa.array(labels), pa.array(sources, pa.string())], schema=_SCHEMA)
            writer.write_table(table, row_group_size=len(images))
            header.row_groups.append(split)
            header.rows.append(len(images))
            total = header.checksums.get(split, 0) + checksum(images, labels)
            header.checksums[split] = total % 2**64
            content.update(f"{split} {images.shape}".encode())
            content.update(np.ascontiguousarray(images))  # a source may give transposed views
            content.update(labels)
            header = dataclasses.replace(header, image_shape=images.shape[1:])
        if not header.rows:
            first = f", such as {rejected[0].path} ({rejected[0].reason})" if rejected else ""
            raise PipelineError(f"None of {len(rejected)} images can be read{first}; replace them.", exit_code=1)
        header = dataclasses.replace(header, content=content.hexdigest())
        writer.add_key_value_metadata({_METADATA: json.dumps(dataclasses.asdict(header)).encode()})


def _row_groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Divide rows into groups of one split with `ROW_GROUP_BYTES` of pixels."""
    for _, part in itertools.groupby(rows, key=lambda row: row.split):
        first = next(part)
        part = itertools.chain([first], part)
        while group := list(itertools.islice(part, max(1, ROW_GROUP_BYTES // first.image.size))):
            yield group


def checksum(images: Any, labels: Any) -> int:
    """A sum over all pixels and labels modulo 2^64, computed on the arrays' device; the same on every device.

    Args:
        images: uint8 [N, H, W, C], N at least 1, C-contiguous.
        labels: int32 [N].
    """
    values = math.prod(images.shape[1:])
    words = images.reshape(len(images), values).view(f"u{math.gcd(values, 8)}")
    return (int(words.sum(dtype="u8")) + int(labels.sum(dtype="i8"))) % 2**64


def read_header(path: Path) -> Header | None:
    """The metadata of a cache file; None if the file is missing, damaged or in another format."""
    try:
        fields = json.loads(pq.read_metadata(path).metadata[_METADATA])
        fields["image_shape"] = tuple(fields["image_shape"])
        fields["rejected"] = [Rejected(**item) for item in fields["rejected"]]
        header = Header(**fields)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None
    return header if header.format == FORMAT else None


def read(path: Path, header: Header) -> dict[str, Split] | None:
    """Read a cache file.

    On a GPU the file is decoded by cuDF in device memory and the images are a CuPy view of its column: no pixel
    passes through host memory.

    Args:
        path: The file.
        header: Its header.

    Returns:
        The splits by name; None if the file is damaged.

    Raises:
        MemoryError: The dataset does not fit into memory.
        RuntimeError: A CUDA error.
    """
    read_split = _read_with_cudf if device.dataframe().__name__ == "cudf" else _read_with_pyarrow
    try:
        return _read_splits(path, header, read_split)
    except RuntimeError:  # cuDF raises it for a damaged file and for a CUDA error; pyarrow tells them apart
        if _read_splits(path, header, _read_with_pyarrow) is None:
            return None
        raise


def _read_splits(path: Path, header: Header, read_split: Callable[..., Split]) -> dict[str, Split] | None:
    splits = {}
    try:
        for name, expected in header.checksums.items():
            groups = [index for index, split in enumerate(header.row_groups) if split == name]
            splits[name] = read_split(path, header, groups)
            if checksum(splits[name].images, splits[name].labels) != expected:
                return None
    except MemoryError:  # pyarrow's MemoryError is also an ArrowException
        raise
    except (pa.ArrowException, OSError, ValueError):
        return None
    return splits


def _read_with_cudf(path: Path, header: Header, groups: list[int]) -> Split:
    cudf, xp = device.dataframe(), device.xp()
    parts = []
    for chunk in _chunks(groups, header):
        frame = cudf.read_parquet(path, columns=["pixels", "label", "source"], row_groups=[chunk])
        images = frame["pixels"].list.leaves.values.reshape(-1, *header.image_shape)
        parts.append((images, frame["label"].values, frame["source"]))
    if len(parts) == 1:
        return Split(*parts[0])
    images, labels, sources = zip(*parts, strict=True)
    return Split(xp.concatenate(images), xp.concatenate(labels), cudf.concat(sources, ignore_index=True))


def _chunks(groups: list[int], header: Header) -> Iterator[list[int]]:
    """Divide row groups into lists whose pixels fit into one cuDF list column."""
    chunk: list[int] = []
    values = 0
    for group in groups:
        more = header.rows[group] * math.prod(header.image_shape)
        if chunk and values + more > LIST_LIMIT:
            yield chunk
            chunk, values = [], 0
        chunk.append(group)
        values += more
    if chunk:
        yield chunk


def _read_with_pyarrow(path: Path, header: Header, groups: list[int]) -> Split:
    starts = np.cumsum([0, *(header.rows[group] for group in groups)])
    images = np.empty((starts[-1], *header.image_shape), np.uint8)
    labels = np.empty(starts[-1], np.int32)
    metadata = pq.read_metadata(path)

    def read_group(index: int) -> pa.ChunkedArray:
        with pq.ParquetFile(path, metadata=metadata) as file:
            table = file.read_row_group(groups[index])
        start = starts[index]
        labels[start : starts[index + 1]] = table.column("label").to_numpy()
        for chunk in table.column("pixels").chunks:
            images[start : start + len(chunk)] = chunk.flatten().to_numpy().reshape(-1, *header.image_shape)
            start += len(chunk)
        return table.column("source")

    with ThreadPoolExecutor(usable_cores()) as pool:  # pyarrow uses one core per column
        sources = [chunk for column in pool.map(read_group, range(len(groups))) for chunk in column.chunks]
    return Split(device.to_device(images), device.to_device(labels), pa.chunked_array(sources, pa.string()).to_pandas())
