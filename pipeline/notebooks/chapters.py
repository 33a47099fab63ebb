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
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError

NOTEBOOKS = Path("notebooks")


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
