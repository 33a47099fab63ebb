"""The columnar cache: decoded images as Parquet on disk, as arrays where the pipeline computes.

One file holds one data set: `pixels` list<uint8> (H·W·C values a row), `label` int32, `source` string; split by
split, in row groups of 8 MiB of pixels, compressed with zstd. Shape, class names, the digest of the source and what was
left out are in the file's metadata. On a GPU cuDF decodes the file in device memory and CuPy views the result; without
one pyarrow and NumPy do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import device
from pipeline.core.device import usable_cores
from pipeline.core.errors import PipelineError
from pipeline.core.files import atomic_write_in_cache
from pipeline.data.dataset import Rejected, Split

FORMAT = 2


ROW_GROUP_BYTES = 8 * 2**20  # small enough that two cores share the work of decoding


LIST_LIMIT = 2**31 - 1  # cuDF counts a list column's values in 32 bits


_METADATA = b"pipeline"


# Not nullable, so that Parquet stores one bit of structure a pixel instead of two.
_PIXELS = pa.list_(pa.field("element", pa.uint8(), nullable=False))


_SCHEMA = pa.schema(
    [
        pa.field("pixels", _PIXELS, nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some decoded images of one split, on their way into the cache, in host memory.

    Attributes:
        split: "train", "validation" or "test".
        images: uint8 [N, H, W, C].
        labels: Integers [N].
        sources: N strings.
    """

    split: str
    images: np.ndarray
    labels: np.ndarray
    sources: list[str]


