"""Train a network on images: python -m pipeline.train [SETTING=VALUE ...]"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core import cli, config, device
from pipeline.core.errors import PipelineError
from pipeline.train import plan

if TYPE_CHECKING:
    from pipeline.core.settings import Settings

DESCRIPTION = """\
Train a network on images, evaluate it on the test split, and save everything in runs/NAME.
TensorBoard's files are written to logs/NAME. Without settings it trains a small network on handwritten digits.

common settings:
  dataset=NAME          digits, cifar10, fashion_mnist, tiny_imagenet, image_folder, table or parquet
  data_dir=FOLDER       folder of the dataset, also for downloads
  model=NAME            cnn, resnet18, vit_lite or fashion_mlp
  augment=NAME          none, light, standard, cutout, strong, hybrid or photos
  optimizer=NAME        sgd, adam or adamw
  experiment=NAME       a complete recipe from pipeline/conf/experiment
  epochs=10 batch_size=128 optimizer.learning_rate=0.1 seed=0
  name=NAME             name of the run (default: date, time, dataset and model)
  resume=runs/NAME      continue an interrupted run with its settings; epochs=20 extends a finished one
  init=runs/NAME        start from the weights of another run
  precision=float32     or mixed_float16, mixed_bfloat16, auto
  early_stopping=5      stop after 5 epochs without a better validation accuracy

All settings are in pipeline/conf; --cfg job prints them with their values."""

EXAMPLES = """\
examples:
  python -m pipeline.train dataset=cifar10 data_dir=data model=resnet18 epochs=20 name=first
  python -m pipeline.train my_photos                 # a folder with a subfolder of images for each class
  python -m pipeline.train my_photos plan=only       # print the settings that it would use
  python -m pipeline.train --multirun model=cnn,resnet18 seed=1,2 name=sweep"""

OF_A_RESUMED_RUN = ("resume", "epochs", "data_dir", "cluster", "communication", "xla")


def work(settings: Settings, overrides: list[str]) -> None:
    """Train one run, and print its result and the next commands."""
    from pipeline.evaluate.run import summary_lines
    from pipeline.train.run_folder import LOGS, extend
    from pipeline.train.train import train

    os.environ.setdefault(device.NATIVE_LOG, str(LOGS / "tensorflow.log"))
    given = [override for override in overrides if override.partition("=")[0] not in OF_A_RESUMED_RUN]
    if settings.resume is not None and given:
        raise PipelineError(f"resume= uses the settings of the run; leave out {', '.join(given)}.")
    if settings.resume is not None and any(override.startswith("epochs=") for override in overrides):
        extend(settings.resume, settings.epochs)
    run = train(settings)
    if run is None:  # only the first training process returns the run
        return
    metrics, folder = run.metrics, os.path.relpath(run.path)
    print(*summary_lines(metrics), sep="\n")
    print(
        f"{metrics['images_per_second']:,.0f} images/s, {metrics['train_seconds']:.1f} s of training; "
        f"the run is in {folder}"
    )
    print(f"next:\n  python -m pipeline.evaluate {shlex.quote(folder)}\n  tensorboard --logdir {LOGS}")
    if metrics["test_interval"][0] > metrics["test_baseline"]:
        print(f"  python -m export.tflite --run {shlex.quote(folder)}")


def multirun(overrides: list[str]) -> int:
    """Train a run in ``runs/NAME/JOB`` for each combination of values, and compare the runs.

    A failed job does not stop the others; the exit code is then 1.
    """
    from pipeline.evaluate import compare

    names = [override[5:] for override in overrides if override.startswith("name=")]
    name = config.plain_name(names[-1] if names else f"multirun-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    failed = 0
    for job, given in config.sweep([override for override in overrides if not override.startswith("name=")]).items():
        print(f"--- {job}")
        try:
            given, settings, _ = plan.complete(given)
            work(settings.model_copy(update={"name": f"{name}/{job}"}), given)
        except PipelineError as error:
            if error.exit_code == 130:
                raise
            failed += 1
            print(f"error: {job}: {error}", file=sys.stderr)
        except Exception:  # a bug in one job must not stop the others
            failed += 1
            traceback.print_exc()
        gc.collect()  # callbacks and graphs reference each other; the next job needs their memory
    if Path("runs", name).is_dir():
        compare.report(Path("runs", name))
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.train",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="a setting that replaces the default")
    parser.add_argument("-m", "--multirun", action="store_true", help="train each combination, as in seed=1,2")
    parser.add_argument("--cfg", choices=["job"], help="print all settings instead of training")
    arguments, unknown = parser.parse_known_intermixed_args()
    arguments.overrides = plan.read_overrides(arguments.overrides, unknown)
    if arguments.multirun:
        return multirun(arguments.overrides)
    overrides, settings, lines = plan.complete(arguments.overrides)
    if arguments.cfg:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(settings.plain()), end="")
        return 0
    print(*lines, sep="\n", end="\n" if lines else "")
    if settings.plan != "only":
        work(settings, overrides)
    return 0


if __name__ == "__main__":
    cli.run(main)
