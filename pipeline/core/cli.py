"""What every command shares: a `PipelineError` becomes one sentence on standard error and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.core import device
from pipeline.core.errors import PipelineError

PIPED_WIDTH = 400  # columns: a program that reads a table wants each row in one line


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and leave the process: its return value (None is 0), a `PipelineError`'s code, or 130 for Ctrl-C.

    A polite kill (SIGTERM) ends it like Ctrl-C. What the disk refuses and no part has a sentence of its own for is one
    sentence all the same, and so is a lack of memory.
    """
    signal.signal(signal.SIGTERM, terminated)
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold bytes that are no text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with device.out_of_memory_sentence("take less at once, or close other programs"):
            code = main() or 0
            sys.stdout.flush()
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt as stop:
        print(f"\nstopped by {stopped_by(stop)}", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone: nothing is left to say
        sys.stderr.close()
        code = 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {place}{error.strerror or error}.", file=sys.stderr)
        code = 1
        with contextlib.suppress(OSError):
            sys.stdout.close()  # what a full device still has to take would be refused once more
    sys.exit(code)


def terminated(*_: Any) -> None:
    """What a polite kill does: it ends like Ctrl-C."""
    raise KeyboardInterrupt("a signal (SIGTERM)")


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Give back a KeyboardInterrupt that a C++ library has made an error of its own.

    A signal that comes while TensorFlow waits is heard by the next line of Python; where that line belongs to the
    exception that TensorFlow is just making, pybind11 makes a RuntimeError of both.
    """
    try:
        yield
    except RuntimeError as error:
        heard = re.search(r"\bKeyboardInterrupt: (.+)", str(error))
        if heard is None:
            raise
        said = [] if heard[1] == "<EMPTY MESSAGE>" else [heard[1]]  # pybind11's words
        raise KeyboardInterrupt(*said) from None


def stopped_by(stop: KeyboardInterrupt) -> str:
    """What pressed Ctrl-C: the user, or the signal of `terminated`."""
    return stop.args[0] if stop.args else "Ctrl-C"


def call(command: Sequence[str], **options: Any) -> int:
    """Run a command and return its exit code; what stops this process stops the command first, politely.

    Args:
        options: As for `subprocess.Popen`.
    """
    with subprocess.Popen(command, **options) as process:
        try:
            return process.wait()
        except KeyboardInterrupt as asked:
            if asked.args:  # a terminal's Ctrl-C it has heard itself
                process.terminate()
            process.wait()
            raise


def console() -> Any:
    """A rich console on standard output that folds long cells on a terminal only."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)


def positive(text: str) -> int:
    """The type of an argument that is a whole number from 1 on."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
