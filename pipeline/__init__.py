"""Image classification that never leaves the GPU, and runs on a laptop without one."""

import sys
from pathlib import Path
from types import TracebackType

__version__ = "0.1.0"

# `python -m pipeline.compare`, `.lab` and `.workers` are files of pipeline/commands.
__path__.append(str(Path(__file__).parent / "commands"))


def _interrupted(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.argv[:1] == ["-m"]:  # python -m looks for one of the commands, whose imports take a second
    sys.excepthook = _interrupted
