"""Evaluate a trained model on a split of its dataset.

Accuracy, loss, calibration error and the metrics of each class are written to the run's `metrics.json`; the confusion
matrix, the calibration curve and the most confident mistakes are drawn in its folder `evaluation/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from pipeline import runs
from pipeline.core import device, files
from pipeline.core.errors import PipelineError
from pipeline.evaluate.figures import evaluation_figures, save_figure
from pipeline.evaluate.metrics import classification_metrics, majority_baseline, most_confused_pairs

FEW_TEST_IMAGES = 20  # in a class
AUGMENTATIONS = ("none", "flip")  # at test time


def check_augmentation(tta: str) -> str:
    """Return the name of a test-time augmentation; raises `PipelineError` if it is unknown."""
    if tta not in AUGMENTATIONS:
        raise PipelineError(f"Expected tta={' or tta='.join(AUGMENTATIONS)}, got tta={tta!r}.")
    return tta


def predict_probabilities(model: Any, images: Any, batch_size: int = 512, tta: str = "none") -> numpy.ndarray:
    """Run a deployable model on images; a batch that does not fit into memory is halved.

    Args:
        model: From `Run.load_model`: uint8 [N, H, W, C] to probabilities [N, K].
        images: uint8 [N, H, W, C], CuPy or NumPy; at least one.
        batch_size: Images per call. The last batch is padded, so that TensorFlow traces one graph.
        tta: Test-time augmentation: ``flip`` averages the probabilities of each image and its mirror image (Krizhevsky
            et al., 2012), ``none`` predicts the image only.

    Returns:
        float32 [N, K] on the host.

    Raises:
        PipelineError: A single image does not fit into memory.
    """
    if tta == "flip":
        return average_mirrored(lambda part: predict_probabilities(model, part, batch_size), images)
    tf = device.tensorflow()
    batch_size = min(batch_size, len(images))
    while True:
        try:
            return _predict_batches(model, images, batch_size)
        except (tf.errors.ResourceExhaustedError, MemoryError):
            if batch_size == 1:
                with device.explain_out_of_memory("choose a smaller network or smaller images"):
                    raise
        batch_size //= 2


def average_mirrored(forward: Callable[[Any], numpy.ndarray], images: Any) -> numpy.ndarray:
    """The mean of `forward` of the images [N, H, W, C] and of their mirror images, which are a view."""
    return (forward(images) + forward(images[:, :, ::-1])) / 2


def _predict_batches(model: Any, images: Any, batch_size: int) -> numpy.ndarray:
    tf, xp = device.tensorflow(), device.xp()
    forward = tf.function(lambda batch: model(batch, training=False))
    parts = []
    for first in range(0, len(images), batch_size):
        batch = xp.ascontiguousarray(images[first : first + batch_size])
        missing = batch_size - len(batch)
        if missing:
            batch = xp.concatenate([batch, xp.zeros((missing, *batch.shape[1:]), batch.dtype)])
        parts.append(forward(device.to_tensorflow(batch)).numpy()[: batch_size - missing])
    return numpy.concatenate(parts)


def prefix(split: str, tta: str) -> str:
    """How the names of an evaluation's metrics and figures begin: ``test``, or ``test_flip`` with ``tta=flip``."""
    return split if tta == "none" else f"{split}_{tta}"


