"""The command ``python -m export.tflite_infer``."""

from __future__ import annotations

from export import infer
from pipeline.core import cli

ARTIFACTS = ("model_float32.tflite", "model_float16.tflite", "model_int8.tflite")


def main() -> int:
    return infer.command(
        "python -m export.tflite_infer",
        "Classify images with a TFLite file of a run; runs on any machine.",
        ARTIFACTS,
        "python -m export.tflite",
    )


if __name__ == "__main__":
    cli.run(main)
