"""Where a benchmark's figures are kept: one JSON file a question and kind of machine, with how it was measured."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.core import device, files

FOLDER = Path(__file__).resolve().parent / "results"


NEUTRAL = {"--data-dir", "--workers", "--keep"}  # options that do not change what is measured


def save(name: str, figures: Any, command: str | None = None) -> Path:
    """Write figures to ``benchmarks/results/NAME-gpu.json``, or ``-cpu``; an older file of that name is replaced.

    What was measured with options of one's own goes to ``NAME-gpu-options.json``, which git ignores, so that a quick
    look replaces no figure that the README stands on.

    Args:
        name: The question, for example "augment".
        figures: Anything JSON can hold.
        command: What was run; the running command by default.

    Returns:
        The file.
    """
    machine = device.describe()
    options = {word.split("=")[0] for word in sys.argv[1:] if word.startswith("-")} - NEUTRAL
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


def running(module: str, without: Collection[str] = ()) -> str:
    """The running command as a result keeps it, with no path to the data.

    Args:
        module: For example "benchmarks.train".
        without: Words to leave out: what else it was asked for, where only a part of its answer is kept.
    """
    given = sys.argv[1:]
    shown = []
    for before, word in zip(["", *given], given, strict=False):
        if word in without:
            continue
        if before == "--data-dir":
            word = "DATA"
        shown.append("--data-dir=DATA" if word.startswith("--data-dir=") else word)
    return shlex.join(["python", "-m", module, *shown])
