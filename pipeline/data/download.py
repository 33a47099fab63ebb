"""Files from elsewhere: download, check against a published digest, unpack inside one folder, notice a change."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import stat
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from pipeline.core import files
from pipeline.core.errors import PipelineError, first_line

_BLOCK = 2**20


_TIMEOUT = 30  # seconds without an answer


def download(address: str, path: Path, digest: str, *, progress: bool = True) -> Path:
    """Download a file unless it is there, and check it; it appears at `path` complete or not at all.

    Args:
        address: URL.
        path: Where it goes; the folder is made where missing.
        digest: Its published digest, as ``"md5:…"`` or ``"sha256:…"``.
        progress: Show a progress bar on a terminal.

    Returns:
        `path`.

    Raises:
        PipelineError: No connection, an error from the server, a connection that broke, another digest, no room.
    """
    if path.exists():
        return path
    with files.atomic_write_in_cache(path) as temporary:
        with temporary.open("wb") as file:
            try:
                with _open(address) as answer:
                    size = int(answer.headers.get("Content-Length") or 0)
                    with _bar(path.name, size, progress) as bar:
                        while block := _read(answer):
                            file.write(block)
                            bar.update(len(block))
                    if file.tell() < size:
                        raise _Interrupted(f"the connection ended after {file.tell()} of {size} bytes")
            except _Interrupted as error:
                raise PipelineError(
                    f"{address} could not be downloaded ({first_line(error)}); try again, or download it elsewhere "
                    f"and put it at {path}, or name the folder it is in (data_dir).",
                    exit_code=1,
                ) from None
        check_digest(temporary, digest, named=address)
    return path


class _Interrupted(Exception):
    """The connection broke; kept apart from an error of the disk."""


def _open(address: str) -> Any:
    try:
        return urllib.request.urlopen(address, timeout=_TIMEOUT)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a malformed answer or address
        raise _Interrupted(getattr(error, "reason", None) or error or type(error).__name__) from None


def _read(answer: IO[bytes]) -> bytes:
    try:
        return answer.read(_BLOCK)
    except Exception as error:  # sockets, TLS and HTTP each have their own
        raise _Interrupted(error) from None


def _bar(name: str, size: int, progress: bool) -> tqdm:
    return tqdm(total=size or None, desc=name, unit="B", unit_scale=True, disable=None if progress else True)


def check_digest(path: Path, digest: str, *, named: str | None = None) -> None:
    """Compare a file with its published digest (``"md5:…"`` or ``"sha256:…"``).

    Raises:
        PipelineError: It differs: the file is incomplete, damaged or another one.
    """
    algorithm, expected = digest.split(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm)
    if found.hexdigest() != expected:
        way_out = "delete it and download it again" if named is None else "try again later"
        raise PipelineError(
            f"{named or path} is incomplete, damaged or another file: its {algorithm} is {found.hexdigest()}, the "
            f"published one {expected}; {way_out}.",
            exit_code=1,
        )


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a tar (any compression) or zip archive into `folder`, which appears complete or not at all.

    Only plain files and folders whose place is inside `folder` are accepted: an absolute path, a ``..``, a link or a
    device in the archive stops it before anything is written.

    Args:
        archive: The archive.
        folder: Where its members go; one that exists is taken as unpacked already.

    Returns:
        `folder`.

    Raises:
        PipelineError: An unsafe member, a damaged or encrypted archive, or no room on the disk.
    """
    if folder.is_dir():
        return folder
    if not archive.is_file():
        raise PipelineError(f"There is no archive {archive}; check the path.")
    opener = _Zip if zipfile.is_zipfile(archive) else _Tar
    with files.atomic_write_in_cache(folder) as temporary:
        try:
            with opener(archive) as opened:
                members = list(opened.members())
                for name, _, problem in members:
                    if problem or not _inside(name):
                        raise PipelineError(
                            f"{archive} is refused: its member {name!r} {problem or 'lies outside the folder'}; get "
                            "the archive from its official address.",
                            exit_code=1,
                        )
                needed, free = sum(size for _, size, _ in members), shutil.disk_usage(folder.parent).free
                if needed > free:
                    raise PipelineError(
                        f"{archive} needs {needed / 1e6:.0f} MB unpacked and {folder.parent} has {free / 1e6:.0f} MB "
                        "free; free some space, or set PIPELINE_CACHE to a folder on another disk.",
                        exit_code=1,
                    )
                temporary.mkdir()
                opened.extract(temporary)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError, _Corrupt) as error:
            raise PipelineError(
                f"{archive} cannot be unpacked ({error}); delete it and download it again.", exit_code=1
            ) from None
    return folder


class _Corrupt(Exception):
    """Compressed data that does not decompress; kept apart from an error of the disk."""


def _inside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and name[1:2] != ":"


def _copy(name: str, source: IO[bytes], root: Path) -> None:
    target = root / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        while True:
            try:
                block = source.read(_BLOCK)
            except Exception as error:  # gzip, bz2, lzma and zlib each have their own
                raise _Corrupt(error) from None
            if not block:
                return
            file.write(block)


class _Tar:
    """A tar archive, walked through twice: for the names, then for the contents."""

    def __init__(self, path: Path):
        self.file = tarfile.open(path)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def members(self) -> Iterator[tuple[str, int, str | None]]:
        """Name, size in bytes and what is wrong with it, or None, of each member."""
        try:
            for member in self.file:
                yield member.name, member.size, None if member.isfile() or member.isdir() else "is a link or a device"
        except (OSError, EOFError) as error:  # gzip reports damage as an OSError
            raise _Corrupt(error) from None

    def extract(self, root: Path) -> None:
        for member in self.file.getmembers():
            if member.isdir():
                (root / member.name).mkdir(parents=True, exist_ok=True)
            else:
                _copy(member.name, self.file.extractfile(member), root)


class _Zip:
    """A zip archive with the same three verbs."""

    def __init__(self, path: Path):
        self.file = zipfile.ZipFile(path)

    def __enter__(self) -> _Zip:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def members(self) -> Iterator[tuple[str, int, str | None]]:
        for member in self.file.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            plain = kind in (0, stat.S_IFREG, stat.S_IFDIR)
            yield member.filename, member.file_size, None if plain else "is a link or a device"

    def extract(self, root: Path) -> None:
        for member in self.file.infolist():
            if member.is_dir():
                (root / member.filename).mkdir(parents=True, exist_ok=True)
            else:
                with self.file.open(member) as source:
                    _copy(member.filename, source, root)


def digest_of(paths: Iterable[Path], root: Path) -> str:
    """A digest that changes when a file is added, removed, renamed, written or made readable: of path, size and times.

    The contents are not read, so that a hundred thousand files take a second. A file that cannot be looked at, a
    link to nowhere for one, counts by its error; who reads it says so.
    """
    result = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            status = path.stat()
            facts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        except OSError as error:
            facts = (error.errno,)
        words = (path.relative_to(root).as_posix(), *map(str, facts))
        result.update(("\0".join(words) + "\n").encode(errors="surrogateescape"))
    return result.hexdigest()
