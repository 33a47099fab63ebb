"""Image classification with all steps on the GPU, or on the CPU if there is no GPU."""

from pathlib import Path

__version__ = "0.2.0"

# `python -m pipeline.compare`, `.lab` and `.workers` are modules in pipeline/commands.
__path__.append(str(Path(__file__).parent / "commands"))