@dataclasses.dataclass(frozen=True)
class Header:
    """What a cache file says about itself.

    Attributes:
        format: Version of the layout.
        digest: Digest of the source data and of how it was decoded.
        class_names: K names, in the order of the labels.
        image_shape: (H, W, C).
        row_groups: The split of each row group.
        rows: Number of rows of each row group.
        checksums: Split to a sum over its pixels and labels.
        content: Digest of class names, splits, pixels and labels in their order; a copy of the data has the same.
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

    @classmethod
    def from_json(cls, text: str | bytes) -> Header:
        """Read what `json.dumps(dataclasses.asdict(header))` wrote; any exception means that it is damaged."""
        fields = json.loads(text)
        fields["image_shape"] = tuple(fields["image_shape"])
        fields["rejected"] = [Rejected(**item) for item in fields["rejected"]]
        return cls(**fields)


def write(
    path: Path, batches: Iterable[Batch], *, digest: str, class_names: list[str], rejected: list[Rejected]
) -> None:
    """Write a cache file, whole or not at all.

    Args:
        path: The file.
        batches: The images, split by split, none empty, all of one shape; read to the end before anything appears
            at `path`.
        digest: Digest of the source data and of how it is decoded.
        class_names: The names of labels 0 to K - 1.
        rejected: What was left out; read after the last batch, so a generator may add to it.

    Raises:
        PipelineError: No image at all, or no room on the disk.
    """
    header = Header(FORMAT, digest, class_names, (0, 0, 0), [], [], {}, "", rejected)
    content = hashlib.blake2b(json.dumps(class_names).encode(), digest_size=16)
    with (
        atomic_write_in_cache(path) as temporary,
        temporary.open("wb") as file,
        pq.ParquetWriter(
            file, _SCHEMA, compression="zstd", compression_level=1, use_dictionary=["pixels.list.element"]
        ) as writer,
    ):
        for group in _row_groups(batches):
            images = np.concatenate([batch.images for batch in group])
            labels = np.concatenate([batch.labels for batch in group]).astype(np.int32)
            split, values = group[0].split, images[0].size
            offsets = np.arange(0, len(images) * values + 1, values, dtype=np.int32)
            pixels = pa.ListArray.from_arrays(pa.array(offsets), pa.array(images.reshape(-1)), type=_PIXELS)
            names = (source for batch in group for source in batch.sources)
            # A file's name may hold bytes that are no text.
            sources = pa.array([name.encode(errors="backslashreplace").decode() for name in names], pa.string())
            table = pa.table([pixels, pa.array(labels), sources], schema=_SCHEMA)
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
            first = f"; the first: {rejected[0].path} ({rejected[0].reason})" if rejected else ""
            raise PipelineError(f"No image could be read, {len(rejected)} were left out{first}.", exit_code=1)
        header = dataclasses.replace(header, content=content.hexdigest())
        writer.add_key_value_metadata({_METADATA: json.dumps(dataclasses.asdict(header)).encode()})


def _row_groups(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Gather batches of one split until they are `ROW_GROUP_BYTES` large; larger ones are cut."""
    group: list[Batch] = []
    room = 0
    for batch in batches:
        rows = max(1, ROW_GROUP_BYTES // batch.images[0].size)
        start = 0
        while start < len(batch.images):
            if group and (room == 0 or group[0].split != batch.split):
                yield group
                group = []
            if not group:
                room = rows
            stop = min(start + room, len(batch.images))
            cut = slice(start, stop)
            group.append(Batch(batch.split, batch.images[cut], batch.labels[cut], batch.sources[cut]))
            room -= stop - start
            start = stop
    if group:
        yield group


def checksum(images: Any, labels: Any) -> int:
    """A sum over all pixels and labels modulo 2^64, where the arrays live; equal on every device.

    Args:
        images: uint8 [N, H, W, C], N at least 1, C-contiguous.
        labels: int32 [N].
    """
    values = math.prod(images.shape[1:])
    words = images.reshape(len(images), values).view(f"u{math.gcd(values, 8)}")
    return (int(words.sum(dtype="u8")) + int(labels.sum(dtype="i8"))) % 2**64


def read_header(path: Path) -> Header | None:
    """What the cache file at `path` says about itself; None where it is missing, damaged or of another format."""
    try:
        header = Header.from_json(pq.read_metadata(path).metadata[_METADATA])
    except Exception:  # whatever is wrong with it, it is made again
        return None
    return header if header.format == FORMAT else None


def read(path: Path, header: Header) -> dict[str, Split] | None:
    """Read a cache file to where the pipeline computes.

    On a GPU the file is decoded by cuDF in device memory and the images are a CuPy view of its column: no pixel
    passes through the host's memory.

    Args:
        path: The file.
        header: Its header.

    Returns:
        Split name to `Split`; None where the file is damaged.

    Raises:
        MemoryError: The data set does not fit into memory.
    """
    read_split = _read_with_cudf if device.dataframe().__name__ == "cudf" else _read_with_pyarrow
    splits = {}
    try:
        for name in header.checksums:
            groups = [index for index, split in enumerate(header.row_groups) if split == name]
            split = read_split(path, header, groups)
            if checksum(split.images, split.labels) != header.checksums[name]:
                return None
            splits[name] = split
    except MemoryError:
        raise
    except Exception:  # cuDF and pyarrow raise many kinds for a damaged file
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
    """Runs of row groups whose pixels fit into one cuDF list column."""
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
    rows = [header.rows[group] for group in groups]
    starts = np.concatenate([[0], np.cumsum(rows)])
    images = np.empty((int(starts[-1]), *header.image_shape), np.uint8)
    labels = np.empty(int(starts[-1]), np.int32)
    metadata = pq.read_metadata(path)

    def read_group(index: int) -> pa.ChunkedArray:
        with pq.ParquetFile(path, metadata=metadata) as file:
            table = file.read_row_group(groups[index])
        here = slice(int(starts[index]), int(starts[index + 1]))
        labels[here] = table.column("label").to_numpy()
        flat, position = images[here].reshape(-1), 0
        for chunk in table.column("pixels").chunks:
            values = chunk.flatten().to_numpy()
            flat[position : position + len(values)] = values
            position += len(values)
        if position != len(flat):
            raise ValueError("a row group holds fewer pixels than its header says")
        return table.column("source")

    with ThreadPoolExecutor(usable_cores()) as pool:  # pyarrow decodes one column on one core
        sources = [chunk for column in pool.map(read_group, range(len(groups))) for chunk in column.chunks]
    return Split(device.to_device(images), device.to_device(labels), pa.chunked_array(sources, pa.string()).to_pandas())
