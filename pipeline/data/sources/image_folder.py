"""`image_folder`: your own images, one folder per class.

Either ``data_dir/CLASS/*.jpg``, or ``data_dir/train/CLASS/…`` and optionally ``test/`` and ``validation/`` (or
``val/``, ``valid/``, ``dev/``). Images are PNG, JPEG, BMP, GIF, WebP, TIFF, HEIC or AVIF files, also in
subfolders of the class. Images in other formats, such as camera raw files, are listed as unreadable; other files are
ignored.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.settings import DatasetSettings
from pipeline.data.images import OTHER_SUFFIXES, SUFFIXES
from pipeline.data.source import SPLIT_NAMES, Contents, Source, check_folder, digest_of


def source(data_dir: Path | None, settings: DatasetSettings) -> Source:
    """The class folders in `data_dir`.

    Raises:
        PipelineError: As for `find`.
        OSError: A folder cannot be read.
    """
    class_names, files = find(data_dir)
    paths = [path for part in files.values() for path, _ in part]
    # With the class names, because an empty class folder contains no file.
    digest = digest_of(paths, data_dir) + ":" + "\0".join(class_names)

    def read() -> Contents:
        return Contents(class_names, labels_of(files), lambda split: ((str(path), path) for path, _ in files[split]))

    return Source(str(data_dir), digest, read)


def find(data_dir: Path | None) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    """Find the classes and image files of a folder.

    Args:
        data_dir: The folder.

    Returns:
        (class_names, files): K names, and (path, label) of each image by split; the only split is ``train`` if the
        folder has no split folders.

    Raises:
        PipelineError: `data_dir` is not a folder, there are no class folders, a class is missing in train, or class
            folders are next to train.
        OSError: A folder cannot be read.
    """
    root = check_folder(data_dir, "image_folder")
    splits = _split_folders(root)
    class_names = [path.name for path in _class_folders(splits["train"])]
    files: dict[str, list[tuple[Path, int]]] = {}
    for split, place in splits.items():
        inside = _class_folders(place)
        if not inside:
            raise PipelineError(f"{place} has no class folders; put the images of each class into a folder.")
        unknown = [path for path in inside if path.name not in class_names]
        if unknown:
            raise PipelineError(f"The class {unknown[0]} is not in {splits['train']}; add it there or remove it.")
        files[split] = [(path, class_names.index(place.name)) for place in inside for path in _image_files(place)]
    return class_names, files


def labels_of(files: dict[str, list[tuple[Path, int]]]) -> dict[str, np.ndarray]:
    """The labels, int32 [N], of each split that `find` returns."""
    return {split: np.asarray([label for _, label in part], np.int32) for split, part in files.items()}


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split; `root` is the training split if it contains class folders (one may be called train)."""
    others = [path for path in _class_folders(root) if path.name not in SPLIT_NAMES]
    if _class_folders(root / "train"):
        others = [path.name for path in others if _image_files(path)]
        if others:
            raise PipelineError(
                f"{root} has class folders in train and next to it ({', '.join(others)}); move them into train or "
                "out of the dataset."
            )
    elif others or not (root / "train").is_dir():
        return {"train": root}
    return {split: root / name for name, split in SPLIT_NAMES.items() if (root / name).is_dir()}


def _class_folders(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _image_files(place: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(place, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        kinds = SUFFIXES | OTHER_SUFFIXES
        names = (name for name in sorted(names) if not name.startswith(".") and Path(name).suffix.lower() in kinds)
        found += [Path(parent, name) for name in names]
    return found


def _raise(error: OSError) -> NoReturn:
    raise error  # os.walk would leave out the folder
