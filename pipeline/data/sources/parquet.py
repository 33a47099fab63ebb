"""`parquet`: Parquet files with encoded images and labels, as Hugging Face writes them.

The image column is `img` or `image`: binary, or a struct with `bytes` (and `path`). The label column is `label` or
`labels`: integers, or strings. Class names come from `class_names`, else from Hugging Face's metadata in the file, else
from the labels. `data_dir` is one file, or a folder of files whose names (or whose folders' names) begin with train,
validation or test.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError, first_line
from pipeline.core.settings import DatasetSettings
from pipeline.data.dataset import SPLITS
from pipeline.data.images import ImageError
from pipeline.data.source import SPLIT_NAMES, Contents, Encoded, Source, check_folder, digest_of

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels")


def source(data_dir: Path | None, settings: DatasetSettings) -> Source:
    """The Parquet files at `data_dir`.

    Raises:
        PipelineError: There are no Parquet files, or only some of them belong to a split.
    """
    if data_dir is not None and data_dir.is_file():
        return from_files({"train": [data_dir]}, settings)
    found = find(check_folder(data_dir, "parquet"), deep=True)
    if not found:
        raise PipelineError(f"There is no .parquet file in {data_dir}; set data_dir to the folder that contains them.")
    return from_files(found, settings)


def find(folder: Path, *, deep: bool) -> dict[str, list[Path]]:
    """Find the Parquet files of a folder, by split.

    If no file belongs to a split, all files are training images.

    Args:
        folder: The folder.
        deep: Also search its subfolders.

    Raises:
        PipelineError: Some files belong to a split and others do not.
    """
    found: dict[str, list[Path]] = {}
    unnamed = []
    for path in sorted(folder.rglob("*.parquet") if deep else folder.glob("*.parquet")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        words = [re.split(r"[^a-z]", part.lower())[0] for part in reversed(parts)]
        split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)
        unnamed.append(path) if split is None else found.setdefault(split, []).append(path)
    if unnamed and found:
        raise PipelineError(
            f"{unnamed[0]} does not belong to a split; begin its name with train, validation or test, or remove it."
        )
    return {"train": unnamed} if unnamed else found


def from_files(files: dict[str, list[Path]], settings: DatasetSettings, names: Sequence[str] | None = None) -> Source:
    """A source of Parquet files by split; `names` are used if neither the user nor the file gives class names."""
    paths = [path for split in SPLITS for path in files.get(split, [])]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    location = paths[0] if len(paths) == 1 else root
    given = settings.class_names
    digest = digest_of(paths, root) + (":" + "\0".join(given) if given else "")
    return Source(str(location), digest, lambda: _read(files, given, names))


def _read(files: dict[str, list[Path]], given: Sequence[str] | None, fallback: Sequence[str] | None) -> Contents:
    parts = {split: _labels(paths) for split, paths in files.items()}
    first = next(iter(files.values()))[0]
    columns = {split: pa.chunked_array(some) for split, some in parts.items()}
    values = sorted({value for column in columns.values() for value in column.unique().to_pylist()})
    names = given or _hugging_face_names(first) or fallback
    if names is None or any(column.type == pa.string() for column in columns.values()):
        names = names or [str(value) for value in values]
        known = {name: number for number, name in enumerate(names)}
        position = {value: known[str(value)] for value in values if str(value) in known}
    else:
        position = {value: value for value in values}
    unknown = [value for value in values if value not in position]
    if unknown:
        raise PipelineError(f"The label {unknown[0]!r} is not a class ({', '.join(names)}); correct class_names.")
    labels = {
        split: np.asarray([position[value] for value in column.to_pylist()], np.int64)
        for split, column in columns.items()
    }
    return Contents(list(names), labels, lambda split: _images(files[split]))


def _labels(paths: list[Path]) -> list[pa.Array]:
    """The label columns of some files: int64, or strings.

    Raises:
        PipelineError: A file is not Parquet, or its label column is missing, incomplete or of another type.
    """
    chunks = []
    for path in paths:
        try:
            name = _column(path, pq.read_schema(path), LABEL_COLUMNS)
            labels = pq.read_table(path, columns=[name]).column(0)
            if labels.null_count:
                raise PipelineError(f"{path} has {labels.null_count} rows without a label; label or remove them.")
            kind = labels.type.value_type if pa.types.is_dictionary(labels.type) else labels.type
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if not (text or pa.types.is_integer(kind)):
                raise PipelineError(f"The labels in {name!r} of {path} must be integers or strings, got {labels.type}.")
            chunks.append(labels.cast(pa.string() if text else pa.int64()).combine_chunks())
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error
    return chunks


def _column(path: Path, schema: pa.Schema, candidates: tuple[str, ...]) -> str:
    found = [name for name in candidates if name in schema.names]
    if not found:
        wanted, have = " or ".join(map(repr, candidates)), ", ".join(schema.names) or "none"
        raise PipelineError(f"{path} needs a column {wanted}, got {have}; rename one of its columns.")
    return found[0]


def _unreadable(path: Path, error: Exception) -> PipelineError:
    return PipelineError(f"{path} cannot be read as Parquet ({first_line(error)}); replace it.", exit_code=1)


def _hugging_face_names(path: Path) -> list[str] | None:
    """The class names in the metadata that Hugging Face's `datasets` writes, or None."""
    schema = pq.read_schema(path)
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = next(features[name] for name in LABEL_COLUMNS if name in features)["names"]
        names = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
        return [str(name) for name in names] or None
    except (KeyError, ValueError, TypeError, StopIteration):
        return None


def _images(paths: list[Path]) -> Iterator[tuple[str, Encoded]]:
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                name = _column(path, file.schema_arrow, IMAGE_COLUMNS)
                kind = file.schema_arrow.field(name).type
                nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
                encoded = kind.field("bytes").type if nested else kind
                if not (pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded)):
                    raise PipelineError(f"The column {name!r} of {path} must contain encoded images, got {kind}.")
                batches = file.iter_batches(batch_size=256, columns=[name])
                for row, value in enumerate(value for batch in batches for value in batch.column(0).to_pylist()):
                    fields = (value or {}) if nested else {"bytes": value}
                    source = str(fields.get("path") or f"{path.name}#{row}")
                    data = fields.get("bytes")
                    yield source, data if data is not None else ImageError(source, "there is no image data")
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error
