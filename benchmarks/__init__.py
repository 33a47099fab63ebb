"""One command for each benchmark; the results, with the machine and the versions, are in `benchmarks/results`."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """Environment variables for a command that runs in another folder and imports this project."""
    packages = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": packages}
