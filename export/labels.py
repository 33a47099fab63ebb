"""Class names inside exported files: `labels.json` in a SavedModel folder, or in a zip archive at the end of a file."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

from pipeline import runs

LABELS = "labels.json"


def labels_json(card: runs.ModelCard) -> bytes:
    """The content of `labels.json`: class names in the order of the outputs, and the input shape."""
    content = {"class_names": list(card.class_names), "input_shape": list(card.input_shape)}
    return json.dumps(content, ensure_ascii=False).encode()


def with_labels(flatbuffer: bytes, card: runs.ModelCard) -> bytes:
    """A TFLite file with `labels.json` in a zip archive at its end, as in TFLite's metadata format.

    The interpreter ignores what follows the flatbuffer, and ``unzip model.tflite`` extracts the labels.
    """
    content = io.BytesIO(flatbuffer)
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr(LABELS, labels_json(card))
    return content.getvalue()


def read_class_names(path: Path) -> list[str] | None:
    """Read class names from an exported file or folder, or else from its run's `model_card.json`; None without both."""
    try:
        if path.is_dir():
            content = (path / LABELS).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                content = archive.read(LABELS)
        return [str(name) for name in json.loads(content)["class_names"]]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        pass
    for folder in list(path.resolve().parents)[:2]:  # the run folder, or its export folder
        if (folder / "model_card.json").is_file():
            return list(runs.ModelCard.read(folder / "model_card.json").class_names)
    return None
