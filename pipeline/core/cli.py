"""Functions that all commands share; `run` turns an error into one line on standard error and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.core import device
from pipeline.core.errors import PipelineError


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its return value (0 for None), or report its error.

    A `PipelineError` or OSError is printed as one line; ``PIPELINE_TRACEBACK=1`` adds the traceback with all causes.
    The exit code is that of the `PipelineError`, 1 for an OSError, and 130 for Ctrl-C and SIGTERM. If the program that
    reads standard output has ended (as ``head`` does), the exit code is 0 and nothing is printed.
    """
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):  # file names may contain bytes that are not text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with device.explain_out_of_memory("use smaller data, or close other programs"):
            code = main() or 0
            sys.stdout.flush()
    except PipelineError as error:
        code = _report(error, f"error: {error}", error.exit_code)
    except KeyboardInterrupt as stop:
        code = _report(stop, f"\nstopped by {stopped_by(stop)}", 130)
    except OSError as error:
        quiet = isinstance(error, BrokenPipeError) and _reader_has_ended()
        code = 0 if quiet else _report(error, f"error: {error} (PIPELINE_TRACEBACK=1 shows where)", 1)
        _discard_unwritten()
    except SystemExit:  # from argparse, after --help
        _discard_unwritten()
        raise
    sys.exit(code)


def _report(error: BaseException, message: str, code: int) -> int:
    if os.environ.get("PIPELINE_TRACEBACK") == "1":
        traceback.print_exception(error)
    print(message, file=sys.stderr)
    return code


def _reader_has_ended() -> bool:
    """Whether standard output is a pipe whose reader has ended."""
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError):  # a test or a notebook has replaced standard output
        poll.register(sys.stdout, 0)  # 0: only errors, such as a closed pipe
    return bool(poll.poll(0))


def _discard_unwritten() -> None:
    """Close standard output if it cannot be written, so that Python does not report the same error again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            sys.stdout.close()


def _terminated(*_: Any) -> None:
    """The handler of SIGTERM: end like Ctrl-C."""
    raise KeyboardInterrupt("SIGTERM")


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Raise a KeyboardInterrupt that TensorFlow has turned into a RuntimeError.

    If the signal arrives while pybind11 builds an exception, pybind11 converts both into one RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if "KeyboardInterrupt: " not in str(error):
            raise
        raise KeyboardInterrupt(*(["SIGTERM"] if "KeyboardInterrupt: SIGTERM" in str(error) else [])) from error


def stopped_by(stop: KeyboardInterrupt) -> str:
    """The cause of a KeyboardInterrupt: "Ctrl-C" or "SIGTERM"."""
    return stop.args[0] if stop.args else "Ctrl-C"


def call(command: Sequence[str], **options: Any) -> int:
    """Run a command and return its exit code; if this process is stopped, stop the command first.

    Args:
        command: The program and its arguments.
        options: As for `subprocess.Popen`.
    """
    with subprocess.Popen(command, **options) as process:
        try:
            return process.wait()
        except KeyboardInterrupt as stop:
            if stop.args:  # SIGTERM; on Ctrl-C, the terminal has signalled the command, too
                process.terminate()
            process.wait()
            raise


def positive(text: str) -> int:
    """Parse an integer of at least 1 (an argparse type)."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)
