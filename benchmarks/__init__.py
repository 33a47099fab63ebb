"""One command a question; the answers are kept in `benchmarks/results`, with the machine and the versions."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.core.errors import PipelineError

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """The variables of a command that runs in another folder and still finds this project."""
    packages = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": packages}


def check_names(kind: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise `PipelineError` where one of `names` is not known; the sentence lists those that are."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise PipelineError(f"There is no {kind} {', '.join(unknown)}; known ones: {', '.join(known)}.")
