"""Metrics of a classifier from its probabilities: accuracy, loss, calibration, and a report of each class."""

from __future__ import annotations

from typing import Any

import numpy

TOP5_ABOVE_CLASSES = 10  # with fewer classes, top-5 accuracy is not informative


def classification_metrics(
    probabilities: numpy.ndarray, labels: numpy.ndarray, class_names: list[str]
) -> dict[str, Any]:
    """Accuracy, cross-entropy, expected calibration error, confusion matrix and the metrics of each class.

    Args:
        probabilities: float32 [N, K] on the host, N at least 1.
        labels: int [N] on the host.
        class_names: K names.

    Returns:
        ``accuracy``; ``loss``, the mean negative log-likelihood in nats; ``calibration_error``, the expected
        calibration error with 15 bins of equal width (Guo et al., 2017); ``confusion_matrix``, K lists of K counts, in
        which rows are true classes; and ``per_class``: name to ``precision``, ``recall``, ``f1`` and ``images``.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    classes = list(range(len(class_names)))
    predictions = probabilities.argmax(axis=1)
    likelihood = probabilities[numpy.arange(len(labels)), labels].astype(numpy.float64)
    precision, recall, f1, images = precision_recall_fscore_support(
        labels, predictions, labels=classes, zero_division=0.0
    )
    return {
        "accuracy": float((predictions == labels).mean()),
        "loss": float(-numpy.log(numpy.clip(likelihood, 1e-12, 1)).mean()),
        "calibration_error": calibration_curve(probabilities, labels)["error"],
        "confusion_matrix": confusion_matrix(labels, predictions, labels=classes).tolist(),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "images": int(n)}
            for name, p, r, f, n in zip(class_names, precision, recall, f1, images, strict=True)
        },
    }


def calibration_curve(probabilities: numpy.ndarray, labels: numpy.ndarray, bins: int = 15) -> dict[str, Any]:
    """The points of a reliability diagram and the expected calibration error (Guo et al., 2017, equation 3).

    Args:
        probabilities: float32 [N, K] on the host.
        labels: int [N] on the host.
        bins: Number of confidence intervals of equal width.

    Returns:
        ``confidence`` and ``accuracy`` (float64, one value for each bin that is not empty), and ``error``.
    """
    confidence = probabilities.max(axis=1).astype(numpy.float64)
    correct = probabilities.argmax(axis=1) == labels
    bin_index = numpy.clip(numpy.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = numpy.bincount(bin_index, minlength=bins)
    filled = counts > 0
    mean_confidence = numpy.bincount(bin_index, confidence, bins)[filled] / counts[filled]
    mean_accuracy = numpy.bincount(bin_index, correct, bins)[filled] / counts[filled]
    error = float((counts[filled] / len(labels) * abs(mean_confidence - mean_accuracy)).sum())
    return {"confidence": mean_confidence, "accuracy": mean_accuracy, "error": error}


def most_confident_mistakes(probabilities: numpy.ndarray, labels: numpy.ndarray, count: int = 16) -> numpy.ndarray:
    """The wrong predictions with the highest probability, highest first.

    Args:
        probabilities: float32 [N, K] on the host.
        labels: int [N] on the host.
        count: Maximum number of predictions.

    Returns:
        Their indices: int64 [M] on the host, with M at most `count`.
    """
    wrong = numpy.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[numpy.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:count]
