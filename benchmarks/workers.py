"""Measure the training speed of several GPUs: ``python -m benchmarks.workers --data-dir DATA``

Trains ResNet-18 with `python -m pipeline.workers` with one training process and with one for each GPU; the batch size
per process is the same. The figures are images/s of all processes together, augmentation included (the median of whole
epochs after one that compiles), and the test accuracy of each run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import environment, results
from pipeline import runs
from pipeline.core import cli, device
from pipeline.core.errors import PipelineError


def measure(count: int, overrides: list[str], batch_size: int) -> dict[str, Any]:
    """Train with `count` training processes, in a temporary folder.

    Args:
        count: Number of training processes.
        overrides: Settings of the training, for example ``epochs=5``.
        batch_size: Images per step and process.

    Returns:
        ``workers``, ``batch_size`` (of all processes together), ``images_per_second`` (median), ``epochs`` (images/s of
        each epoch, including the first) and ``test_accuracy``.

    Raises:
        PipelineError: The training failed; its error message is on standard error.
    """
    command = [sys.executable, "-m", "pipeline.workers", str(count), *overrides]
    command += [f"batch_size={batch_size * count}", "name=measured"]
    with tempfile.TemporaryDirectory() as folder:
        code = cli.call(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
        if code:
            raise PipelineError(
                f"The training with {count} processes failed with exit code {code}; see its error message above.", code
            )
        metrics = runs.Run(Path(folder) / "runs" / "measured").metrics
    return {
        "workers": count,
        "batch_size": batch_size * count,
        "images_per_second": metrics["images_per_second"],
        "epochs": [epoch["images_per_second"] for epoch in metrics["history"]],
        "test_accuracy": metrics["test_accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers", description=__doc__.split(":")[0])
    parser.add_argument("--data-dir", required=True, help="folder of CIFAR-10, or of its download")
    parser.add_argument(
        "--counts", type=cli.positive, nargs="+", help="numbers of training processes (default: 1 and all GPUs)"
    )
    parser.add_argument("--batch-size", type=cli.positive, default=512, help="per process (default: %(default)s)")
    parser.add_argument("--epochs", type=cli.positive, default=5, help="the first one compiles (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="additional training settings")
    arguments = parser.parse_args()
    gpus = device.gpu_count()
    counts = arguments.counts or [1, gpus]
    if arguments.counts is None and gpus < 2:
        raise PipelineError(
            f"Expected at least 2 GPUs, got {gpus}; to measure processes that share a device, set --counts 1 2."
        )
    data = Path(arguments.data_dir).absolute()
    chosen = ["dataset=cifar10", "model=resnet18", f"epochs={arguments.epochs}", *arguments.set]
    measured = []
    print(f"{'processes':>9} {'batch':>6} {'images/s':>12} {'accuracy':>9}")
    for count in counts:
        run = measure(count, [*chosen, f"data_dir={data}"], arguments.batch_size)
        measured.append(run)
        speed = f"{run['images_per_second']:,.0f}"
        print(f"{count:>9} {run['batch_size']:>6} {speed:>12} {run['test_accuracy']:>9.2%}", flush=True)
    print(f"written to {results.save('workers', {'settings': chosen, 'runs': measured})}")


if __name__ == "__main__":
    cli.run(main)
