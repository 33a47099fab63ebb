"""The console command image-pipeline: every command of the project under one name.

image-pipeline train dataset=cifar10 epochs=5  # the same as python -m pipeline.train dataset=cifar10 epochs=5
"""

from __future__ import annotations

import contextlib
import runpy
import sys

COMMANDS = {
    "train": ("pipeline.train", "train a network and save the run in runs/NAME"),
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


def main() -> int:
    """Run the module of a command as if by python -m, with the remaining arguments.

    Returns:
        0 after the help message, 2 for an unknown command, 130 after Ctrl-C during the imports; otherwise the module
        ends the process with its own exit code.
    """
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        try:
            print(HELP, flush=True)
        except BrokenPipeError:  # the reader has ended, as `head` does; closing prevents a second error at exit
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.close()
        return 0
    for count in (2, 1):
        name = " ".join(arguments[:count])
        if name in COMMANDS:
            module = COMMANDS[name][0]
            sys.argv[1:] = arguments[count:]
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except KeyboardInterrupt:
                print("\nstopped by Ctrl-C", file=sys.stderr)
                return 130
            return 0
    given = " ".join(arguments[:2] if arguments[:1] == ["export"] else arguments[:1])
    print(f"error: Expected one of {', '.join(COMMANDS)}, got {given!r}; see image-pipeline --help.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
