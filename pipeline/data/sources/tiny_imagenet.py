"""`tiny_imagenet`: photographs of 64×64 pixels in 200 ImageNet classes: 500 per class, and 50 in the test split.

The source searches `data_dir` and its folder `tiny-imagenet` for the unpacked folder (``wnids.txt``, ``train``,
``val``), then for a zip archive (``tiny-imagenet-200*.zip``, read without unpacking); if neither exists, it downloads
the archive. The official test split has no labels, so the official validation split is the test split here, and the
validation split is a part of the training images.

Source: Stanford CS231N, http://cs231n.stanford.edu/tiny-imagenet-200.zip; Le and Yang, Tiny ImageNet Visual Recognition
Challenge, 2015.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.core.errors import PipelineError, first_line
from pipeline.core.files import DAMAGED_ZIP
from pipeline.core.settings import DatasetSettings
from pipeline.data import download
from pipeline.data.images import ImageError
from pipeline.data.source import Contents, Encoded, Source, digest_of, search_folders

ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
DIGEST = "md5:90528d7ca1a48142e341f4ef8d21d0de"  # computed from the file; the site does not publish a digest
ARCHIVE = "tiny-imagenet-200.zip"
_FOLDERS = ("tiny-imagenet", "tiny_imagenet", "tiny-imagenet-200")
_ANNOTATIONS = "val/val_annotations.txt"
_LISTS = ("wnids.txt", "words.txt", _ANNOTATIONS)
_SUFFIXES = (".jpeg", ".jpg")


def source(data_dir: Path | None, settings: DatasetSettings) -> Source:
    """Tiny ImageNet in `data_dir`; downloaded there, or into the cache folder if `data_dir` is None.

    Raises:
        PipelineError: `data_dir` does not exist, or the data is not there and cannot be downloaded.
    """
    candidates, home = search_folders(data_dir, settings, _FOLDERS)
    places = [place for folder in candidates for place in (folder, folder / "tiny-imagenet-200")]
    unpacked = next((place for place in places if (place / "wnids.txt").is_file()), None)
    if unpacked is not None:
        files = _Folder(unpacked)
        digest = digest_of([unpacked / name for name in files.names], unpacked)
        return Source(str(unpacked), digest, lambda: read(files))
    found = (archive for place in places for archive in sorted(place.glob("tiny-imagenet-200*.zip")))
    archive = next(found, None) or download.download(ADDRESS, home / ARCHIVE, DIGEST, progress=settings.progress)

    def read_archive() -> Contents:
        if data_dir is None:  # an archive in data_dir may differ from the official one, for example be a subset
            download.check_digest(archive, DIGEST)
        return read(_Zip(archive))

    return Source(str(archive), digest_of([archive], archive.parent), read_archive)


class _Folder:
    """The unpacked dataset: the names of its files, relative to its root and with ``/``, and their contents."""

    def __init__(self, root: Path):
        self.location = str(root)
        self._root = root
        texts = [name for name in _LISTS if (root / name).is_file()]
        images = (path for split in ("train", "val") for path in (root / split).rglob("*"))
        self.names = texts + sorted(
            path.relative_to(root).as_posix() for path in images if path.suffix.lower() in _SUFFIXES
        )

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()


class _Zip:
    """The zip archive, with the same interface as `_Folder`."""

    def __init__(self, path: Path):
        self.location = str(path)
        try:
            self._file = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            message = f"{path} cannot be read as a zip archive ({error}); download it again."
            raise PipelineError(message, exit_code=1) from error
        members = self._file.namelist()
        wnids = next((name for name in members if PurePosixPath(name).name == "wnids.txt"), "wnids.txt")
        self._prefix = wnids.removesuffix("wnids.txt")
        self.names = sorted(name.removeprefix(self._prefix) for name in members if name.startswith(self._prefix))

    def read(self, name: str) -> bytes:
        return self._file.read(self._prefix + name)


def read(files: _Folder | _Zip) -> Contents:
    """Read the lists of the folder or archive.

    Raises:
        PipelineError: A list is missing or does not match the images.
    """
    identifiers = sorted(_text(files, "wnids.txt").split())
    numbers = {identifier: number for number, identifier in enumerate(identifiers)}
    splits = {"train": _training_images(files), "test": _validation_images(files)}
    for split, images in splits.items():
        unknown = next((identifier for _, identifier in images if identifier not in numbers), None)
        if unknown is not None:
            raise _incomplete(files, f"has a {split} image of {unknown!r}, which is not in its wnids.txt")
    labels = {split: np.array([numbers[one] for _, one in images], np.int32) for split, images in splits.items()}

    def encoded(split: str) -> Iterator[tuple[str, Encoded]]:
        for name, _ in splits[split]:
            try:
                yield name, files.read(name)
            except DAMAGED_ZIP as error:
                yield name, ImageError(name, f"missing or damaged ({first_line(error)})")

    # A few images are grey; they become RGB like the others.
    return Contents(readable_names(identifiers, _text(files, "words.txt")), labels, encoded, channels=3)


def readable_names(identifiers: list[str], words: str) -> list[str]:
    """A name for each WordNet identifier: the first of its words, or all of them if two classes share the first.

    Args:
        identifiers: K identifiers, for example ``n02124075``.
        words: The text of ``words.txt``: identifier, tab, words separated by commas.

    Returns:
        K different names; the name of a class that is not in `words`, or shares all words, contains its identifier.
    """
    known = dict(line.split("\t", 1) for line in words.splitlines() if "\t" in line)
    every = [known.get(identifier, "").strip() or identifier for identifier in identifiers]
    names = [text.split(",")[0].strip() or text for text in every]
    count = Counter(names)
    names = [text if count[name] > 1 else name for name, text in zip(names, every, strict=True)]
    count = Counter(names)
    return [f"{name} ({one})" if count[name] > 1 else name for name, one in zip(names, identifiers, strict=True)]


def _text(files: _Folder | _Zip, name: str) -> str:
    try:
        return files.read(name).decode()
    except (*DAMAGED_ZIP, UnicodeDecodeError) as error:
        raise _incomplete(files, f"has no readable {name}") from error


def _training_images(files: _Folder | _Zip) -> list[tuple[str, str]]:
    """(name, WordNet identifier) of each image of ``train/WNID/images``."""
    parts = ((name, name.split("/")) for name in files.names if name.lower().endswith(_SUFFIXES))
    return [(name, part[1]) for name, part in parts if part[0] == "train" and len(part) > 2]


def _validation_images(files: _Folder | _Zip) -> list[tuple[str, str]]:
    """(name, WordNet identifier) of each line of ``val_annotations.txt``: image, tab, identifier, tab, bounding box."""
    lines = [line.split("\t") for line in _text(files, _ANNOTATIONS).splitlines() if "\t" in line]
    return [(f"val/images/{line[0]}", line[1].strip()) for line in lines]


def _incomplete(files: _Folder | _Zip, problem: str) -> PipelineError:
    return PipelineError(f"{files.location} {problem}; download the dataset again from {ADDRESS}.", exit_code=1)
