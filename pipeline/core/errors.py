"""`PipelineError`, the error that a user can act on, and short texts for error messages."""

import math

_BEFORE_THE_CAUSE = ("Graph execution error", "Detected at node", "<stack traces unavailable>", 'File "')


def first_line(problem: object) -> str:
    """The first line of an error or of a program's output, for a sentence about it; at most 200 characters.

    What TensorFlow says before the cause of an error in a graph is passed over.
    """
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    lines = lines or [type(problem).__name__ if isinstance(problem, Exception) else ""]
    telling = (line for line in lines if not line.startswith(_BEFORE_THE_CAUSE))
    return next(telling, lines[0])[:200].rstrip(".")


def is_number(value: object) -> bool:
    """Whether a setting is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether a setting is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


class PipelineError(Exception):
    """A problem the user can act on: its message is one sentence with the value received and the way out.

    A library function raises it; a command prints the sentence and exits with ``exit_code``.

    Args:
        message: The sentence.
        exit_code: 2 for wrong use or a missing part, 1 when part of the work failed.
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code
