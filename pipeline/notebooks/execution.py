"""Run one notebook with papermill, in a kernel of this interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from pipeline.core.errors import PipelineError, first_line
from pipeline.notebooks.chapters import Chapter

KERNEL = "python3"


@contextlib.contextmanager
def private_kernels() -> Iterator[None]:
    """Use this interpreter as the Jupyter kernel ``python3``, and the current folder as its working folder.

    By default, Jupyter prefers a kernel of that name that the user installed for another Python. The kernel's files
    (history, connection) are written to a temporary folder, so that the home folder may be read-only.
    """
    from ipykernel.kernelspec import write_kernel_spec

    with tempfile.TemporaryDirectory(prefix="pipeline-jupyter-", ignore_cleanup_errors=True) as temporary:
        # The terminal does not show the kernel's own messages; the output and errors of cells are in the notebook.
        write_kernel_spec(Path(temporary, "kernels", KERNEL), extra_arguments=["--IPKernelApp.log_level=CRITICAL"])
        variables = {
            "JUPYTER_PATH": os.pathsep.join(filter(None, [temporary, os.environ.get("JUPYTER_PATH")])),
            "JUPYTER_RUNTIME_DIR": str(Path(temporary, "runtime")),
            "IPYTHONDIR": str(Path(temporary, "ipython")),
            "PIPELINE_FOLDER": str(Path.cwd()),  # the first cell of each notebook changes into it
            # Hides tqdm's advice to install ipywidgets: the report cannot show its bars.
            "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:IProgress not found"])),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # hides the debugger's message about frozen modules
        }
        with mock.patch.dict(os.environ, variables):
            yield


def execute(chapter: Chapter, output: Path, parameters: Mapping[str, Any]) -> None:
    """Run one notebook in the current folder; the executed copy is written after every cell.

    Args:
        chapter: The notebook.
        output: Path of the executed copy; the copy remains if a cell fails.
        parameters: Values for the notebook's parameters; all must be declared there.

    Raises:
        PipelineError: A cell failed or the kernel died (exit code 1). The message contains the notebook, the cell as
            numbered in the executed copy, the line and the error.
    """
    import nbclient.exceptions
    import papermill
    import papermill.exceptions

    try:
        papermill.execute_notebook(
            chapter.path,
            output,
            parameters=dict(parameters),
            kernel_name=KERNEL,
            progress_bar={"desc": chapter.name, "position": 1, "leave": False, "disable": None},
            cwd=Path.cwd(),
        )
    except papermill.exceptions.PapermillExecutionError as error:
        problem = f"failed in cell In [{error.exec_count}], `{_failing_line(error)}`: {error.ename}"
        message = f"{chapter.path.name} {problem}: {first_line(error.evalue)}. The executed copy is {output}."
        raise PipelineError(message, exit_code=1) from error
    except nbclient.exceptions.DeadKernelError as error:
        raise PipelineError(
            f"{chapter.path.name}: the kernel was killed in {_running_cell(output)}, probably for lack of memory; "
            f"close other programs, or use a smaller batch_size or dataset. The executed copy is {output}.",
            exit_code=1,
        ) from error


def _failing_line(error: Any) -> str:
    """The line of the cell at which papermill's error was raised."""
    traceback = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))
    found = re.search(r"Cell In ?\[\d+\], line (\d+)", traceback)
    lines = error.source.lstrip("\n").splitlines()  # as IPython counts them
    return lines[int(found[1]) - 1 if found else 0].strip()


def _running_cell(output: Path) -> str:
    """The last cell that was started, according to the executed copy."""
    cells = [cell for cell in json.loads(output.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    number = max((n for n, cell in enumerate(cells, 1) if cell["metadata"]["papermill"]["start_time"]), default=1)
    return f"cell In [{number}], `{''.join(cells[number - 1]['source']).splitlines()[0]}`"
