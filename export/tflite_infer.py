"""The command ``python -m export.tflite_infer``."""

from __future__ import annotations

from export import infer
from pipeline.core import cli


def main() -> int:
    return infer.command(
        "python -m export.tflite_infer",
        "Classify images with a TFLite file of a run; runs on any machine.",
        ("model_float32.tflite", "model_float16.tflite", "model_int8.tflite"),
        "python -m export.tflite",
    )


if __name__ == "__main__":
    cli.run(main)
