"""`table`: a CSV or Parquet file with the file names and labels of images, and optionally their splits.

    file,label,split
    photos/1.jpg,cat,train
    photos/2.jpg,dog,test

File names are relative to the table's folder. `data_dir` is the table, or its folder; if the folder contains several
tables, `file` is the name of one. `file_column`, `label_column` and `split_column` name the columns.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError, first_line
from pipeline.core.settings import DatasetSettings
from pipeline.data.dataset import SPLITS
from pipeline.data.source import SPLIT_NAMES, Contents, Source, check_folder, digest_of

FILE_COLUMNS = ("file", "file_name", "filename", "path", "image")
LABEL_COLUMNS = ("label", "class")
SPLIT_COLUMNS = ("split",)


def source(data_dir: Path | None, settings: DatasetSettings) -> Source:
    """The images that a table lists.

    Raises:
        PipelineError: There is no table, it cannot be read, a column is missing, a value is empty, a split is unknown,
            or images are missing or listed twice.
    """
    table = _find(data_dir, settings.file)
    names = _columns(table)
    file_column = _choose(table, names, "file_column", settings.file_column, FILE_COLUMNS)
    label_column = _choose(table, names, "label_column", settings.label_column, LABEL_COLUMNS)
    used = [file_column, label_column]
    if settings.split_column is not None or any(name in names for name in SPLIT_COLUMNS):
        used.append(_choose(table, names, "split_column", settings.split_column, SPLIT_COLUMNS))
    columns = _read(table, used)
    paths = [table.parent / name for name in columns[0]]
    _check_files(table, paths)
    splits = _splits(table, columns[2]) if len(columns) == 3 else ["train"] * len(paths)
    values = set(columns[1])
    numbers = all(value.isascii() and value.isdigit() for value in values)
    class_names = sorted(values, key=int if numbers else str)
    position = {name: index for index, name in enumerate(class_names)}
    files = {name: [] for name in SPLITS if name in splits}
    for path, label, split in zip(paths, columns[1], splits, strict=True):
        files[split].append((path, position[label]))
    labels = {split: np.array([label for _, label in part], np.int32) for split, part in files.items()}
    digest = digest_of([table, *paths], Path(table.anchor)) + ":" + "\0".join(used)

    def read() -> Contents:
        return Contents(class_names, labels, lambda split: ((str(path), path) for path, _ in files[split]))

    return Source(str(table), digest, read)


def _find(data_dir: Path | None, file: str | None) -> Path:
    """The path of the table."""
    if data_dir is not None and data_dir.is_file():
        return data_dir
    folder = check_folder(data_dir, "table")
    if file is not None:
        if not (folder / file).is_file():
            raise PipelineError(f"There is no table {folder / file}; set file (dataset.file) to its name in data_dir.")
        return folder / file
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".parquet"))
    if len(found) != 1:
        listed = ", ".join(path.name for path in found[:10]) or "none"
        raise PipelineError(
            f"Expected one CSV or Parquet file in {folder}, got {listed}; set data_dir to the table, or file "
            "(dataset.file) to its name."
        )
    return found[0]


def _columns(table: Path) -> list[str]:
    try:
        if table.suffix.lower() == ".parquet":
            return pq.read_schema(table).names
        with table.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader([file.readline()], delimiter=_delimiter(table)), [])
    except (pa.ArrowException, OSError, ValueError, csv.Error) as error:
        raise _unreadable(table, error) from error


def _delimiter(table: Path) -> str:
    """Comma, semicolon or tab: spreadsheets write semicolons in many countries."""
    with table.open(encoding="utf-8-sig") as file:
        header = file.readline()
    return max(",;\t", key=header.count)


def _choose(table: Path, names: list[str], setting: str, value: str | None, usual: tuple[str, ...]) -> str:
    """The name of a column: the setting, else the first usual name in the table."""
    found = [name for name in (usual if value is None else (value,)) if name in names]
    if not found:
        wanted = " or ".join(map(repr, usual if value is None else (value,)))
        raise PipelineError(
            f"{table} needs a column {wanted}, got {', '.join(names) or 'none'}; set {setting} (dataset.{setting}) to "
            "the name of the column."
        )
    return found[0]


def _read(table: Path, names: list[str]) -> list[list[str]]:
    """The values of some columns as text."""
    try:
        if table.suffix.lower() == ".parquet":
            content = pq.read_table(table, columns=names)
        else:
            content = pyarrow.csv.read_csv(
                table,
                parse_options=pyarrow.csv.ParseOptions(delimiter=_delimiter(table), newlines_in_values=True),
                # As text, so that the classes 007 and NA keep their names.
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=names, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
                ),
            )
        columns = [content.column(name).cast(pa.string()).to_pylist() for name in names]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(table, error) from error
    for name, values in zip(names, columns, strict=True):
        empty = [row for row, value in enumerate(values, 1) if not value]
        if empty:
            raise PipelineError(f"{table} has {len(empty)} rows without {name!r}, first row {empty[0]}; complete them.")
    if not columns[0]:
        raise PipelineError(f"{table} has no rows; list the images in it.")
    return columns


def _unreadable(table: Path, error: Exception) -> PipelineError:
    kind = "Parquet" if table.suffix.lower() == ".parquet" else "CSV (UTF-8)"
    return PipelineError(f"{table} cannot be read as {kind} ({first_line(error)}); repair it.", exit_code=1)


def _check_files(table: Path, paths: list[Path]) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        listed = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise PipelineError(
            f"{len(missing)} of {len(paths)} files in {table} are missing: {listed}; file names must be relative to "
            "the folder of the table."
        )
    path, count = Counter(paths).most_common(1)[0]
    if count > 1:
        raise PipelineError(f"{path} is in {count} rows of {table}; an image needs exactly one label and split.")


def _splits(table: Path, values: list[str]) -> list[str]:
    unknown = Counter(value for value in values if value.strip().lower() not in SPLIT_NAMES)
    if unknown:
        listed = ", ".join(f"{value!r} ({count} rows)" for value, count in unknown.most_common(10))
        raise PipelineError(f"{table} has unknown splits: {listed}; use {', '.join(SPLIT_NAMES)}.")
    return [SPLIT_NAMES[value.strip().lower()] for value in values]
