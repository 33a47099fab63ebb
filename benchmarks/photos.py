"""Measure training on a folder of photos: ``python -m benchmarks.photos photos --data-dir FOLDER``

Runs `python -m pipeline.train FOLDER` with three seeds, each in a new process. The figures are the mean test accuracy
and the seconds from the command to the finished run, start-up included. More settings follow the name of the case, as
in ``photos model=cnn``. The case ``small`` makes a folder of 32×32 photos from CIFAR-10, 40 per class.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import environment, results
from pipeline import runs
from pipeline.core import cli, device
from pipeline.core.errors import PipelineError
from pipeline.data.load import load_dataset

SEEDS = (0, 1, 2)
TEST_IMAGES = 100  # per class, of the case "small"


def measure(folder: Path, settings: list[str], seed: int) -> dict[str, Any]:
    """Train on a folder in a new process and return ``seed``, ``test_accuracy`` and ``seconds``.

    Raises:
        PipelineError: The training failed; its error message is on standard error.
    """
    command = [
        sys.executable,
        "-m",
        "pipeline.train",
        str(folder.resolve()),
        *settings,
        f"seed={seed}",
        "name=measured",
    ]
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        code = cli.call(command, cwd=place, env=environment(), stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        if code:
            raise PipelineError(f"The training failed with exit code {code}; see its error message above.", code)
        accuracy = runs.Run(Path(place) / "runs" / "measured").metrics["test_accuracy"]
    return {"seed": seed, "test_accuracy": accuracy, "seconds": seconds}


def write_small(data_dir: str, folder: Path) -> Path:
    """Write a folder of 32×32 PNG files, 40 training and 100 test images per class of CIFAR-10."""
    from PIL import Image

    dataset = load_dataset("cifar10", data_dir=data_dir, validation_fraction=0.0, progress=False)
    for name, count in (("train", 40), ("test", TEST_IMAGES)):
        split = dataset.splits[name]
        labels = device.to_numpy(split.labels)
        for label, class_name in enumerate(dataset.class_names):
            target = folder / name / class_name
            target.mkdir(parents=True)
            for index in (labels == label).nonzero()[0][:count]:
                Image.fromarray(device.to_numpy(split.images[index])).save(target / f"{index}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photos", description=__doc__.split(":")[0])
    parser.add_argument("case", choices=["photos", "small"], help="photos: a folder of classes; small: from CIFAR-10")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="settings of python -m pipeline.train")
    parser.add_argument("--data-dir", required=True, help="the folder of photos, or of CIFAR-10")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(arguments.data_dir)
        if arguments.case == "small":
            folder = write_small(arguments.data_dir, Path(place) / "small")
        measured = []
        for seed in SEEDS:
            measured.append(measure(folder, arguments.settings, seed))
            print(f"seed {seed}: {measured[-1]['test_accuracy']:.2%} in {measured[-1]['seconds']:.0f} s", flush=True)
    mean = statistics.mean(run["test_accuracy"] for run in measured)
    print(f"mean test accuracy {mean:.2%}")
    name = "-".join(["photos", folder.name, *(setting.partition("=")[2] for setting in arguments.settings)])
    figures = {"mean_test_accuracy": mean, "runs": measured}
    print(f"written to {results.save(name, figures, results.running('benchmarks.photos'))}")


if __name__ == "__main__":
    cli.run(main)
