"""The console command image-pipeline: every command of the project under one name.

image-pipeline train dataset=cifar10 epochs=5  # the same as python -m pipeline.train dataset=cifar10 epochs=5
"""

from __future__ import annotations

import runpy
import sys

from pipeline.core import cli
from pipeline.core.errors import PipelineError

COMMANDS = {
    "train": ("pipeline.train", "train a network and save the run in runs/NAME"),
    "find_lr": ("pipeline.find_lr", "find a learning rate with a short range test"),
    "evaluate": ("pipeline.evaluate", "evaluate a run on a split of its dataset"),
    "compare": ("pipeline.compare", "compare the finished runs of a folder"),
    "export tflite": ("export.tflite", "convert a run to TFLite: float32, float16, INT8"),
    "export tftrt": ("export.tftrt", "convert a run to TF-TRT engines; needs an NVIDIA GPU"),
    "export saved_model": ("export.saved_model", "convert a run to a TensorFlow SavedModel"),
    "predict": ("export.tflite_infer", "classify images with the TFLite model of a run"),
    "predict --tensorrt": ("export.trt_infer", "classify images with the TF-TRT engines of a run"),
    "notebooks": ("pipeline", "run the notebooks in order and write a report"),
    "lab": ("pipeline.lab", "open the notebooks in JupyterLab"),
}
HELP = "\n".join(
    [
        "usage: image-pipeline COMMAND [ARGUMENT ...]",
        "",
        "Image classification with every step on the GPU. Runs are saved in runs/ of the current folder.",
        "",
        "commands:",
        *(f"  {name:<20} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "image-pipeline COMMAND --help describes a command.",
    ]
)


def main() -> None:
    """Run the module of a command as if by python -m, with the remaining arguments; the entry point in pyproject.toml.

    The exit code is 0 after the help message and 2 for an unknown command; otherwise the module sets it.
    """
    cli.run(_run_command)


def _run_command() -> None:
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(HELP)
        return
    for count in (2, 1):
        name = " ".join(arguments[:count])
        if name in COMMANDS:
            sys.argv[1:] = arguments[count:]
            runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
            return
    given = " ".join(arguments[:2] if arguments[:1] == ["export"] else arguments[:1])
    raise PipelineError(f"Expected one of {', '.join(COMMANDS)}, got {given!r}; see image-pipeline --help.")


if __name__ == "__main__":
    main()
