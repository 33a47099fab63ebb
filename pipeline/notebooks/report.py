"""Binds executed notebooks into one HTML report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core import files
from pipeline.core.errors import PipelineError, first_line

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
    files.write_bytes(path, _without_network(page).encode())


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
