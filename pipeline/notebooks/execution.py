"""Runs one notebook with papermill in a kernel of this interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.core import files
from pipeline.core.errors import PipelineError
from pipeline.notebooks.chapters import Chapter, _quiet_papermill

KERNEL = "python3"


@contextlib.contextmanager
def private_kernels() -> Iterator[None]:
    """Make the kernel ``python3`` this very interpreter, for every kernel started inside the block.

    A kernel of that name that the user installed for another Python comes first in Jupyter's search otherwise. The
    kernel's own files (history, connection) go to a temporary folder, so a home that cannot be written does no harm.
    """
    from ipykernel.kernelspec import get_kernel_dict

    with tempfile.TemporaryDirectory(prefix="pipeline-jupyter-", ignore_cleanup_errors=True) as temporary:
        content = get_kernel_dict()
        content["argv"][0] = sys.executable
        # The kernel's own messages end in this terminal; what a cell prints or raises goes to the notebook in any case.
        content["argv"].append("--IPKernelApp.log_level=CRITICAL")
        specification = Path(temporary, "kernels", KERNEL, "kernel.json")
        specification.parent.mkdir(parents=True)
        specification.write_text(json.dumps(content), encoding="utf-8")
        jupyter_path = os.pathsep.join(filter(None, [temporary, os.environ.get("JUPYTER_PATH")]))
        with _environment(
            JUPYTER_PATH=jupyter_path,
            JUPYTER_RUNTIME_DIR=str(Path(temporary, "runtime")),
            IPYTHONDIR=str(Path(temporary, "ipython")),
            # tqdm asks for the widgets package, whose bars no report could show.
            PYTHONWARNINGS=",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:IProgress not found"])),
            PYDEVD_DISABLE_FILE_VALIDATION="1",  # the debugger's remark about frozen modules, once for every kernel
        ):
            yield


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def execute(chapter: Chapter, output: Path, parameters: Mapping[str, Any], *, progress: dict[str, Any] | None = None):
    """Run one notebook in the current folder; the executed copy is written after every cell.

    Args:
        chapter: The notebook.
        output: Where the executed copy goes; it stays when a cell fails.
        parameters: Values for the notebook's parameters; all must be declared there.
        progress: tqdm's arguments for a bar that counts cells; None shows none.

    Raises:
        PipelineError: A cell failed, the kernel died, or the copy could not be written (exit code 1). The sentence
            names the notebook, the cell as the executed copy numbers it, and the error.
    """
    import nbclient.exceptions
    import papermill
    import papermill.exceptions

    _quiet_papermill()
    file = chapter.path.name
    kept = f"The executed copy is {output}."
    try:
        papermill.execute_notebook(
            chapter.path,
            output,
            parameters=dict(parameters),
            kernel_name=KERNEL,
            progress_bar=progress or False,
            cwd=Path.cwd(),
        )
    except papermill.exceptions.PapermillExecutionError as error:
        # TensorFlow's messages go on for pages; the copy has them.
        message = f"{error.ename}: {error.evalue.strip()}".splitlines()[0][:400].rstrip(": .")
        raise PipelineError(
            f"{file} failed in cell In [{error.exec_count}], `{_failing_line(error)}`: {message}. {kept}",
            exit_code=1,
        ) from None
    except nbclient.exceptions.DeadKernelError:
        raise PipelineError(
            f"{file}: the kernel was killed in {_running_cell(output)}, most often because memory ran out; close other "
            f"programs or take a smaller batch_size or data set. {kept}",
            exit_code=1,
        ) from None
    except RuntimeError as error:  # jupyter_client: the kernel ended before it answered
        raise PipelineError(
            f"{file}: the kernel did not start ({error}); see what this prints: {sys.executable} -m ipykernel_launcher "
            f"--version",
            exit_code=1,
        ) from None
    except OSError as error:
        raise files.disk_error(output, error) from None


def _failing_line(error: Any) -> str:
    """The line of the cell at which papermill's error was raised, or the cell's first where the traceback is odd."""
    said = re.search(r"Cell In ?\[\d+\], line (\d+)", re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback)))
    lines = error.source.lstrip("\n").splitlines()  # as IPython counts them
    if said and 0 < int(said[1]) <= len(lines) and (line := lines[int(said[1]) - 1].strip()):
        return line
    return _first_line(error.source)


def _first_line(source: str) -> str:
    """The first line of a cell that is code."""
    lines = [line for line in source.splitlines() if line.strip()]
    return next((line for line in lines if not line.lstrip().startswith("#")), lines[0] if lines else "").strip()


def _running_cell(output: Path) -> str:
    """The last cell that had begun, as the executed copy on the disk has it."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        cells = [
            cell for cell in json.loads(output.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
        ]
        begun = [(n, cell) for n, cell in enumerate(cells, 1) if cell["metadata"]["papermill"]["start_time"]]
        number, cell = begun[-1]
        return f"cell In [{number}], `{_first_line(''.join(cell['source']))}`"
    return "a cell that is not known"
