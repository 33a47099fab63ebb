"""Download a file and verify its published digest.

download(address, path, "md5:…")    # verifies the file if it exists already
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pipeline.core import files
from pipeline.core.errors import PipelineError, first_line

_TIMEOUT = 30  # seconds without an answer
_ATTEMPTS = 3


def download(address: str, path: Path, digest: str, *, progress: bool = True) -> Path:
    """Download a file unless it exists, and verify its digest. The file is written atomically.

    Args:
        address: URL.
        path: Where to save it; missing folders are created.
        digest: The published digest, as ``"md5:…"`` or ``"sha256:…"``.
        progress: Show a progress bar on a terminal.

    Returns:
        `path`.

    Raises:
        PipelineError: The connection or the server failed, the digest differs, or the disk is full.
    """
    if path.exists():
        check_digest(path, digest)
        return path
    import requests  # slow imports that only a download needs
    from pooch import HTTPDownloader
    from tqdm import tqdm

    show = progress and sys.stderr.isatty()
    with files.atomic_write(path, cache=True) as temporary:
        for attempt in range(1, _ATTEMPTS + 1):
            bar = tqdm(total=1, desc=path.name, unit="B", unit_scale=True) if show else False  # pooch sets the total
            try:
                HTTPDownloader(progressbar=bar, timeout=_TIMEOUT)(address, str(temporary), None)
                break
            except requests.RequestException as error:
                if attempt == _ATTEMPTS:
                    raise PipelineError(
                        f"{address} could not be downloaded ({first_line(error)}); try again, or download it "
                        f"elsewhere and save it as {path}, or set data_dir to the folder that contains it.",
                        exit_code=1,
                    ) from error
                time.sleep(attempt)
        check_digest(temporary, digest, name=address)
    return path


def check_digest(path: Path, digest: str, *, name: str | None = None) -> None:
    """Compare a file with its published digest (``"md5:…"`` or ``"sha256:…"``).

    Args:
        path: The file.
        digest: The published digest.
        name: Name of the file in the error message; default: its path.

    Raises:
        PipelineError: The digest differs: the file is incomplete, damaged or another file.
    """
    import pooch

    algorithm, expected = digest.split(":")
    found = pooch.file_hash(str(path), alg=algorithm)
    if found != expected:
        fix = "try again later" if name else "delete it and load again"
        raise PipelineError(
            f"{name or path} is incomplete, damaged or another file (expected {algorithm} {expected}, got {found}); "
            f"{fix}.",
            exit_code=1,
        )
