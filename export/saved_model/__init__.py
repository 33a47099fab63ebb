"""Export a run as a SavedModel (uint8 pixels in, float32 probabilities out), which the converters read.

saved_model.save(run)        # writes runs/NAME/export/saved_model
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from export import labels
from pipeline import runs
from pipeline.core import files


def save(run: runs.Run) -> Path:
    """Write `export/saved_model` of a run; an existing one is replaced.

    Returns:
        The folder. Its signature ``serving_default`` takes uint8 [N, H, W, C] and returns float32 [N, K].

    Raises:
        PipelineError: The model cannot be read or the folder cannot be written.
    """
    path = run.export_dir / "saved_model"
    model = float32_copy(run.load_model())
    with files.atomic_write(path) as temporary:
        write(model, temporary)
        (temporary / labels.LABELS).write_bytes(labels.labels_json(run.card))
    return path


def write(model: Any, folder: Path) -> None:
    """Write a Keras model as a SavedModel, without Keras's messages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.export(str(folder), verbose=False)


def float32_copy(model: Any) -> Any:
    """A copy of a Keras model that computes in float32, regardless of its training precision.

    The weights are float32 under every mixed policy; TFLite and TensorRT do not support bfloat16 arithmetic.
    """
    copy = type(model).from_config(_in_float32(model.get_config()))
    copy.set_weights(model.get_weights())
    return copy


def _in_float32(config: Any) -> Any:
    """A Keras configuration with every mixed or half-precision dtype policy replaced by float32."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return {**config, "config": {**config["config"], "name": "float32"}}
        return {
            key: "float32" if key == "dtype" and isinstance(value, str) and "float" in value else _in_float32(value)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_in_float32(value) for value in config)
    return config
