"""Choose calibration and test images and measure exported models; shared by all export formats.

sample = artifacts.test_sample(run, dataset)         # test images with the Keras model's probabilities
exports.record(run, path, artifacts.measure(Predictor.load(path), sample))
"""

from __future__ import annotations

import statistics
import timeit
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.predict import Predictor
from pipeline import runs
from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.evaluate.exports import record

ACCURACY_IMAGES = 10_000
AGREEMENT_IMAGES = 1_000
CALIBRATION_IMAGES = 512
THROUGHPUT_BATCH = 64


def balanced_sample(labels: Any, count: int, seed: int = 0) -> np.ndarray:
    """Choose images in seeded random order, balanced over the classes as far as their sizes allow.

    Args:
        labels: int [N], NumPy or CuPy.
        count: How many images to choose.
        seed: Random seed.

    Returns:
        int64 [min(N, count)] distinct indices, on the host.
    """
    import pandas

    labels = device.to_numpy(labels)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    rank_in_class = pandas.Series(order).groupby(labels[order]).cumcount()
    # The first of every class, then the second of every class, and so on.
    chosen = order[np.argsort(rank_in_class.to_numpy(), kind="stable")][:count]
    return generator.permutation(chosen)


def calibration_images(dataset: Any) -> np.ndarray:
    """Choose training images for INT8 calibration, balanced over the classes.

    Args:
        dataset: A `Dataset`.

    Returns:
        uint8 [min(N, 512), H, W, C] on the host.
    """
    indices = balanced_sample(dataset.train.labels, CALIBRATION_IMAGES)
    return np.ascontiguousarray(device.to_numpy(dataset.train.images[device.to_device(indices)]))


@dataclass(frozen=True)
class Sample:
    """Test images with their labels and the Keras model's predictions.

    Attributes:
        images: uint8 [N, H, W, C], on the GPU if there is one.
        labels: int32 [N] on the host.
        reference: float32 [N, K] on the host: the Keras model's probabilities.
    """

    images: Any
    labels: np.ndarray
    reference: np.ndarray


def test_sample(run: runs.Run, dataset: Any) -> Sample:
    """Choose up to 10,000 test images, measure the Keras model on them and record the result as ``model.keras``.

    Raises:
        PipelineError: The dataset has other classes or another image shape than the run, or no test images.
    """
    run.check_dataset(dataset)
    if len(dataset.test.labels) == 0:
        raise PipelineError(f"The dataset {dataset.name} has no test images; export needs them to measure accuracy.")
    order = balanced_sample(dataset.test.labels, ACCURACY_IMAGES)
    keras_model = Predictor.load(run.model_path)
    images = dataset.test.images[device.to_device(order)]
    sample = Sample(images, device.to_numpy(dataset.test.labels)[order], keras_model.probabilities(images))
    record(run, run.model_path, measure(keras_model, sample))
    return sample


def size(path: Path) -> int:
    """Size in bytes of a file, or of all files below a folder."""
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


def measure(predictor: Predictor, sample: Sample) -> dict[str, Any]:
    """Measure size, accuracy, agreement with Keras, and speed of a model on this machine.

    Times include the copy of the probabilities to the host.

    Returns:
        A dictionary with ``size_bytes``, ``test_accuracy`` (on all images of the sample), ``test_images``,
        ``agreement`` (fraction of the first 1,000 images with the same top class as Keras), ``latency_ms`` (one image,
        median after warm-up), ``images_per_second`` (at batch 64) and ``device``.
    """
    answers = predictor.probabilities(sample.images).argmax(axis=1)
    agreement = answers[:AGREEMENT_IMAGES] == sample.reference[:AGREEMENT_IMAGES].argmax(axis=1)
    batch = sample.images[device.to_device(np.arange(THROUGHPUT_BATCH) % len(sample.images))]
    return {
        "size_bytes": size(predictor.path),
        "test_accuracy": float(np.mean(answers == sample.labels)),
        "test_images": len(answers),
        "agreement": float(np.mean(agreement)),
        "latency_ms": 1000 * _median_seconds(predictor, batch[:1]),
        "images_per_second": THROUGHPUT_BATCH / _median_seconds(predictor, batch),
        "device": "cpu" if predictor.kind == "tflite" else device.describe()["gpu"] or "cpu",
    }


def _median_seconds(predictor: Predictor, images: Any) -> float:
    """Median time of one call in seconds, after a warm-up, over 5 to 200 calls that take about 0.5 s together."""

    def call_times(count: int) -> list[float]:
        return timeit.repeat(lambda: predictor.probabilities(images), repeat=count, number=1)

    return statistics.median(call_times(int(np.clip(0.5 / min(call_times(3)), 5, 200))))
