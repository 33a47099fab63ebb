"""What every command shares: a `PipelineError` becomes one sentence on standard error and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pipeline import PipelineError

PIPED_WIDTH = 400  # columns: a program that reads a table wants each row in one line


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and leave the process: its return value (None is 0), a `PipelineError`'s code, or 130 for Ctrl-C."""
    try:
        code = main() or 0
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone: nothing is left to say
        sys.stderr.close()
        code = 0
    sys.exit(code)


def console() -> Any:
    """A rich console on standard output that folds long cells on a terminal only."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
