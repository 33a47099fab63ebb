"""Rerun every benchmark of the README's table on this machine: ``python -m benchmarks --data-dir DATA``

Each benchmark is also a command and writes its result to ``benchmarks/results``. If one fails, the others still run,
and the failed ones are named at the end. The benchmark of several GPUs runs only on a machine with several GPUs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time

from pipeline.core import cli, device

PRESETS = (
    "highperf_cnn", "hybrid_resnet18", "resnet18_cifar", "tiny_imagenet_vit", "fashion_leaky_relu", "fashion_vit",
)  # fmt: skip
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
    parser.add_argument(
        "--data-dir", required=True, help="folder of CIFAR-10, Tiny ImageNet and Fashion-MNIST, or of their downloads"
    )
    data = ["--data-dir", parser.parse_args().data_dir]
    commands = [
        ["benchmarks.augment"],
        ["benchmarks.train", *data],
        ["benchmarks.ops"],
        ["benchmarks.operations"],
        *(["benchmarks.experiments", name, *data] for name in PRESETS),
        *([["benchmarks.workers", *data]] if device.gpu_count() > 1 else []),
    ]
    failed = {}
    for command in commands:
        shown = shlex.join(["python", "-m", *command])
        print(f"--- {shown}", flush=True)
        started = time.perf_counter()
        if code := cli.call([sys.executable, "-m", *command]):
            failed[shown] = code
        print(f"({time.perf_counter() - started:.0f} s)\n", flush=True)
    print(BY_HAND)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return max(failed.values(), default=0)


if __name__ == "__main__":
    cli.run(main)
