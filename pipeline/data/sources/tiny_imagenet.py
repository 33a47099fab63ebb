"""`tiny_imagenet`: photographs of 64×64 pixels in 200 classes of ImageNet, 500 a class, and 50 a class for the test.

Looked for in `data_dir` and its folder `tiny-imagenet`, in this order: the unpacked folder (``wnids.txt``, ``train``,
``val``), a zip archive of it (``tiny-imagenet-200*.zip``, read as it is, never unpacked); else the archive is
downloaded. The official test split has no labels, so the official validation split is the test split here, and the
validation split is a part of the training images.

Source: Stanford CS231N, http://cs231n.stanford.edu/tiny-imagenet-200.zip; Le and Yang, Tiny ImageNet Visual Recognition
Challenge, 2015.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.core.files import DAMAGED_ZIP
from pipeline.data import download
from pipeline.data.images import ImageError, decode_image, resize_and_center_crop
from pipeline.data.source import Contents, Encoded, Settings, Source, folder

ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


DIGEST = "md5:90528d7ca1a48142e341f4ef8d21d0de"  # of the file there; the site itself publishes none


ARCHIVE = "tiny-imagenet-200.zip"


_FOLDERS = ("tiny-imagenet-200", "tiny-imagenet", "tiny_imagenet")


_ANNOTATIONS = "val/val_annotations.txt"


_LISTS = ("wnids.txt", "words.txt", _ANNOTATIONS)


_SUFFIXES = (".jpeg", ".jpg")


def source(data_dir: Path | None, settings: Settings) -> Source:
    """Tiny ImageNet from `data_dir`; downloaded there, or into the cache folder where `data_dir` is None.

    Raises:
        PipelineError: `data_dir` does not exist, or the data is not there and cannot be downloaded.
    """
    if data_dir is None:
        home = settings.cache / "downloads" / "tiny_imagenet"
        candidates = [home]
    else:
        data_dir = folder(data_dir, "tiny_imagenet")
        home = data_dir if data_dir.name in _FOLDERS else data_dir / "tiny-imagenet"
        inner = [data_dir / name for name in _FOLDERS]
        candidates = [*inner, *(place / _FOLDERS[0] for place in inner), data_dir]
    places = [place for place in candidates if place.is_dir()]
    unpacked = next((place for place in places if (place / "train").is_dir() and _is_tiny_imagenet(place)), None)
    if unpacked is not None:
        files = _Folder(unpacked)
        digest = download.digest_of([unpacked / name for name in files.names], unpacked)
        return Source(str(unpacked), digest, lambda: read(files))
    found = (archive for place in places for archive in sorted(place.glob("tiny-imagenet-200*.zip")))
    archive = next(found, None) or download.download(ADDRESS, home / ARCHIVE, DIGEST, progress=settings.progress)
    return Source(str(archive), download.digest_of([archive], archive.parent), lambda: read(_Zip(archive)))


def _is_tiny_imagenet(place: Path) -> bool:
    """Whether a folder with ``train`` in it is the unpacked data set, one of its lists missing or not."""
    return any((place / name).is_file() for name in _LISTS)


class _Folder:
    """The unpacked data set: names of its files, with ``/`` between the parts, and their contents."""

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
    """The archive, with the same names."""

    def __init__(self, path: Path):
        self.location = str(path)
        try:
            self._file = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise PipelineError(
                f"{path} is no readable zip archive ({error}); download it again.", exit_code=1
            ) from None
        members = self._file.namelist()
        wnids = next((name for name in members if PurePosixPath(name).name == "wnids.txt"), "wnids.txt")
        self._prefix = wnids.removesuffix("wnids.txt")
        self.names = sorted(name.removeprefix(self._prefix) for name in members if name.startswith(self._prefix))

    def read(self, name: str) -> bytes:
        return self._file.read(self._prefix + name)


def read(files: _Folder | _Zip) -> Contents:
    """The contents of the folder or archive.

    Raises:
        PipelineError: A list is missing or does not fit the images.
    """
    identifiers = sorted(_text(files, "wnids.txt").split())
    numbers = {identifier: number for number, identifier in enumerate(identifiers)}
    splits = {"train": _training_images(files), "test": _validation_images(files)}
    for split, images in splits.items():
        unknown = next((identifier for _, identifier in images if identifier not in numbers), None)
        if unknown is not None:
            raise PipelineError(
                f"{files.location} has a {split} image of {unknown!r}, which is not in its wnids.txt; get the data set "
                f"again from {ADDRESS}.",
                exit_code=1,
            )
    labels = {split: np.array([numbers[one] for _, one in images], np.int32) for split, images in splits.items()}

    def encoded(split: str) -> Iterator[tuple[str, Encoded]]:
        for name, _ in splits[split]:
            try:
                yield name, _in_colour(files.read(name))
            except (KeyError, FileNotFoundError):
                yield name, None
            except OSError as error:
                yield name, ImageError(name, error.strerror or str(error))
            except DAMAGED_ZIP:
                yield name, ImageError(name, "damaged in the archive")

    return Contents(readable_names(identifiers, _text(files, "words.txt")), labels, encoded)


def readable_names(identifiers: list[str], words: str) -> list[str]:
    """A name for each WordNet identifier: the first of its words, or all of them where two classes share the first.

    Args:
        identifiers: K identifiers, for example ``n02124075``.
        words: The text of ``words.txt``: identifier, tab, words with commas between them.

    Returns:
        K different names; one that is not in `words`, or still not alone, has its identifier in it.
    """
    known = dict(line.split("\t", 1) for line in words.splitlines() if "\t" in line)
    every = [known.get(identifier, "").strip() or identifier for identifier in identifiers]
    names = [text.split(",")[0].strip() or text for text in every]
    names = [text if names.count(name) > 1 else name for name, text in zip(names, every, strict=True)]
    count = Counter(names)
    return [f"{name} ({one})" if count[name] > 1 else name for name, one in zip(names, identifiers, strict=True)]


def _text(files: _Folder | _Zip, name: str) -> str:
    try:
        return files.read(name).decode()
    except (*DAMAGED_ZIP, UnicodeDecodeError):
        raise PipelineError(
            f"{files.location} has no readable {name}; get the data set again from {ADDRESS}.", exit_code=1
        ) from None


def _training_images(files: _Folder | _Zip) -> list[tuple[str, str]]:
    """(name, WordNet identifier) of each image of ``train/WNID/images``."""
    parts = ((name, name.split("/")) for name in files.names if name.lower().endswith(_SUFFIXES))
    return [(name, part[1]) for name, part in parts if part[0] == "train" and len(part) > 2]


def _validation_images(files: _Folder | _Zip) -> list[tuple[str, str]]:
    """(name, WordNet identifier) of each line of ``val_annotations.txt``: image, tab, identifier, tab, its box."""
    lines = [line.split("\t") for line in _text(files, _ANNOTATIONS).splitlines() if line.strip()]
    short = next((number for number, line in enumerate(lines, start=1) if len(line) < 2), None)
    if short is not None:
        raise PipelineError(
            f"Line {short} of {_ANNOTATIONS} in {files.location} has no label; get the data set again from {ADDRESS}.",
            exit_code=1,
        )
    annotated = [(f"val/images/{line[0]}", line[1].strip()) for line in lines]
    twice = [name for name, count in Counter(name for name, _ in annotated).items() if count > 1]
    if twice:
        raise PipelineError(
            f"{_ANNOTATIONS} in {files.location} has {twice[0].rpartition('/')[2]} more than once; get the data set "
            f"again from {ADDRESS}.",
            exit_code=1,
        )
    without = {name for name in files.names if name.startswith("val/images/") and name.lower().endswith(_SUFFIXES)}
    without -= {name for name, _ in annotated}
    if without:
        raise PipelineError(
            f"{files.location} has {len(without)} images without a line in {_ANNOTATIONS}, for example "
            f"{min(without)}; get the data set again from {ADDRESS}.",
            exit_code=1,
        )
    return annotated


def _in_colour(data: bytes) -> bytes | np.ndarray:
    """A colour JPEG as it is, to be decoded in parallel with the others, and one of the few grey ones as RGB pixels."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode != "L":
                return data
        pixels = decode_image(data)
    except (ImageError, OSError):  # what is wrong with it is found and listed when it is decoded
        return data
    return resize_and_center_crop(pixels, (*pixels.shape[:2], 3))
