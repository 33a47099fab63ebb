"""Class names inside exported files."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from pathlib import Path

from pipeline import runs
from pipeline.core import files

LABELS = "labels.json"


# --- class names ---------------------------------------------------------------------------------------------------


def labels_json(card: runs.ModelCard) -> bytes:
    """The content of `labels.json`, which travels with an artifact: class names in the order of the outputs."""
    content = {"class_names": list(card.class_names), "input_shape": list(card.input_shape)}
    return json.dumps(content, ensure_ascii=False).encode()


def with_labels(flatbuffer: bytes, card: runs.ModelCard) -> bytes:
    """A TFLite file with `labels.json` in a zip archive at its end, the place of TFLite's associated files.

    The interpreter ignores what follows the flatbuffer, and ``unzip model.tflite`` shows the labels.
    """
    content = io.BytesIO(flatbuffer)
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr(LABELS, labels_json(card))
    return content.getvalue()


def read_class_names(artifact: Path) -> list[str] | None:
    """Class names from inside the artifact, else from the `model_card.json` of the run it lies in, else None."""
    with contextlib.suppress(*files.DAMAGED_ZIP, ValueError, TypeError):
        if artifact.is_dir():
            content = (artifact / LABELS).read_bytes()
        else:
            with zipfile.ZipFile(artifact) as archive:
                content = archive.read(LABELS)
        return [str(name) for name in json.loads(content)["class_names"]]
    # An artifact lies in the run folder or below its export/.
    for folder in list(artifact.resolve().parents)[:2]:
        if (folder / "model_card.json").is_file():
            return list(runs.ModelCard.read(folder / "model_card.json").class_names)
    return None
