"""The notebooks in `notebooks/`, called chapters: find, select, and convert their parameters.

for chapter in discover():
    print(chapter.name, chapter.defaults)
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError, first_line

FOLDER = Path("notebooks")
CHECKOUT = Path(__file__).resolve().parents[2]  # the folder that contains the package
PATTERN = "[0-9]*_*.ipynb"


@dataclass(frozen=True)
class Chapter:
    """One notebook.

    Attributes:
        path: The committed notebook, without outputs.
        defaults: Names and default values of its parameters, from the cell tagged ``parameters``; a default that is
            not a literal (a call, for example) is None.
    """

    path: Path
    defaults: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.stem

    def convert(self, given: Mapping[str, str]) -> dict[str, Any]:
        """Convert the parameters that this notebook declares; the others are ignored.

        Raises:
            PipelineError: A value has another type than the default.
        """
        return {name: convert(name, text, self.defaults[name]) for name, text in given.items() if name in self.defaults}


def discover() -> list[Chapter]:
    """Find the notebooks in `notebooks/` of the current folder, or else of the checkout, sorted by name.

    Raises:
        PipelineError: There are no notebooks, or one cannot be read.
    """
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    folders = [FOLDER, CHECKOUT / FOLDER]
    paths = next((found for folder in folders if (found := sorted(folder.glob(PATTERN)))), [])
    if not paths:
        raise PipelineError(f"There are no notebooks in {folders[0].absolute()} or {folders[1]}; clone the repository.")
    chapters = []
    for path in paths:
        try:
            parameters = papermill.inspect_notebook(path)
        except Exception as error:  # nbformat, json and papermill raise many types
            raise PipelineError(f"The notebook {path} cannot be read ({first_line(error)}).") from error
        chapters.append(Chapter(path, {name: _literal(value["default"]) for name, value in parameters.items()}))
    return chapters


def select(chapters: Sequence[Chapter], wanted: Sequence[str]) -> list[Chapter]:
    """Select the chapters named by `wanted` (``03_train``, ``03`` or a file name), in the order of `chapters`.

    Raises:
        PipelineError: A name matches no notebook or several.
    """
    chosen = []
    for name in wanted:
        fitting = [c for c in chapters if c.name.startswith(Path(name).stem)]
        if len(fitting) != 1:
            known = ", ".join(c.name for c in chapters)
            raise PipelineError(f"Expected the name of one notebook, got {name!r}; known notebooks: {known}.")
        chosen += fitting
    return [c for c in chapters if c in chosen]


def convert(name: str, text: str, default: Any) -> Any:
    """Convert a command-line parameter to the type of its default; a default of None accepts any type.

    Raises:
        PipelineError: The text is not of that type.
    """
    if isinstance(default, str):
        return text
    value = _literal(text, {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text))
    if isinstance(default, bool) and value in (0, 1):
        value = bool(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and value is not None and type(value) is not type(default):
        kind = type(default).__name__
        raise PipelineError(f"Expected a value of type {kind} for -p {name}, got {text!r}; for example: {default}")
    return value


def _literal(text: str, otherwise: Any = None) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return otherwise
