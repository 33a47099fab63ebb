"""`image_folder`: your own images, one folder a class.

Either ``data_dir/CLASS/*.jpg``, or ``data_dir/train/CLASS/…`` and, where they exist, ``test/`` and ``validation/`` (or
``val/``, ``valid/``). PNG, JPEG, BMP, GIF and WebP, also in folders below the class. Pictures of other kinds, such as
HEIC and TIFF, are listed as unreadable; files that are no pictures are passed over.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.data import download
from pipeline.data.images import OTHER_SUFFIXES, SUFFIXES
from pipeline.data.source import Contents, Settings, Source, folder

_SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


def source(data_dir: Path | None, settings: Settings) -> Source:
    """The class folders in `data_dir`.

    Raises:
        PipelineError: There is no such folder, one cannot be read, it has no class folders, or a split has a class that
            train has not.
    """
    root = folder(data_dir, "image_folder")
    try:
        return _found(root)
    except OSError as error:
        _unreadable(error)


def _found(root: Path) -> Source:
    splits = {"train": root}
    # A folder named train may also be a class; one that stands beside nothing but other splits is none.
    known = {name for names in _SPLIT_FOLDERS.values() for name in names}
    only_splits = (root / "train").is_dir() and {path.name for path in _class_folders(root)} <= known
    if only_splits or _class_folders(root / "train"):
        splits = {
            split: root / name for split, names in _SPLIT_FOLDERS.items() for name in names if (root / name).is_dir()
        }
    class_names = [path.name for path in _class_folders(splits["train"])]
    if not class_names:
        raise PipelineError(
            f"{splits['train']} has no class folders; put the images of each class into a folder of its name."
        )
    files: dict[str, list[tuple[Path, int]]] = {}
    for split, place in splits.items():
        inside = _class_folders(place)
        if not inside:
            raise PipelineError(f"{place} has no class folders; sort its images into them, or move it away.")
        unknown = [path for path in inside if path.name not in class_names]
        if unknown:
            raise PipelineError(f"The class {unknown[0]} is not in {splits['train']}; add it there or remove it.")
        files[split] = [(path, class_names.index(place.name)) for place in inside for path in _image_files(place)]
    paths = [path for part in files.values() for path, _ in part]
    # An empty class folder holds no file to be digested, but counts as a class.
    digest = download.digest_of(paths, root) + ":" + "\0".join(class_names)
    labels = {split: np.asarray([label for _, label in part], np.int32) for split, part in files.items()}

    def read() -> Contents:
        return Contents(class_names, labels, lambda split: ((str(path), path) for path, _ in files[split]))

    return Source(str(root), digest, read)


def _class_folders(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    inside = sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    # A link back to where it is would be one more class with all the images.
    return [path for path in inside if not (path.is_symlink() and place.resolve().is_relative_to(path.resolve()))]


def _image_files(place: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(place, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        kinds = SUFFIXES | OTHER_SUFFIXES
        keep = (name for name in sorted(names) if not name.startswith(".") and Path(name).suffix.lower() in kinds)
        found += [Path(parent, name) for name in keep]
    return found


def _unreadable(error: OSError) -> NoReturn:
    raise PipelineError(f"The folder {error.filename} cannot be read ({error.strerror}).") from None
