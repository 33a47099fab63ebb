"""Metrics of a classifier from its probabilities: accuracy with its interval, loss, calibration, metrics of each class.

metrics = classification_metrics(probabilities, labels, class_names)
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy

TOP5_ABOVE_CLASSES = 10  # with fewer classes, top-5 accuracy is not informative


def classification_metrics(
    probabilities: numpy.ndarray, labels: numpy.ndarray, class_names: list[str]
) -> dict[str, Any]:
    """Accuracy and its interval, cross-entropy, calibration error, confusion matrix and the metrics of each class.

    Args:
        probabilities: float32 [N, K] on the host, N at least 1.
        labels: int [N] on the host.
        class_names: K names.

    Returns:
        ``accuracy``; ``interval``, the limits of its 95 % confidence interval (`wilson_interval`);
        ``balanced_accuracy``, the mean recall of the classes that have images (Brodersen et al., 2010); ``macro_f1``,
        the mean F1 of the classes that have images or predictions; ``loss``, the mean negative log-likelihood in nats;
        ``calibration_error``, the expected calibration error with 15 bins of equal width (Guo et al., 2017);
        ``confusion_matrix``, K lists of K counts, in which rows are true classes; and ``per_class``: name to
        ``precision``, ``recall``, ``f1`` and ``images``.
    """
    from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

    classes = list(range(len(class_names)))
    predictions = probabilities.argmax(axis=1)
    likelihood = probabilities[numpy.arange(len(labels)), labels].astype(numpy.float64)
    precision, recall, f1, images = precision_recall_fscore_support(
        labels, predictions, labels=classes, zero_division=0.0
    )
    correct = int((predictions == labels).sum())
    return {
        "accuracy": correct / len(labels),
        "interval": list(wilson_interval(correct, len(labels))),
        "balanced_accuracy": float(recall[images > 0].mean()),
        "macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=0.0)),
        "loss": float(-numpy.log(numpy.clip(likelihood, 1e-12, 1)).mean()),
        "calibration_error": calibration_curve(probabilities, labels)["error"],
        "confusion_matrix": confusion_matrix(labels, predictions, labels=classes).tolist(),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "images": int(n)}
            for name, p, r, f, n in zip(class_names, precision, recall, f1, images, strict=True)
        },
    }


def wilson_interval(correct: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The confidence interval of an accuracy (Wilson, 1927), which is also valid for few images and near 0 and 1.

    Args:
        correct: Number of correct predictions.
        count: Number of predictions, at least 1.
        confidence: Probability with which such an interval contains the true accuracy.

    Returns:
        The lower and the upper limit, from 0 to 1.
    """
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = correct / count, 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def majority_baseline(train_labels: numpy.ndarray, labels: numpy.ndarray) -> float:
    """The accuracy on `labels` of always predicting the largest class of `train_labels`; both int [N] on the host."""
    return float((labels == numpy.bincount(train_labels).argmax()).mean())


def most_confused_pairs(matrix: Any, count: int = 10) -> list[tuple[int, int, int]]:
    """The pairs of different classes that are confused most often.

    Args:
        matrix: int [K, K], a confusion matrix whose rows are true classes.
        count: Maximum number of pairs.

    Returns:
        (true class, predicted class, number of images), the largest number first.
    """
    confused = numpy.array(matrix)
    numpy.fill_diagonal(confused, 0)
    order = numpy.argsort(-confused, axis=None, kind="stable")[:count]
    pairs = zip(*numpy.unravel_index(order, confused.shape), strict=True)
    return [(int(true), int(other), int(confused[true, other])) for true, other in pairs if confused[true, other]]


def highest_losses(probabilities: numpy.ndarray, labels: numpy.ndarray, count: int = 24) -> numpy.ndarray:
    """The images with the highest loss, which often have a wrong label.

    Args:
        probabilities: float32 [N, K] on the host.
        labels: int [N] on the host.
        count: Maximum number of images.

    Returns:
        Their indices, the highest loss first: int64 [M] on the host, with M at most `count`.
    """
    return numpy.argsort(probabilities[numpy.arange(len(labels)), labels], kind="stable")[:count]


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
