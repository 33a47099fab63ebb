"""Pictures for the notebooks and reports: grids of images, bars. Each function draws, and returns the figure.

Arrays may live on the GPU; what is drawn is copied to the host.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from pipeline.core import device
from pipeline.core.files import (
    write,
)
from pipeline.evaluate.metrics import (
    TOP5_ABOVE_CLASSES,
    calibration_curve,
    most_confident_mistakes,
)


def save_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    content = io.BytesIO()
    with without_glyph_warnings():
        figure.savefig(content, format="png", dpi=110, bbox_inches="tight")
    write(path, content.getvalue())


@contextlib.contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Letters that matplotlib's font lacks are drawn as boxes, without a warning for each of them in each figure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ ")
        yield


def evaluation_figures(
    probabilities: numpy.ndarray, labels: numpy.ndarray, images: Any, class_names: list[str]
) -> dict[str, Any]:
    """The pictures of an evaluation: ``confusion_matrix``, ``calibration`` and ``mistakes``, matplotlib figures."""
    from matplotlib.figure import Figure

    diagram = calibration_curve(probabilities, labels)
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
    mistakes = image_grid(device.to_numpy(images[device.xp().asarray(indices)]), titles)
    return {
        "confusion_matrix": confusion_matrix_figure(labels, predictions, class_names),
        "calibration": reliability,
        "mistakes": mistakes,
    }


def confusion_matrix_figure(labels: numpy.ndarray, predictions: numpy.ndarray, class_names: list[str]) -> Any:
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


LEGEND_RUNS = 30  # runs in the plot's legend


def comparison_figure(frame: Any) -> Any:
    """Test accuracy against training time and against parameters, one numbered point a run; a matplotlib figure."""
    from matplotlib.figure import Figure

    rows = (frame.to_pandas() if hasattr(frame, "to_pandas") else frame).to_dict("records")
    figure = Figure(figsize=(12, max(4, 1 + 0.2 * min(len(rows), LEGEND_RUNS))), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = {model: f"C{number}" for number, model in enumerate(sorted({row["model"] for row in rows}))}
    several = len({row["dataset"] for row in rows}) > 1
    for panel, key, label in zip(
        panels, ("train_seconds", "parameters"), ("training time (s)", "parameters"), strict=True
    ):
        for number, row in enumerate(rows, start=1):
            place, order = (row[key], row["test_accuracy"]), 3 + len(rows) - number  # the best on top
            name = f"{number}  {row['run']}" + (f" ({row['dataset']})" if several else "")
            panel.scatter(*place, s=130, color=colours[row["model"]], edgecolors="white", label=name, zorder=order)
            panel.annotate(str(number), place, fontsize=7, color="white", ha="center", va="center", zorder=order)
        panel.set(xlabel=label, xscale="log")
        panel.margins(x=0.2)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy")
    handles, names = (entries[:LEGEND_RUNS] for entries in panels[0].get_legend_handles_labels())
    figure.legend(handles, names, loc="outside right upper", fontsize=7, frameon=False)
    return figure


TITLE_LINES = 3


TITLE_LINE_INCHES = 0.15


LETTERS_AN_INCH = 15


def image_grid(
    images: Any,
    titles: Sequence[str] | None = None,
    *,
    columns: int = 10,
    row_titles: Sequence[str] | None = None,
    title: str | None = None,
    size: float = 1.1,
    title_colours: Sequence[str] | None = None,
) -> Figure:
    """Images side by side, row by row.

    Args:
        images: [N, H, W, C] with C 1 or 3: uint8, or floats from 0 to 1; on the GPU or the host.
        titles: One text above each image; broken into lines as wide as the image, at most `TITLE_LINES`.
        columns: Images in a row; for fewer images than that the figure is narrower, but as wide as five.
        row_titles: One text left of each row.
        title: One text above all.
        size: Width of an image in inches.
        title_colours: One of matplotlib's colours for each of `titles`.

    Returns:
        The figure; in a notebook it shows itself as the last value of a cell.
    """
    images = device.to_numpy(images)
    columns = min(columns, max(5, len(images)))
    rows = max(1, -(-len(images) // columns))
    above = [_title_lines(text, size) for text in titles] if titles is not None else []
    lines = max(map(len, above), default=0)
    height = size * (images.shape[1] / images.shape[2] + 0.05) + lines * TITLE_LINE_INCHES
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(columns * size, rows * height + (0.4 if title else 0)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0, wspace=0)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        picture = image[..., 0] if image.shape[-1] == 1 else image
        top = 255 if image.dtype == np.uint8 else 1.0
        axis.imshow(picture if image.dtype == np.uint8 else np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=top)
        if titles is not None:
            colour = title_colours[index] if title_colours is not None else "black"
            axis.set_title("\n".join(above[index]), fontsize=8, color=colour)
        if row_titles is not None and index % columns == 0:
            axis.text(
                -0.1,
                0.5,
                str(row_titles[index // columns]),
                transform=axis.transAxes,
                fontsize=9,
                ha="right",
                va="center",
            )
    if title:
        figure.suptitle(title)
    pyplot.close(figure)  # the notebook shows the returned figure, not a second copy of it
    return figure


def _title_lines(text: Any, width: float) -> list[str]:
    """The lines of a title of 8 points above a picture of `width` inches; what does not fit ends in …"""
    letters = max(8, int(width * LETTERS_AN_INCH))
    lines = [
        piece
        for line in str(text).split("\n")
        for piece in textwrap.wrap(line, letters, max_lines=TITLE_LINES - 1, placeholder="…")
    ]
    return lines[:TITLE_LINES]


def class_bars(
    class_names: Sequence[str], series: dict[str, Any], *, title: str | None = None, label: str = "images"
) -> Figure:
    """Horizontal bars a class, one colour for each of `series`, stacked.

    Args:
        class_names: K names.
        series: Name to K numbers, for example split to counts.
        title: One text above all.
        label: What the bars count.

    Returns:
        The figure.
    """
    names = [str(name) for name in class_names]
    figure, axis = pyplot.subplots(figsize=(8, 1 + 0.28 * len(names)), layout="tight")
    left = np.zeros(len(names))
    for name, values in series.items():
        values = np.asarray(device.to_numpy(values), np.float64)
        axis.barh(np.arange(len(names)), values, left=left, label=name)
        left += values
    axis.set_yticks(np.arange(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    if title:
        axis.set_title(title)
    pyplot.close(figure)
    return figure


def histogram(images: Any, *, title: str | None = None) -> Figure:
    """How often the pixel values occur, in 32 steps of 8, a line for each channel; the scale is logarithmic.

    Args:
        images: uint8 [N, H, W, C] with C 1 or 3; on the GPU or the host. Counted where they live.
        title: One text above all.

    Returns:
        The figure.
    """
    xp = device.xp()
    channels = images.shape[-1]
    figure, axis = pyplot.subplots(figsize=(8, 2.6), layout="tight")
    names, colours = (["red", "green", "blue"],) * 2 if channels == 3 else (["grey"], ["black"])
    for channel in range(channels):
        counts = xp.zeros(256, np.int64)
        for start in range(0, len(images), 4096):
            counts += xp.bincount(images[start : start + 4096, ..., channel].ravel(), minlength=256)
        share = device.to_numpy(counts).reshape(32, 8).sum(axis=1) / max(1, int(counts.sum()))
        axis.stairs(share, np.arange(0, 257, 8), color=colours[channel], label=names[channel])
    axis.set_xlim(0, 256)
    axis.set_yscale("log")  # black or white backgrounds would flatten everything else
    axis.set_xlabel("pixel value")
    axis.set_ylabel("share of the pixels")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    if title:
        axis.set_title(title)
    pyplot.close(figure)
    return figure


def figure_pixels(figure: Any) -> numpy.ndarray:
    """Render a matplotlib figure: uint8 [h, w, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with without_glyph_warnings():
        canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def training_curves(runs: list[dict[str, Any]], path: Path) -> None:
    """Validation accuracy by epoch as a PNG: top-1, and dashed top-5 where there are more than ten classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for run in runs:
        epochs = range(1, len(run["history"]) + 1)
        accuracy, top5 = ([logs[key] for logs in run["history"]] for key in ("val_accuracy", "val_top5"))
        line = axes.plot(epochs, accuracy, marker="o", markersize=3, label=f"{run['preset']}, top-1")[0]
        if run["classes"] > TOP5_ABOVE_CLASSES:
            axes.plot(epochs, top5, "--", color=line.get_color(), label=f"{run['preset']}, top-5")
    axes.set(xlabel="epoch", ylabel="validation accuracy")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    save_figure(path, figure)
