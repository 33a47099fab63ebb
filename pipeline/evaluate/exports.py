"""Measurements of exported models, stored in a run's `export/export.json`.

exports.record(run, path, measured)
exports.print_table(run)
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
    folder = run.export_dir
    with files.locked(folder):
        files.write_json(folder / "export.json", {**_read(run), artifact.name: measured})


def recorded(run: runs.Run) -> dict[str, dict[str, Any]]:
    """The measurements of all exported models that still exist: name to the result of `export.artifacts.measure`."""
    return {name: row for name, row in _read(run).items() if path_of(run, name).exists()}


def path_of(run: runs.Run, name: str) -> Path:
    """The file or folder of the exported model called `name` in `export.json`."""
    return run.model_path if name == run.model_path.name else run.export_dir / name


def _read(run: runs.Run) -> dict[str, Any]:
    path = run.export_dir / "export.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def print_table(run: runs.Run, names: Sequence[str] | None = None) -> None:
    """Print the run's `export.json` as a table; only the rows in `names`, if given."""
    import pandas

    rows = {
        name: {
            "size": f"{row['size_bytes'] / 1024:,.0f} KiB",
            "accuracy": f"{row['test_accuracy']:.2%}",
            "agreement": f"{row['agreement']:.2%}",
            "latency": f"{row['latency_ms']:.2f} ms",
            "images/s": f"{row['images_per_second']:,.0f}",
        }
        for name, row in recorded(run).items()
        if names is None or name in names
    }
    print(f"Exported models of {run.name}: accuracy on test images, agreement with Keras, images/s at batch 64")
    print(pandas.DataFrame.from_dict(rows, orient="index").to_string())
