"""Metrics of a classifier: accuracy, loss, calibration, per-class report."""

from __future__ import annotations

from typing import Any

import numpy

from pipeline.core.errors import PipelineError


def classification_metrics(
    probabilities: numpy.ndarray, labels: numpy.ndarray, class_names: list[str]
) -> dict[str, Any]:
    """Accuracy, cross-entropy, expected calibration error and the report of each class.

    Args:
        probabilities: float32 [N, K].
        labels: int [N].
        class_names: K names.

    Returns:
        ``accuracy``, ``loss`` (mean negative log-likelihood in nats), ``calibration_error`` (expected calibration error
        with 15 equal bins: Guo et al., 2017), ``confusion_matrix`` (K lists; rows are the true class) and ``per_class``
        (name to ``precision``, ``recall``, ``f1`` and ``images``).

    Raises:
        PipelineError: There are no images.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    if len(labels) == 0:
        raise PipelineError("There are no images to evaluate on; this split is empty.")
    classes = range(len(class_names))
    predictions = probabilities.argmax(axis=1)
    likelihood = probabilities[numpy.arange(len(labels)), labels].astype(numpy.float64)
    precision, recall, f1, images = precision_recall_fscore_support(
        labels, predictions, labels=list(classes), zero_division=0.0
    )
    return {
        "accuracy": float((predictions == labels).mean()),
        "loss": float(-numpy.log(numpy.clip(likelihood, 1e-12, 1)).mean()),
        "calibration_error": float(calibration_curve(probabilities, labels)["error"]),
        "confusion_matrix": confusion_matrix(labels, predictions, labels=list(classes)).tolist(),
        "per_class": {
            class_names[k]: {
                "precision": float(precision[k]),
                "recall": float(recall[k]),
                "f1": float(f1[k]),
                "images": int(images[k]),
            }
            for k in classes
        },
    }


def calibration_curve(probabilities: numpy.ndarray, labels: numpy.ndarray, bins: int = 15) -> dict[str, Any]:
    """The reliability diagram and the expected calibration error (Guo et al., 2017, equation 3).

    Returns:
        ``confidence``, ``accuracy`` and ``weight`` (float64, one a non-empty bin; the weights sum to 1), and ``error``.
    """
    confidence = probabilities.max(axis=1).astype(numpy.float64)
    correct = probabilities.argmax(axis=1) == labels
    edge = numpy.clip(numpy.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = numpy.bincount(edge, minlength=bins)
    filled = counts > 0
    mean_confidence = numpy.bincount(edge, confidence, bins)[filled] / counts[filled]
    mean_accuracy = numpy.bincount(edge, correct, bins)[filled] / counts[filled]
    weight = counts[filled] / len(labels)
    error = float((weight * abs(mean_confidence - mean_accuracy)).sum())
    return {"confidence": mean_confidence, "accuracy": mean_accuracy, "weight": weight, "error": error}


def most_confident_mistakes(probabilities: numpy.ndarray, labels: numpy.ndarray, count: int = 16) -> numpy.ndarray:
    """Indices of the wrong answers with the highest probability, highest first; int64 [at most count]."""
    wrong = numpy.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[numpy.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:count]


TOP5_ABOVE_CLASSES = 10  # with fewer classes the top-5 accuracy says little
