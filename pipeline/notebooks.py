"""Run the chapters in `notebooks/` with papermill, and bind them into one HTML report.

    chapters = notebooks.discover()
    with notebooks.private_kernels():
        for chapter in chapters:
            notebooks.execute(chapter, folder / chapter.name, parameters)
    notebooks.write_report([folder / chapter.name for chapter in chapters], "report", Path("report.html"))

Every kernel is the interpreter that runs this, whatever kernels the user has installed.
"""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import PipelineError, files, first_line

NOTEBOOKS = Path("notebooks")
KERNEL = "python3"


@dataclass(frozen=True)
class Chapter:
    """One notebook.

    Attributes:
        path: The notebook as it is committed, without outputs.
        defaults: Its parameters' names and default values, from the cell tagged ``parameters``; a default that is no
            literal (a call, say) is None.
    """

    path: Path
    defaults: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.stem


def discover(folder: Path = NOTEBOOKS) -> list[Chapter]:
    """The notebooks named ``[0-9]*_*.ipynb`` in `folder`, in the order of their names.

    Raises:
        PipelineError: There are none, or one cannot be read.
    """
    paths = sorted(folder.glob("[0-9]*_*.ipynb"))
    if not paths:
        raise PipelineError(f"There are no notebooks in {folder.absolute()}; run this in the repository's own folder.")
    return [Chapter(path, _defaults(path)) for path in paths]


def _defaults(path: Path) -> dict[str, Any]:
    import papermill

    _quiet_papermill()
    try:
        inspected = papermill.inspect_notebook(path)
    except Exception as error:  # nbformat, json and papermill each have their own for "this is no notebook"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise PipelineError(f"{path} is no readable notebook ({reason}).") from None
    defaults = {}
    for name, parameter in inspected.items():
        try:
            defaults[name] = ast.literal_eval(parameter["default"])
        except (ValueError, SyntaxError):
            defaults[name] = None
    return defaults


def _quiet_papermill() -> None:
    logging.getLogger("papermill").setLevel(logging.ERROR)


def select(chapters: Sequence[Chapter], wanted: Sequence[str]) -> list[Chapter]:
    """The chapters that `wanted` names (``03_train``, ``03`` or a file name), in the order of the book.

    Raises:
        PipelineError: A name fits none or several; the sentence lists the known ones.
    """
    chosen = set()
    for name in wanted:
        stem = Path(name).name.removesuffix(".ipynb")
        fitting = [c.name for c in chapters if c.name == stem] or [c.name for c in chapters if c.name.startswith(stem)]
        if not stem or len(fitting) != 1:
            known = ", ".join(c.name for c in chapters)
            raise PipelineError(f"{name!r} is not the name of one notebook; there are: {known}.")
        chosen.add(fitting[0])
    return [c for c in chapters if c.name in chosen]


def convert(name: str, text: str, default: Any) -> Any:
    """Read a parameter from the command line as the type of its `default` (None: whatever the text looks like).

    Raises:
        PipelineError: The text is not of that type.
    """
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)
    if isinstance(default, bool) and value in (0, 1):
        value = bool(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if default is not None and value is not None and type(value) is not type(default):
        raise PipelineError(
            f"The parameter {name} is of type {type(default).__name__}, not {text!r}; for example: -p {name} {default}"
        )
    return value


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


# --- the report ----------------------------------------------------------------------------------------------------


def write_report(executed: Sequence[Path], title: str, path: Path) -> None:
    """Bind executed notebooks into one HTML file that needs no other file and no network.

    Args:
        executed: The executed copies, in the order of the chapters.
        title: The document's title and first heading.
        path: The HTML file; it appears whole or not at all.

    Raises:
        PipelineError: The file cannot be written, or nbconvert's templates are missing.
    """
    import nbformat
    from nbconvert import HTMLExporter

    book = nbformat.v4.new_notebook()
    contents = []
    for file in executed:
        notebook = nbformat.read(file, as_version=4)
        book.metadata = notebook.metadata
        anchor = file.stem
        contents.append(f"1. [{_title(notebook) or anchor}](#{anchor})")
        book.cells.append(nbformat.v4.new_markdown_cell(f'<a id="{anchor}"></a>'))
        book.cells.extend(notebook.cells)
    book.cells.insert(0, nbformat.v4.new_markdown_cell("\n".join([f"# {title}", "", *contents])))
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"  # two chapters may have given the same

    try:
        exporter = HTMLExporter(template_name="lab", embed_images=True, exclude_anchor_links=True)
    except ValueError as error:  # its templates are data files beside the package, which not every installation brings
        raise PipelineError(
            f"nbconvert has no template for the report ({first_line(error)}); install it again, or set "
            f"JUPYTER_PATH. The executed notebooks are in {executed[0].parent}."
        ) from None
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    page, _ = exporter.from_notebook_node(book, resources={"metadata": {"name": title, "path": str(path.parent)}})
    # A report opened on a machine without network must look the same: nothing is taken from elsewhere.
    files.write(path, _without_network(page).encode())


def _without_network(page: str) -> str:
    """Drop the scripts that nbconvert's template fetches: MathJax, Mermaid, RequireJS, widgets."""
    page = re.sub(r'<script[^>]*\ssrc="https?://[^"]*"[^>]*>\s*</script>', "", page)
    module = r'<script type="module">(?:(?!</script>).)*\bimport\("https?://(?:(?!</script>).)*</script>'
    return re.sub(module, "", page, flags=re.DOTALL)


def _title(notebook: Any) -> str | None:
    """The first heading of a notebook, without characters that would end a Markdown link."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = re.search(r"^#+\s+(.+)$", cell.source, flags=re.MULTILINE)
            if heading:
                return re.sub(r"[\[\]]", "", heading[1]).strip()
    return None
