"""Measurements of exported models, stored in a run's `export/export.json`.

exports.record(run, path, measured)
console.print(exports.table(run))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import runs
from pipeline.core import files


def record(run: runs.Run, artifact: Path, measured: dict[str, Any]) -> None:
    """Add or replace one exported model's measurements in the run's `export.json`.

    Args:
        run: The run.
        artifact: The exported file or folder; its name is the key.
        measured: The result of `export.artifacts.measure`, and any further JSON values.

    Raises:
        DiskError: The file cannot be written.
    """
    path = run.make_export_dir() / "export.json"
    with files.locked(path.parent):
        files.write_json(path, {**_read_json(path), artifact.name: measured})


def recorded(run: runs.Run) -> dict[str, dict[str, Any]]:
    """The measurements of all exported models that still exist: name to the result of `export.artifacts.measure`."""
    content = _read_json(run.export_dir / "export.json")
    return {name: row for name, row in content.items() if path_of(run, name).exists()}


def path_of(run: runs.Run, name: str) -> Path:
    """The file or folder of the exported model called `name` in `export.json`."""
    return run.model_path if name == run.model_path.name else run.export_dir / name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):  # missing or damaged; the next measurement rewrites it
        return {}


def table(run: runs.Run, names: Sequence[str] | None = None) -> Any:
    """The run's `export.json` as a `rich` table; only the rows in `names`, if given."""
    from rich import box
    from rich.table import Table

    # At most 80 columns wide for a network of 40 MiB.
    result = Table(title=f"Artifacts of {run.name}", title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    result.caption = "accuracy on test images, agreement with Keras, images/s at batch 64"
    result.add_column("artifact", no_wrap=True)
    for column in ("size", "accuracy", "agreement", "latency", "images/s"):
        result.add_column(column, justify="right", no_wrap=True)
    for name, row in recorded(run).items():
        if names is None or name in names:
            result.add_row(
                name,
                readable_size(row["size_bytes"]),
                f"{row['test_accuracy']:.2%}",
                f"{row['agreement']:.2%}",
                f"{row['latency_ms']:.2f} ms",
                f"{row['images_per_second']:,.0f}",
            )
    return result


def readable_size(count: int) -> str:
    """A number of bytes as text, in KiB below 1 MiB and in MiB above."""
    return f"{count / 1024:,.0f} KiB" if count < 1024**2 else f"{count / 1024**2:,.1f} MiB"
