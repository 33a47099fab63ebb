"""Rerun every benchmark of the README's table on this machine: ``python -m benchmarks --data-dir DATA``

Each benchmark is a separate command and writes its result to ``benchmarks/results``. If one fails, the others still
run, and the failed ones are named at the end. The benchmark of several GPUs runs only on a machine with several GPUs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time

from pipeline.core import cli, device
from pipeline.core.errors import PipelineError

PRESETS = (
    "highperf_cnn", "hybrid_resnet18", "resnet18_cifar", "tiny_imagenet_vit", "fashion_leaky_relu", "fashion_vit",
)  # fmt: skip
BENCHMARKS = {
    "augment": ["benchmarks.augment"],
    "train": ["benchmarks.train", "--data-dir", "DATA"],
    "ops": ["benchmarks.ops"],
    "operations": ["benchmarks.operations"],
    **{name: ["benchmarks.experiments", name, "--data-dir", "DATA"] for name in PRESETS},
    "workers": ["benchmarks.workers", "--data-dir", "DATA"],
}
BY_HAND = """The other figures of the README's table come from these commands; tee saves their output:
  (time python -m pipeline -p dataset cifar10 -p data_dir DATA) 2>&1 | tee pipeline.txt
  (time python -m export.trt_infer image.png) 2>&1 | tee trt_infer.txt
  make test-gpu ARGS="-n 4 --dist loadfile" 2>&1 | tee test_gpu.txt"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.split(":")[0],
        epilog=BY_HAND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(BENCHMARKS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks to run (default: all): {known}")
    parser.add_argument("--data-dir", help="folder of CIFAR-10, Tiny ImageNet and Fashion-MNIST, or of their downloads")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"Expected NAME to be one of {known}, got {', '.join(sorted(unknown))}")
    chosen = arguments.names or [name for name in BENCHMARKS if name != "workers" or device.gpu_count() > 1]
    needing = [name for name in chosen if "DATA" in BENCHMARKS[name]]
    if needing and arguments.data_dir is None:
        raise PipelineError(f"Expected --data-dir for {', '.join(needing)}; set it to the folder of the datasets.")
    failed = {}
    for name in chosen:
        module, *options = BENCHMARKS[name]
        command = ["-m", module, *(arguments.data_dir if option == "DATA" else option for option in options)]
        print(f"--- python {shlex.join(command)}", flush=True)
        started = time.perf_counter()
        if code := cli.call([sys.executable, *command]):
            failed[name] = code
        print(f"({time.perf_counter() - started:.0f} s)\n", flush=True)
    print(BY_HAND)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return max(failed.values(), default=0)


if __name__ == "__main__":
    cli.run(main)
