"""Train a network: ``python -m pipeline.train dataset=cifar10 data_dir=DATA model=cnn epochs=5 name=first``."""

from __future__ import annotations

import os
import shlex
from typing import Any

from pipeline.core import cli, config
from pipeline.core.errors import PipelineError
from pipeline.evaluate import compare
from pipeline.train.run_folder import (
    LOGS,
    PER_SESSION_SETTINGS,
)
from pipeline.train.train import train


def main_work(settings: dict[str, Any], overrides: list[str]) -> None:
    """What the command does with its configuration."""
    of_a_resumed = ("resume", "data_dir", *PER_SESSION_SETTINGS)
    given = [override for override in overrides if override.split("=")[0] not in of_a_resumed]
    if settings["resume"] is not None and given:
        raise PipelineError(f"resume= goes on with the run's own settings; leave out {', '.join(given)}.")
    run = train(settings)
    if run is None:  # the first worker speaks for all
        return
    metrics, folder = run.metrics, os.path.relpath(run.path)
    print(
        f"test accuracy {metrics['test_accuracy']:.2%}, {metrics['images_per_second']:,.0f} images/s, "
        f"{metrics['train_seconds']:.1f} s of training; the run is in {folder}"
    )
    print(f"next:\n  python -m export.tflite --run {shlex.quote(folder)}\n  tensorboard --logdir {LOGS}")


def main() -> int:
    return config.command(main_work, compare.report)()


if __name__ == "__main__":
    cli.run(main)
