"""Every figure of the README's table, measured on this machine: ``python -m benchmarks --data-dir DATA``.

Each question is a command of its own and is run as one, alone, one after the other; its result lands in
``benchmarks/results``. A question that fails is named at the end, and the others are still answered. What several GPUs
are good for is asked where there are several.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time

from benchmarks import check_names
from pipeline.core import cli, device
from pipeline.core.errors import PipelineError

PRESETS = (
    "highperf_cnn", "hybrid_resnet18", "resnet18_cifar", "tiny_imagenet_vit", "fashion_leaky_relu", "fashion_vit",
)  # fmt: skip
QUESTIONS = {
    "augment": ["benchmarks.augment"],
    "train": ["benchmarks.train", "--data-dir", "DATA"],
    "ops": ["benchmarks.ops"],
    "operations": ["benchmarks.operations"],
    **{name: ["benchmarks.experiments", name, "--data-dir", "DATA"] for name in PRESETS},
    **{name: ["benchmarks.transcripts", name, "--data-dir", "DATA"] for name in ("pipeline", "trt_infer")},
    "test_gpu": ["benchmarks.transcripts", "test_gpu", "--workers", "4"],
    "workers": ["benchmarks.workers", "--data-dir", "DATA"],
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(QUESTIONS)}")
    parser.add_argument("--data-dir", help="where CIFAR-10, Tiny ImageNet and Fashion-MNIST are, or are downloaded to")
    arguments = parser.parse_args()
    check_names("benchmark", arguments.names, QUESTIONS)
    chosen = arguments.names or [name for name in QUESTIONS if name != "workers" or device.gpu_count() > 1]
    needing = [name for name in chosen if "DATA" in QUESTIONS[name]]
    if needing and arguments.data_dir is None:
        others = ", ".join(name for name in QUESTIONS if name not in needing)
        raise PipelineError(f"{', '.join(needing)} need --data-dir; or name others: {others}.")
    failed = {}
    for name in chosen:
        module, *options = QUESTIONS[name]
        command = ["-m", module, *(arguments.data_dir if option == "DATA" else option for option in options)]
        print(f"--- python {shlex.join(command)}", flush=True)
        started = time.perf_counter()
        if code := cli.call([sys.executable, *command]):
            failed[name] = code
        print(f"({time.perf_counter() - started:.0f} s)\n", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return max(failed.values(), default=0)


if __name__ == "__main__":
    cli.run(main)
