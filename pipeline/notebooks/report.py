"""One HTML report of executed notebooks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core import files


def write_report(executed: Sequence[Path], title: str, path: Path) -> None:
    """Write executed notebooks as one HTML file that needs no other file and no network.

    Args:
        executed: The executed notebooks, in order.
        title: The document's title and first heading.
        path: The HTML file; it is written atomically.

    Raises:
        DiskError: The file cannot be written.
    """
    import nbformat
    from nbconvert import HTMLExporter

    book = nbformat.v4.new_notebook()
    contents = []
    for file in executed:
        notebook = nbformat.read(file, as_version=4)
        book.metadata = notebook.metadata
        contents.append(f"- [{_heading(notebook) or file.stem}](#{file.stem})")
        book.cells += [nbformat.v4.new_markdown_cell(f'<a id="{file.stem}"></a>'), *notebook.cells]
    book.cells.insert(0, nbformat.v4.new_markdown_cell("\n".join([f"# {title}", "", *contents])))
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"  # ids of different notebooks may be equal
    exporter = HTMLExporter(template_name="lab", embed_images=True, exclude_anchor_links=True)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    page, _ = exporter.from_notebook_node(book, resources={"metadata": {"name": title, "path": str(path.parent)}})
    files.write_bytes(path, _without_network(page).encode())


def _without_network(page: str) -> str:
    """Remove the scripts that nbconvert's template downloads: MathJax, Mermaid, RequireJS, widgets."""
    page = re.sub(r'<script[^>]*\ssrc="https?://[^"]*"[^>]*>\s*</script>', "", page)
    module = r'<script type="module">(?:(?!</script>).)*\bimport\("https?://(?:(?!</script>).)*</script>'
    return re.sub(module, "", page, flags=re.DOTALL)


def _heading(notebook: Any) -> str | None:
    """The first heading of a notebook, without the characters that would end a Markdown link."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = re.search(r"^#+\s+(.+)$", text, flags=re.MULTILINE)
    return re.sub(r"[\[\]]", "", heading[1]).strip() if heading else None
