"""`PipelineError`, the error that a user can act on, and `first_line`, a short text for error messages."""

_BEFORE_THE_CAUSE = ("Graph execution error", "Detected at node", "<stack traces unavailable>", 'File "')


def first_line(problem: object) -> str:
    """The first line of an error or of a program's output, at most 200 characters, for an error message.

    The lines that TensorFlow prints before the cause of an error in a graph are skipped.
    """
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    lines = lines or [type(problem).__name__ if isinstance(problem, Exception) else ""]
    causes = (line for line in lines if not line.startswith(_BEFORE_THE_CAUSE))
    return next(causes, lines[0])[:200].rstrip(".")


class PipelineError(Exception):
    """A problem that the user can solve; commands print its message and exit with its code.

    Args:
        message: One sentence with the value received and the fix.
        exit_code: 2 for wrong use or a missing package, 1 if part of the work failed, 130 after Ctrl-C or SIGTERM.
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code
