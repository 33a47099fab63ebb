"""Files and folders that appear whole or not at all, and the sentence for one that cannot be written.

with files.whole(path) as temporary: ...         # written there, then renamed to path
files.write_json(path, content)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import lzma
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError

# What reading a member of a zip archive raises where the archive is damaged, encrypted or packed in an unknown way.
DAMAGED_ZIP = (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


class DiskError(PipelineError):
    """Something could not be written; the exit code is 1."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=1)


def disk_error(path: Path, error: BaseException) -> DiskError:
    """The sentence for a write that failed."""
    if is_full(error):
        return DiskError(f"No room on the disk for {path}; free some space.")
    return DiskError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error}).")


def is_full(error: BaseException) -> bool:
    """Whether an error of the operating system's or of a library's own kind comes from a full disk."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # TensorFlow's writers have their own exceptions; only the text tells a full disk from a bug.
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


@contextlib.contextmanager
def atomic_write(
    path: Path, *, replaces_folder: bool = True, sentence: Callable[[Path, BaseException], PipelineError] = disk_error
) -> Iterator[Path]:
    """Give a temporary path beside `path` to write a file or a folder at, and rename it when the block is done.

    So `path` appears whole or not at all, and an older one stays until then: an exception, Ctrl-C or a full disk
    removes the temporary one, and what a killed process left behind is removed by the next that writes the same
    `path`. Of two processes at once each writes its own, and the last to finish stays.

    Args:
        path: The file or folder; the folder it is in is made where missing.
        replaces_folder: Whether a folder at `path` gives way to a new one; if not, the older one stays.
        sentence: Makes the error for a write that failed.

    Yields:
        A path that does not exist yet, with the suffix of `path`.

    Raises:
        PipelineError: No room on the disk, or no permission.
    """
    token = secrets.token_hex(4)
    temporary = path.with_name(f".tmp-{token}-{path.name}")
    lock = path.with_name(f".lock-{token}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in path.parent.glob(f".lock-????????-{glob.escape(path.name)}"):
            with contextlib.suppress(OSError), abandoned.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees a dead writer's lock
                _clear(abandoned.with_name(abandoned.name.replace(".lock-", ".tmp-", 1)), path)
                abandoned.unlink(missing_ok=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield temporary
            if temporary.is_file():
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())
            _rename(temporary, path, replaces_folder)
    except OSError as error:
        raise sentence(path, error) from None
    except PipelineError:
        raise
    except Exception as error:
        if is_full(error):
            raise sentence(path, error) from None
        raise
    finally:
        with contextlib.suppress(OSError):  # a read-only disk: nothing was made
            _clear(temporary, path)
            lock.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises `PipelineError` where there is no room or no permission."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, whole or not at all."""
    write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock for the instant of a rename or an update; other processes wait."""
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _rename(temporary: Path, path: Path, replaces_folder: bool) -> None:
    """Rename `temporary` to `path`; a folder cannot be renamed onto a full one, so the old one steps aside first."""
    if not temporary.is_dir():
        temporary.replace(path)
    elif not replaces_folder:
        try:
            temporary.replace(path)
        except OSError:
            if not path.is_dir():  # else another process has finished the same folder first
                raise
    else:
        with locked(path.parent):
            if path.exists():
                path.replace(_previous(temporary))
            temporary.replace(path)


def _previous(temporary: Path) -> Path:
    """Where the folder that `temporary` replaces waits until the new one is in its place."""
    return temporary.with_name(temporary.name.replace(".tmp-", ".old-", 1))


def _clear(temporary: Path, path: Path) -> None:
    """Remove what one writer has left beside `path`; an older folder goes back where no new one has come."""
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
    """`folder`, else ``$PIPELINE_CACHE``, else ``gpu-image-pipeline`` in the user's cache folder; made where missing.

    Raises:
        PipelineError: It cannot be made or written.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(folder or os.environ.get("PIPELINE_CACHE") or Path(home) / "gpu-image-pipeline").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cache_write_error(path, error) from None
    return path


def atomic_write_in_cache(path: Path) -> contextlib.AbstractContextManager[Path]:
    """`files.whole` for the cache folder: of two processes that make the same folder the first one's stays."""
    return atomic_write(path, replaces_folder=False, sentence=cache_write_error)


def cache_write_error(path: Path, error: OSError) -> DiskError:
    """The sentence for a cache or a download that cannot be written."""
    if is_full(error):
        way_out = "free some space, or set PIPELINE_CACHE to a folder on another disk"
        return DiskError(f"No room on the disk for {path}; {way_out}.")
    reason = error.strerror or error
    return DiskError(f"{path} cannot be written ({reason}); set PIPELINE_CACHE to a folder that can.")
