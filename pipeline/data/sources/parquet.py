"""`parquet`: Parquet files with encoded images and labels, as Hugging Face writes them.

The image column is `img` or `image`: binary, or a struct with `bytes` (and `path`). The label column is `label` or
`labels`: integers, or strings. Class names come from `class_names`, else from Hugging Face's metadata in the file, else
from the labels. `data_dir` is one file, or a folder of them whose names (or whose folders' names) begin with train,
validation or test.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError
from pipeline.data import download
from pipeline.data.dataset import SPLITS
from pipeline.data.source import Contents, Encoded, Settings, Source

IMAGE_COLUMNS = ("img", "image")


LABEL_COLUMNS = ("label", "labels")


_SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
                "dev": "validation", "test": "test"}  # fmt: skip


def source(data_dir: Path | None, settings: Settings) -> Source:
    """The Parquet files at `data_dir`.

    Raises:
        PipelineError: There are none, or some cannot be told to belong to a split.
    """
    if data_dir is None:
        raise PipelineError("The data set 'parquet' needs data_dir=…, a Parquet file or a folder of them.")
    if data_dir.is_file():
        return from_files({"train": [data_dir]}, settings)
    if not data_dir.is_dir():
        raise PipelineError(f"There is no file or folder {data_dir}; set data_dir to the Parquet files.")
    found = find(data_dir, deep=True)
    if not found:
        raise PipelineError(f"There is no .parquet file in {data_dir}; set data_dir to the folder that holds them.")
    return from_files(found, settings)


def find(folder: Path, *, deep: bool) -> dict[str, list[Path]]:
    """The Parquet files of a folder (with `deep`, also of the folders in it), by split.

    Files of no recognisable split are all training images where none has one.

    Raises:
        PipelineError: Some files belong to a split and others do not.
    """
    found: dict[str, list[Path]] = {}
    nameless = []
    for path in sorted(folder.rglob("*.parquet") if deep else folder.glob("*.parquet")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        words = [re.split(r"[^a-z]", part.lower())[0] for part in reversed(parts)]
        split = next((_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES), None)
        nameless.append(path) if split is None else found.setdefault(split, []).append(path)
    if nameless and found:
        raise PipelineError(
            f"{nameless[0]} belongs to no split; begin its name with train, validation or test, or move it away."
        )
    return {"train": nameless} if nameless else found


def from_files(files: dict[str, list[Path]], settings: Settings, names: list[str] | None = None) -> Source:
    """A source of Parquet files by split; `names` are the class names where neither user nor file gives any."""
    paths = [path for split in SPLITS for path in files.get(split, [])]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    location = paths[0] if len(paths) == 1 else root
    digest = download.digest_of(paths, root) + (":" + "\0".join(settings.class_names) if settings.class_names else "")
    return Source(str(location), digest, lambda: _read(files, settings.class_names, names))


def _read(files: dict[str, list[Path]], given: list[str] | None, fallback: list[str] | None) -> Contents:
    parts = {split: _labels(paths) for split, paths in files.items()}
    types = {part.type for some in parts.values() for part in some}
    if len(types) > 1:
        raise PipelineError(
            f"The labels below {next(iter(files.values()))[0].parent} are numbers in some files and texts in others."
        )
    found = {split: pa.chunked_array(some) for split, some in parts.items()}
    values = sorted({value for column in found.values() for value in column.unique().to_pylist()})
    names = given or _hugging_face_names(next(iter(files.values()))[0]) or fallback
    if names is None or types == {pa.string()}:
        names = names or [str(value) for value in values]
        position = {value: names.index(str(value)) for value in values if str(value) in names}
    else:
        position = {value: value for value in values}
    unknown = [value for value in values if value not in position]
    if unknown:
        raise PipelineError(f"The label {unknown[0]!r} is none of the classes {', '.join(names)}; correct class_names.")
    labels = {
        split: np.asarray([position[value] for value in column.to_pylist()], np.int64)
        for split, column in found.items()
    }
    return Contents(names, labels, lambda split: _images(files[split]))


def _labels(paths: list[Path]) -> list[pa.Array]:
    """The label columns of some files: int64, or strings.

    Raises:
        PipelineError: No readable Parquet file, no such column, another type, or a missing label.
    """
    chunks = []
    for path in paths:
        try:
            name = _column(path, pq.read_schema(path), LABEL_COLUMNS, "label")
            labels = pq.read_table(path, columns=[name]).column(0)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from None
        if labels.null_count:
            raise PipelineError(f"{path} has {labels.null_count} rows without a label; remove them or label them.")
        kind = labels.type.value_type if pa.types.is_dictionary(labels.type) else labels.type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not (text or pa.types.is_integer(kind)):
            raise PipelineError(f"The column {name!r} of {path} is {labels.type}; labels must be integers or strings.")
        try:
            chunks.append(labels.cast(pa.string() if text else pa.int64()).combine_chunks())
        except pa.ArrowException as error:
            raise _damaged(path, error) from None
    return chunks


def _column(path: Path, schema: pa.Schema, candidates: tuple[str, ...], purpose: str) -> str:
    found = [name for name in candidates if name in schema.names]
    if not found:
        wanted, have = " or ".join(map(repr, candidates)), ", ".join(schema.names) or "none"
        raise PipelineError(f"{path} has no {purpose} column {wanted}; its columns are: {have}. Rename one of them.")
    return found[0]


def _damaged(path: Path, error: Exception) -> PipelineError:
    reason = str(error).splitlines()[0].rstrip(".")
    return PipelineError(f"{path} cannot be read as Parquet ({reason}); get it again.", exit_code=1)


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
                name = _column(path, file.schema_arrow, IMAGE_COLUMNS, "image")
                kind = file.schema_arrow.field(name).type
                nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
                encoded = kind.field("bytes").type if nested else kind
                if not (pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded)):
                    raise PipelineError(
                        f"The column {name!r} of {path} is {kind}; it must hold encoded images (binary)."
                    )
                row = 0
                for batch in file.iter_batches(batch_size=256, columns=[name]):
                    for value in batch.column(0).to_pylist():
                        data, inner = (value or {}).get("bytes") if nested else value, (value or {}) if nested else {}
                        yield str(inner.get("path") or f"{path.name}#{row}"), data
                        row += 1
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from None
