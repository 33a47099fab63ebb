"""How good a trained model is: ``python -m pipeline.evaluate runs/latest``.

Writes accuracy, loss and each class's precision and recall into the run's `metrics.json`, and pictures (confusion
matrix, calibration curve, the most confident mistakes) into its folder `evaluation/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy

from pipeline import PipelineError, cli, device, files, runs

SPLITS = ("train", "validation", "test")


def predict_probabilities(model: Any, images: Any, batch_size: int = 512) -> numpy.ndarray:
    """Run a deployable model over images that live on the device; by halves where the memory is too small.

    Args:
        model: From `Run.load_model`: uint8 [N, H, W, C] to probabilities [N, K].
        images: uint8 [N, H, W, C], CuPy or NumPy.
        batch_size: Images a call; the last call is filled up, so that there is one graph.

    Returns:
        float32 [N, K] in host memory.

    Raises:
        PipelineError: The memory is too small even for one image.
    """
    tf = device.tensorflow()
    batch_size = max(1, min(batch_size, len(images)))
    while True:
        try:
            return _in_batches(model, images, batch_size)
        except (tf.errors.ResourceExhaustedError, MemoryError):
            if batch_size == 1:
                with device.out_of_memory_sentence("choose a smaller network or smaller images"):
                    raise
        batch_size //= 2


def _in_batches(model: Any, images: Any, batch_size: int) -> numpy.ndarray:
    tf = device.tensorflow()
    xp = device.xp()
    forward = tf.function(lambda batch: model(batch, training=False))
    parts = []
    for first in range(0, len(images), batch_size):
        batch = xp.ascontiguousarray(images[first : first + batch_size])
        missing = batch_size - len(batch)
        if missing:
            batch = xp.concatenate([batch, xp.zeros((missing, *batch.shape[1:]), batch.dtype)])
        parts.append(forward(device.to_tensorflow(batch)).numpy()[: batch_size - missing])
    return numpy.concatenate(parts) if parts else numpy.zeros((0, model.output_shape[-1]), numpy.float32)


def measure(probabilities: numpy.ndarray, labels: numpy.ndarray, class_names: list[str]) -> dict[str, Any]:
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
        "calibration_error": float(calibration(probabilities, labels)["error"]),
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


def calibration(probabilities: numpy.ndarray, labels: numpy.ndarray, bins: int = 15) -> dict[str, Any]:
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


def evaluate(run: runs.Run, dataset: Any, split: str = "test") -> dict[str, Any]:
    """Measure a run on a split, update its `metrics.json` and draw its pictures.

    Args:
        run: The run.
        dataset: A `datasets.Dataset` with the run's classes and image shape.
        split: ``train``, ``validation`` or ``test``; each has its own keys in the file (``test_accuracy``, …).

    Returns:
        What was added to `metrics.json`.

    Raises:
        PipelineError: The data set does not fit the run, or the split is empty or unknown.
    """
    card = run.card
    if split not in SPLITS:
        raise PipelineError(f"There is no split {split!r}; known ones: {', '.join(SPLITS)}.")
    run.check_dataset(dataset)
    part = getattr(dataset, split)
    labels = device.to_numpy(part.labels)
    probabilities = predict_probabilities(run.load_model(), part.images)
    measured = {f"{split}_{key}": value for key, value in measure(probabilities, labels, card.class_names).items()}
    for name, figure in draw(probabilities, labels, part.images, card.class_names).items():
        files.write_figure(run.path / "evaluation" / f"{split}_{name}.png", figure)
    known = run.metrics if (run.path / "metrics.json").exists() else {}
    files.write_json(run.path / "metrics.json", {**known, **measured})
    return measured


def draw(probabilities: numpy.ndarray, labels: numpy.ndarray, images: Any, class_names: list[str]) -> dict[str, Any]:
    """The pictures of an evaluation: ``confusion_matrix``, ``calibration`` and ``mistakes``, matplotlib figures."""
    from matplotlib.figure import Figure

    from pipeline import plots

    diagram = calibration(probabilities, labels)
    reliability = Figure(figsize=(4.5, 4.5))
    axes = reliability.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfect")
    axes.plot(diagram["confidence"], diagram["accuracy"], marker="o", label="model")
    axes.set(
        xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02),
        title=f"Calibration (expected error {diagram['error']:.3f})",
    )  # fmt: skip
    axes.legend()

    indices = most_confident_mistakes(probabilities, labels)
    predictions, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    titles = [f"{class_names[predictions[i]]} {confidence[i]:.0%}\nis {class_names[labels[i]]}" for i in indices]
    mistakes = plots.image_grid(device.to_numpy(images[device.xp().asarray(indices)]), titles)
    return {
        "confusion_matrix": confusion_figure(labels, predictions, class_names),
        "calibration": reliability,
        "mistakes": mistakes,
    }


def confusion_figure(labels: numpy.ndarray, predictions: numpy.ndarray, class_names: list[str]) -> Any:
    """The confusion matrix as a matplotlib figure; each row (true class) is shown in parts of that class's images."""
    from matplotlib.figure import Figure
    from sklearn.metrics import confusion_matrix

    classes = len(class_names)
    counts = confusion_matrix(labels, predictions, labels=list(range(classes)))
    shares = counts / numpy.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(12.0, 2.5 + 0.45 * classes)
    figure = Figure(figsize=(size, size))
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=f"Accuracy {(labels == predictions).mean():.2%}")
    if classes <= 30:
        axes.set_xticks(range(classes), class_names, rotation=60, ha="right")
        axes.set_yticks(range(classes), class_names)
        for row, column in numpy.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=7)
    return figure


def report(measured: dict[str, Any], split: str) -> None:
    """Print an evaluation as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("class", "precision", "recall", "F1", "images", title=f"{split} split")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in measured[f"{split}_per_class"].items():
        table.add_row(name, f"{row['precision']:.3f}", f"{row['recall']:.3f}", f"{row['f1']:.3f}", str(row["images"]))
    console = Console()
    console.print(table)
    console.print(
        f"accuracy {measured[f'{split}_accuracy']:.2%}   loss {measured[f'{split}_loss']:.4f}   "
        f"calibration error {measured[f'{split}_calibration_error']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", default=None, help="run folder or name (default: runs/latest)")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--data-dir", type=Path, default=None, help="where the data set is now, if it has moved")
    arguments = parser.parse_args()
    run = runs.find(arguments.run)
    dataset = run.load_dataset(data_dir=arguments.data_dir and str(arguments.data_dir))
    report(evaluate(run, dataset, arguments.split), arguments.split)
    print(f"pictures in {run.path / 'evaluation'}, figures in {run.path / 'metrics.json'}")


if __name__ == "__main__":
    cli.run(main)
