"""What every command shares: a `PipelineError` becomes one sentence on standard error and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pipeline import PipelineError


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
