"""The command ``python -m export.trt_infer``."""

from __future__ import annotations

from export import infer, tensorrt_library
from pipeline.core import cli


def main() -> int:
    return infer.command(
        "python -m export.trt_infer",
        "Classify images with the TF-TRT engines of a run; needs an NVIDIA GPU.",
        ("tftrt_int8", "tftrt_fp16", "tftrt_fp32"),
        "python -m export.tftrt",
        tensorrt_library.require,
    )


if __name__ == "__main__":
    cli.run(main)
