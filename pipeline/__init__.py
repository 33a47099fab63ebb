"""Image classification with every step on the GPU; it also runs without one."""

from pathlib import Path

__version__ = "0.2.0"

# `python -m pipeline.compare`, `.lab` and `.workers` are files of pipeline/commands.
__path__.append(str(Path(__file__).parent / "commands"))
