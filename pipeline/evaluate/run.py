"""How good a trained model is: ``python -m pipeline.evaluate runs/latest``.

Writes accuracy, loss and each class's precision and recall into the run's `metrics.json`, and pictures (confusion
matrix, calibration curve, the most confident mistakes) into its folder `evaluation/`.
"""

from __future__ import annotations

from typing import Any

import numpy

from pipeline import runs
from pipeline.core import device, files
from pipeline.core.errors import PipelineError
from pipeline.data.dataset import SPLITS
from pipeline.evaluate.figures import evaluation_figures, save_figure
from pipeline.evaluate.metrics import classification_metrics


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


def evaluate_run(run: runs.Run, dataset: Any, split: str = "test") -> dict[str, Any]:
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
    measured = {
        f"{split}_{key}": value
        for key, value in classification_metrics(probabilities, labels, card.class_names).items()
    }
    for name, figure in evaluation_figures(probabilities, labels, part.images, card.class_names).items():
        save_figure(run.path / "evaluation" / f"{split}_{name}.png", figure)
    known = run.metrics if (run.path / "metrics.json").exists() else {}
    files.write_json(run.path / "metrics.json", {**known, **measured})
    return measured


def print_report(measured: dict[str, Any], split: str) -> None:
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
