"""Measure speed and accuracy of a preset in pipeline/conf/experiment: ``python -m benchmarks.experiments NAME``

The preset is trained with its own settings. An epoch before the measurement compiles the graphs; its updates are then
discarded. The test accuracy is measured after the last epoch. The history of loss, top-1 and top-5 accuracy is written
to the result file, and its curves to an image with the same name.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy

from benchmarks import results
from pipeline.core import cli, config, device
from pipeline.data.load import load_from_settings
from pipeline.evaluate.figures import save_figure, training_curves
from pipeline.evaluate.run import predict_probabilities
from pipeline.train import setup


def measure(name: str, data_dir: str | None, overrides: list[str]) -> dict[str, Any]:
    """Train one preset.

    Args:
        name: The preset.
        data_dir: Folder of its dataset.
        overrides: Settings that replace the preset's, such as ``epochs=5``.

    Returns:
        ``epoch_seconds`` (median, without compilation), ``images_per_second``, ``compile_seconds``, ``history`` (with
        validation loss, top-1 and top-5 accuracy after each epoch), ``test_accuracy`` and ``test_top5``.
    """
    chosen = [f"experiment={name}"]
    settings = setup.resolve(config.compose([*chosen, *overrides, *([f"data_dir={data_dir}"] if data_dir else [])]))
    dataset = load_from_settings(settings.dataset)
    setup.seed_everything(settings.seed)
    loop = setup.build_loop(settings, dataset)
    start = [device.to_numpy(variable.value) for variable in loop.variables]
    started = time.perf_counter()
    loop.train_epoch(dataset.train, 0)
    loop.evaluate(dataset.validation)
    compile_seconds = time.perf_counter() - started
    for variable, value in zip(loop.variables, start, strict=True):
        variable.assign(value)
    history, seconds = [], []
    for epoch in range(settings.epochs):
        began = time.perf_counter()
        logs = loop.train_epoch(dataset.train, epoch)
        seconds.append(time.perf_counter() - began)
        measured = loop.evaluate(dataset.validation)
        validation = {f"val_{name}": measured[name] for name in ("loss", "accuracy", "top5")}
        history.append({**logs, **validation})
    probabilities = predict_probabilities(setup.build_deployable(loop, settings, dataset), dataset.test.images)
    labels = device.to_numpy(dataset.test.labels)
    best_five = numpy.argsort(-probabilities, axis=1)[:, :5]
    return {
        "preset": name,
        "overrides": chosen + overrides,
        "batch_size": settings.batch_size,
        "precision": settings.precision,
        "xla": loop.xla,
        "train_images": len(dataset.train.labels),
        "classes": dataset.num_classes,
        "parameters": loop.network.count_params(),
        "compile_seconds": compile_seconds,
        "epoch_seconds": statistics.median(seconds),
        "images_per_second": statistics.median(logs["images_per_second"] for logs in history),
        "train_seconds": sum(seconds),
        "history": history,
        "test_accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
        "test_top5": float((best_five == labels[:, None]).any(axis=1).mean()),
    }


def main() -> None:
    known = sorted(path.stem for path in (config.FOLDER / "experiment").glob("*.yaml"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__.split(":")[0])
    parser.add_argument("name", metavar="NAME", choices=known, help=", ".join(known))
    parser.add_argument("--data-dir", default=None, help="folder of the dataset, or of its download")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings that replace the preset's")
    arguments = parser.parse_args()
    run = measure(arguments.name, arguments.data_dir, arguments.set)
    print(
        f"{arguments.name}: {run['epoch_seconds']:.3f} s per epoch ({run['images_per_second']:,.0f} images/s at batch "
        f"{run['batch_size']}), test top-1 {run['test_accuracy']:.2%}, top-5 {run['test_top5']:.2%} after "
        f"{len(run['history'])} epochs; compilation {run['compile_seconds']:.0f} s"
    )
    path = results.save(f"experiment-{arguments.name}", run, results.running("benchmarks.experiments"))
    save_figure(path.with_suffix(".png"), training_curves(run))
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
