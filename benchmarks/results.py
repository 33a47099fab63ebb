"""Result files of the benchmarks: one JSON file for each benchmark and device type (GPU or CPU)."""

from __future__ import annotations

import datetime
import shlex
import sys
from pathlib import Path
from typing import Any

from pipeline.core import device, files

FOLDER = Path(__file__).resolve().parent / "results"


def save(name: str, figures: Any, command: str | None = None) -> Path:
    """Write figures to ``benchmarks/results/NAME-gpu.json`` (or ``-cpu``); an existing file is replaced.

    A benchmark with options other than ``--data-dir`` writes to ``NAME-gpu-options.json``, which git ignores, so that
    it does not replace a figure of the README.

    Args:
        name: The benchmark, for example "augment".
        figures: Any JSON value.
        command: The command that was measured; by default, the running command.

    Returns:
        The path of the file.
    """
    machine = device.describe()
    options = {word.split("=")[0] for word in sys.argv[1:] if word.startswith("-")} - {"--data-dir"}
    path = FOLDER / f"{name}-{machine['device']}{'-options' if options else ''}.json"
    content = {
        "command": command or running(f"benchmarks.{name}"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "figures": figures,
    }
    FOLDER.mkdir(exist_ok=True)
    files.write_json(path, content)
    return path


def running(module: str) -> str:
    """Return the running command of a module such as "benchmarks.train", with ``DATA`` as the path to the data."""
    words = ["--data-dir=DATA" if word.startswith("--data-dir=") else word for word in sys.argv[1:]]
    if "--data-dir" in words:
        words[words.index("--data-dir") + 1] = "DATA"
    return shlex.join(["python", "-m", module, *words])