def evaluate_run(run: runs.Run, dataset: Any, split: str = "test", tta: str = "none") -> dict[str, Any]:
    """Evaluate a run on a split, update its `metrics.json` and write its figures.

    Args:
        run: The run.
        dataset: A `pipeline.data.dataset.Dataset` with the run's classes and image shape.
        split: ``train``, ``validation`` or ``test``, the prefix of the metrics' names (``test_accuracy``, …).
        tta: As for `predict_probabilities`; with ``flip`` the prefix is ``test_flip`` instead of ``test``.

    Returns:
        The metrics that were added to `metrics.json`.

    Raises:
        PipelineError: The dataset has other classes or another image shape than the run, or the split is empty.
    """
    run.check_dataset(dataset)
    class_names, part = run.card.class_names, getattr(dataset, split)
    labels = device.to_numpy(part.labels)
    if len(labels) == 0:
        raise PipelineError(f"The {split} split of {dataset.name} contains no images; evaluate another split.")
    probabilities, start = predict_probabilities(run.load_model(), part.images, tta=tta), prefix(split, tta)
    metrics = classification_metrics(probabilities, labels, class_names)
    metrics["baseline"] = majority_baseline(device.to_numpy(dataset.train.labels), labels)
    measured = {f"{start}_{key}": value for key, value in metrics.items()}
    for name, figure in evaluation_figures(probabilities, labels, part.images, class_names).items():
        save_figure(run.path / "evaluation" / f"{start}_{name}.png", figure)
    files.write_json(run.path / "metrics.json", {**run.metrics, **measured})
    return measured


def summary_lines(metrics: dict[str, Any], split: str = "test") -> list[str]:
    """The result of an evaluation in plain English, with warnings and advice.

    Args:
        metrics: The content of a run's `metrics.json`, or the result of `evaluate_run`. Runs of older versions have
            neither an interval nor a baseline; their summary contains only the accuracy.
        split: The split that was evaluated, or another prefix of the metrics such as ``test_flip``.

    Returns:
        The lines to print: the accuracy with its 95 % confidence interval and the baseline; balanced accuracy and F1;
        a warning if a class has fewer than 20 images; and advice if the model is not better than the baseline.
    """
    accuracy = metrics[f"{split}_accuracy"]
    if f"{split}_interval" not in metrics:
        return [f"{split} accuracy {accuracy:.2%}"]
    low, high = metrics[f"{split}_interval"]
    baseline = metrics[f"{split}_baseline"]
    lines = [
        f"{split} accuracy {accuracy:.2%} (95 % confidence interval {low:.1%} to {high:.1%}); "
        f"always predicting the largest class: {baseline:.2%}",
        f"balanced accuracy {metrics[f'{split}_balanced_accuracy']:.2%}, macro F1 {metrics[f'{split}_macro_f1']:.3f}",
    ]
    images = {name: row["images"] for name, row in metrics[f"{split}_per_class"].items()}
    few = [name for name, count in images.items() if count < FEW_TEST_IMAGES]
    if few:
        smallest = min(few, key=images.__getitem__)
        lines.append(
            f"warning: {len(few)} of {len(images)} classes have fewer than {FEW_TEST_IMAGES} {split} images "
            f"({smallest}: {images[smallest]}), so their metrics are uncertain; add images, or set a larger "
            "dataset.test_fraction"
        )
    if low <= baseline:
        lines.append(
            "warning: the model is not clearly better than always predicting the largest class; try more epochs "
            "(epochs=…), a pretrained network (model=pretrained), or check the labels"
        )
    return lines


def print_report(measured: dict[str, Any], split: str) -> None:
    """Print the result of `evaluate_run`: tables of the classes and of the most confused pairs, and the summary."""
    import pandas

    per_class = measured[f"{split}_per_class"]
    names = list(per_class)
    print(pandas.DataFrame.from_dict(per_class, orient="index").to_string(float_format="{:.3f}".format))
    pairs = most_confused_pairs(measured[f"{split}_confusion_matrix"])
    if pairs:
        rows = [(names[true], names[predicted], count) for true, predicted, count in pairs]
        table = pandas.DataFrame(rows, columns=["true class", "predicted", "images"])
        print(f"\nmost confused pairs:\n{table.to_string(index=False)}")
    print(f"\nloss {measured[f'{split}_loss']:.4f}, calibration error {measured[f'{split}_calibration_error']:.3f}")
    print("\n".join(summary_lines(measured, split)))
