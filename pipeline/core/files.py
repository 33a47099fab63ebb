"""Write files and folders atomically, lock files between processes, and find the cache folder.

with files.atomic_write(path) as temporary: ...         # write at `temporary`; it is renamed to `path` at the end
files.write_json(path, content)
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import lzma
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError

# Errors of reading a member of a zip archive that is damaged, encrypted or compressed with an unknown method.
DAMAGED_ZIP = (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


class DiskError(PipelineError):
    """A file or folder could not be written; the exit code is 1."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=1)


def disk_error(path: Path, error: BaseException, *, cache: bool = False) -> DiskError:
    """Return the error to raise after a failed write to `path`.

    Args:
        cache: Whether `path` is in the cache folder; the message then names PIPELINE_CACHE.
    """
    if is_full(error):
        fix = "free some space" + (", or set PIPELINE_CACHE to a folder on another disk" if cache else "")
        return DiskError(f"No space left on the disk for {path}; {fix}.")
    fix = "; set PIPELINE_CACHE to a writable folder" if cache else ""
    return DiskError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error}){fix}.")


def is_full(error: BaseException) -> bool:
    """Whether an error of the operating system or of a library is caused by a full disk."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # TensorFlow's writers raise their own exceptions; only their text tells that the disk is full.
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


@contextlib.contextmanager
def atomic_write(path: Path, *, cache: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path` for a file or a folder, and rename it to `path` at the end of the block.

    `path` is always complete or absent, and an existing one stays until the new one is complete. The temporary path is
    removed after an exception or Ctrl-C; if the process was killed, the next write to `path` removes it. Two processes
    can write the same `path` at once: the last to finish replaces the other's result.

    Args:
        path: The file or folder; parent folders are created.
        cache: Whether `path` is in the cache folder. An existing folder is then not replaced, because another process
            may be reading it.

    Yields:
        A path that does not exist yet, with the suffix of `path`.

    Raises:
        DiskError: The disk is full, or `path` is not writable.
    """
    import filelock  # 0.1 s, because it imports asyncio

    token = secrets.token_hex(4)
    temporary, lock = (path.with_name(f".{kind}-{token}-{path.name}") for kind in ("tmp", "lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in path.parent.glob(f".lock-????????-{glob.escape(path.name)}"):
            with contextlib.suppress(OSError), filelock.FileLock(abandoned, blocking=False):
                _clear(abandoned.with_name(abandoned.name.replace(".lock-", ".tmp-", 1)), path)
                abandoned.unlink(missing_ok=True)
        with filelock.FileLock(lock):
            yield temporary
            if temporary.is_file():
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())
            _rename(temporary, path, cache)
    except (PipelineError, ConnectionError):
        raise
    except Exception as error:  # TensorFlow's and HDF5's writers have their own errors for a full disk
        if isinstance(error, OSError) or is_full(error):
            raise disk_error(path, error, cache=cache) from error
        raise
    finally:
        with contextlib.suppress(OSError):  # on a read-only disk there is nothing to remove
            _clear(temporary, path)
            lock.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; raises `DiskError` if that fails."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON atomically; raises `DiskError` if that fails."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def locked(folder: Path, busy: str | None = None) -> Iterator[None]:
    """Lock `folder` against other processes inside the block; the kernel releases the lock of a process that dies.

    Args:
        folder: Created if it does not exist; the lock is the file ``.lock`` in it.
        busy: The error message if another process has the lock; None waits for that process.

    Raises:
        PipelineError: Another process has the lock, and `busy` is given.
    """
    import filelock

    lock = filelock.FileLock(folder / ".lock", blocking=busy is None)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise PipelineError(busy or str(error)) from error
    try:
        yield
    finally:
        lock.release()


def _rename(temporary: Path, path: Path, cache: bool) -> None:
    """Rename `temporary` to `path`; an old folder is renamed first, because a rename cannot replace it."""
    if not temporary.is_dir():
        temporary.replace(path)
        return
    with locked(path.parent):
        if path.is_dir() and cache:
            return
        if path.exists():
            path.replace(_previous(temporary))
        temporary.replace(path)


def _previous(temporary: Path) -> Path:
    """The name of the old folder while `temporary` replaces it."""
    return temporary.with_name(temporary.name.replace(".tmp-", ".old-", 1))


def _clear(temporary: Path, path: Path) -> None:
    """Remove a writer's temporary files next to `path`, and restore the old folder if no new one has replaced it."""
    _remove(temporary)
    if _previous(temporary).exists():
        with locked(path.parent):
            if not path.exists():
                _previous(temporary).replace(path)
        _remove(_previous(temporary))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Create and return the cache folder: `folder`, ``$PIPELINE_CACHE`` or ``gpu-image-pipeline`` in the user's cache.

    Raises:
        DiskError: The folder cannot be created.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(folder or os.environ.get("PIPELINE_CACHE") or Path(home) / "gpu-image-pipeline").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error, cache=True) from error
    return path
