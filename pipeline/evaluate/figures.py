"""Figures for the notebooks, evaluations, comparisons of runs and benchmarks.

Each function returns a matplotlib `Figure`: `save_figure` writes it as PNG, `figure_pixels` renders it to an array, and
a notebook shows it as the last value of a cell. Arrays may be on the GPU; only the drawn values are copied to the host.
"""

from __future__ import annotations

import itertools
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from pipeline.core import device, files
from pipeline.evaluate.metrics import TOP5_ABOVE_CLASSES, calibration_curve, most_confident_mistakes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGEND_RUNS = 30  # runs in the legend of a comparison
NAMED_CLASSES = 220  # in a confusion matrix; with more classes only colours are drawn
LINE_SPACING = 1.35  # of titles, as a multiple of their size
CHARACTER_WIDTH = 0.6  # of titles, as a multiple of their size
POINTS_PER_INCH = 72


def image_grid(
    images: Any,
    titles: Sequence[str] | None = None,
    *,
    columns: int = 10,
    row_titles: Sequence[str] | None = None,
    size: float = 1.1,
    title_colours: Sequence[str] | None = None,
    fontsize: float = 8,
) -> Figure:
    """Draw images in a grid, row by row.

    Args:
        images: [N, H, W, C] with C 1 or 3: uint8, or floats from 0 to 1; on the GPU or the host.
        titles: One text above each image; each of its lines is wrapped into at most two, as wide as the image.
        columns: Images in a row. With fewer images the figure is narrower, but at least five images wide.
        row_titles: One text to the left of each row.
        size: Width of an image in inches.
        title_colours: One matplotlib colour for each of `titles`.
        fontsize: Size of the titles in points.
    """
    images = device.to_numpy(images)
    columns = min(columns, max(5, len(images)))
    rows = max(1, -(-len(images) // columns))
    characters = max(8, int(size * POINTS_PER_INCH / (CHARACTER_WIDTH * fontsize)))
    wrapped = [_wrap_title(text, characters) for text in titles or ()]
    line = LINE_SPACING * fontsize / POINTS_PER_INCH
    height = size * (images.shape[1] / images.shape[2] + 0.05) + line * max(map(len, wrapped), default=0)
    figure = _figure(columns * size, rows * height)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0, wspace=0)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    top = 255 if images.dtype == numpy.uint8 else 1
    for index, (panel, image) in enumerate(zip(panels, images, strict=False)):
        shown = numpy.clip(image[..., 0] if image.shape[-1] == 1 else image, 0, top)
        panel.imshow(shown, cmap="gray", vmin=0, vmax=top)
        if wrapped:
            colour = title_colours[index] if title_colours is not None else "black"
            panel.set_title("\n".join(wrapped[index]), fontsize=fontsize, color=colour)
        if row_titles is not None and index % columns == 0:
            text = str(row_titles[index // columns])
            panel.text(-0.1, 0.5, text, transform=panel.transAxes, fontsize=9, ha="right", va="center")
    return figure


def _wrap_title(text: Any, characters: int) -> list[str]:
    """The lines of a title, each with at most this number of characters; text that does not fit ends in …"""
    lines = (textwrap.wrap(line, characters, max_lines=2, placeholder="…") for line in str(text).splitlines())
    return list(itertools.chain.from_iterable(lines))


def class_bars(class_names: Sequence[str], series: dict[str, Any], *, title: str | None = None) -> Figure:
    """The number of images of each class as horizontal stacked bars.

    Args:
        class_names: K names.
        series: Name (of a split, for example) to K numbers; one colour each.
        title: One text above the figure.
    """
    import pandas

    figure = _figure(8, 1 + 0.28 * len(class_names))
    axes = figure.subplots()
    counts = pandas.DataFrame({name: device.to_numpy(values) for name, values in series.items()}, index=class_names)
    counts.plot.barh(ax=axes, stacked=True, width=0.8, legend=False)
    axes.invert_yaxis()
    axes.set(xlabel="images", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def histogram(images: Any) -> Figure:
    """The distribution of the pixel values in 32 bins, one line for each channel, on a logarithmic scale.

    Args:
        images: uint8 [N, H, W, C] with C 1 or 3; on the GPU or the host, where they are counted.
    """
    xp = device.xp()
    figure = _figure(8, 2.6)
    axes = figure.subplots()
    channels = {"red": "red", "green": "green", "blue": "blue"} if images.shape[-1] == 3 else {"grey": "black"}
    for channel, (name, colour) in enumerate(channels.items()):
        counts = xp.zeros(256, numpy.int64)
        for start in range(0, len(images), 4096):  # bincount needs 8 bytes per pixel
            counts += xp.bincount(images[start : start + 4096, ..., channel].ravel(), minlength=256)
        share = device.to_numpy(counts).reshape(32, 8).sum(axis=1) / max(1, int(counts.sum()))
        axes.stairs(share, numpy.arange(0, 257, 8), color=colour, label=name)
    # The scale is logarithmic because a black or white background would flatten everything else.
    axes.set(xlabel="pixel value", ylabel="share of the pixels", xlim=(0, 256), yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def evaluation_figures(
    probabilities: numpy.ndarray, labels: numpy.ndarray, images: Any, class_names: list[str]
) -> dict[str, Figure]:
    """The figures of an evaluation: ``confusion_matrix``, ``calibration`` and ``mistakes`` (the most confident ones).

    Args:
        probabilities: float32 [N, K], on the host.
        labels: int [N], on the host.
        images: uint8 [N, H, W, C], on the GPU or the host.
        class_names: K names.
    """
    predictions, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    indices = most_confident_mistakes(probabilities, labels)
    titles = [f"{class_names[predictions[i]]} {confidence[i]:.0%}\nis {class_names[labels[i]]}" for i in indices]
    return {
        "confusion_matrix": confusion_matrix_figure(labels, predictions, class_names),
        "calibration": calibration_figure(probabilities, labels),
        "mistakes": image_grid(images[device.xp().asarray(indices)], titles, columns=4, size=1.8, fontsize=11),
    }


def confusion_matrix_figure(labels: numpy.ndarray, predictions: numpy.ndarray, class_names: list[str]) -> Figure:
    """The confusion matrix; the colour is the share of the row (the true class), the number is the count.

    Args:
        labels: int [N] on the host.
        predictions: int [N] on the host: the predicted classes.
        class_names: K names.
    """
    from sklearn.metrics import confusion_matrix

    classes = len(class_names)
    counts = confusion_matrix(labels, predictions, labels=list(range(classes)))
    shares = counts / numpy.maximum(counts.sum(axis=1, keepdims=True), 1)
    many = classes > 30
    size = min(2.5 + (0.16 if many else 0.45) * classes, 36)
    figure = _figure(size, size, layout="constrained" if many else None)
    axes = figure.subplots()
    # With many classes most confusions are a small share of a row; the square root makes them visible.
    axes.imshow(numpy.sqrt(shares) if many else shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=f"Accuracy {(labels == predictions).mean():.2%}")
    if classes <= NAMED_CLASSES:
        font, number = (6, 5) if many else (None, 7)
        names = [textwrap.shorten(str(name), 30, placeholder="…") for name in class_names] if many else class_names
        axes.set_xticks(range(classes), names, rotation=90 if many else 60, ha="center" if many else "right")
        axes.set_yticks(range(classes), names)
        axes.tick_params(labelsize=font, top=many, labeltop=many, right=many, labelright=many)
        for row, column in numpy.argwhere(counts):
            colour = "white" if shares[row, column] > (0.25 if many else 0.5) else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=number)
        for tick in axes.get_xticklabels() if many else []:
            tick.set_rotation(90)
    return figure


def calibration_figure(probabilities: numpy.ndarray, labels: numpy.ndarray) -> Figure:
    """The reliability diagram: accuracy against confidence.

    Args:
        probabilities: float32 [N, K] on the host.
        labels: int [N] on the host.
    """
    curve = calibration_curve(probabilities, labels)
    figure = _figure(4.5, 4.5, layout=None)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfect")
    axes.plot(curve["confidence"], curve["accuracy"], marker="o", label="model")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"Calibration (expected error {curve['error']:.3f})")
    axes.legend()
    return figure


def comparison_figure(frame: Any) -> Figure:
    """Test accuracy against training time and against parameters; one numbered point for each run.

    Args:
        frame: The pandas dataframe of `compare.table`, best run first.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = frame.to_dict("records")
    figure = _figure(12, max(4, 1 + 0.2 * min(len(rows), LEGEND_RUNS)))
    panels = figure.subplots(1, 2, sharey=True)
    colours = {model: f"C{number}" for number, model in enumerate(sorted(set(frame["model"])))}
    several = frame["dataset"].nunique() > 1
    quantities = {"train_seconds": "training time (s)", "parameters": "parameters"}
    for panel, (key, label) in zip(panels, quantities.items(), strict=True):
        for number, row in enumerate(rows, start=1):
            point, order = (row[key], row["test_accuracy"]), 3 + len(rows) - number  # the best run is drawn on top
            name = f"{number}  {row['run']}" + (f" ({row['dataset']})" if several else "")
            panel.scatter(*point, s=130, color=colours[row["model"]], edgecolors="white", label=name, zorder=order)
            panel.annotate(str(number), point, fontsize=7, color="white", ha="center", va="center", zorder=order)
        panel.set(xlabel=label, xscale="log")
        panel.margins(x=0.2)
        # Labels at 1, 2 and 5 times a power of ten; matplotlib labels every minor tick of a short range.
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e4 else _short(value)))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy")
    handles, names = (entries[:LEGEND_RUNS] for entries in panels[0].get_legend_handles_labels())
    figure.legend(handles, names, loc="outside right upper", fontsize=7, frameon=False)
    return figure


def _short(value: float) -> str:
    """A large number with a unit prefix: 20000 becomes 20k, 5000000 becomes 5M."""
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"


def training_curves(result: dict[str, Any]) -> Figure:
    """Validation accuracy by epoch: top-1, and a dashed line for top-5 if there are more than ten classes.

    Args:
        result: ``preset``, ``classes`` and ``history`` of an experiment.
    """
    figure = _figure(7, 4)
    axes = figure.subplots()
    epochs = range(1, len(result["history"]) + 1)
    for key, style, label in (("val_accuracy", "o-", "top-1"), ("val_top5", "--", "top-5")):
        if key == "val_accuracy" or result["classes"] > TOP5_ABOVE_CLASSES:
            values = [logs[key] for logs in result["history"]]
            axes.plot(epochs, values, style, color="C0", markersize=3, label=f"{result['preset']}, {label}")
    axes.set(xlabel="epoch", ylabel="validation accuracy")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


def learning_rate_figure(rates: numpy.ndarray, losses: numpy.ndarray, suggestion: float) -> Figure:
    """The mean training loss of a range test against the learning rate.

    Args:
        rates: float [S], the learning rates.
        losses: float [S], the mean losses.
        suggestion: The suggested learning rate, drawn as a vertical line.
    """
    figure = _figure(7, 4)
    axes = figure.subplots()
    axes.plot(rates, losses)
    axes.axvline(suggestion, color="C1", linestyle="--", label=f"suggestion {suggestion:g}")
    low, high = losses.min(), losses[0]
    axes.set(xlabel="learning rate", ylabel="training loss", xscale="log")
    axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))  # without the divergence
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, atomically; raises `DiskError` if the file cannot be written."""
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")


def figure_pixels(figure: Figure) -> numpy.ndarray:
    """Render a figure to uint8 [H, W, 3] on the host."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """An empty figure of this size in inches; closed in pyplot, so that a notebook shows the returned figure once."""
    from matplotlib import pyplot

    # For each character that its font lacks, matplotlib warns and draws a box.
    warnings.filterwarnings("ignore", message=r"Glyph \d+ ")
    figure = pyplot.figure(figsize=(width, height), layout=layout)
    pyplot.close(figure)
    return figure


def prediction_figure(image: Any, top: Sequence[tuple[str, float]]) -> Figure:
    """An image next to the probabilities of its most probable classes.

    Args:
        image: uint8 [H, W, C] with C 1 or 3; on the GPU or the host.
        top: (class name, probability), the most probable first.
    """
    figure = _figure(8, 2.8)
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    left.imshow(device.to_numpy(image).squeeze(), cmap="gray", vmin=0, vmax=255)
    left.set_axis_off()
    names, probabilities = zip(*top, strict=True)
    right.barh(range(len(names)), probabilities)
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="probability", xlim=(0, 1))
    right.invert_yaxis()
    return figure


def export_figure(measured: dict[str, dict[str, Any]]) -> Figure:
    """Size, latency and throughput of exported models as horizontal bars.

    Args:
        measured: Name to measurements, as `pipeline.evaluate.exports.recorded` returns them.
    """
    quantities = {"size_bytes": "size (KiB)", "latency_ms": "one image (ms)", "images_per_second": "images/s, batch 64"}
    figure = _figure(13, 0.5 + 0.5 * len(measured))
    panels = figure.subplots(1, len(quantities), sharey=True)
    for panel, (key, title) in zip(panels, quantities.items(), strict=True):
        values = [row[key] / (1024 if key == "size_bytes" else 1) for row in measured.values()]
        bars = panel.barh(list(measured), values)
        panel.bar_label(bars, [f"{value:,.0f}" if value >= 10 else f"{value:.2f}" for value in values], padding=3)
        panel.set_title(title)
        panel.margins(x=0.2)
    panels[0].invert_yaxis()
    return figure


def agreement_figure(answers: dict[str, numpy.ndarray]) -> Figure:
    """The fraction of images with the same top class, for each pair of models.

    Args:
        answers: Name of a model to float [N, K] probabilities of the same N images, on the host.
    """
    from sklearn.metrics import ConfusionMatrixDisplay

    choices = numpy.stack([probabilities.argmax(axis=1) for probabilities in answers.values()])
    agreement = (choices[:, None] == choices[None]).mean(axis=-1)
    figure = _figure(1.6 + len(answers), 1 + 0.8 * len(answers))
    axes = figure.add_subplot()
    display = ConfusionMatrixDisplay(agreement, display_labels=list(answers))
    limits = {"vmin": 0.9, "vmax": 1}
    display.plot(ax=axes, cmap="Blues", values_format=".1%", colorbar=False, xticks_rotation=90, im_kw=limits)
    axes.set(xlabel=None, ylabel=None)
    return figure


def disagreement_figure(
    images: Any, labels: numpy.ndarray, answers: dict[str, numpy.ndarray], class_names: Sequence[str], count: int = 6
) -> Figure:
    """The first images whose top class differs between models, each with the prediction of every model.

    Args:
        images: uint8 [N, H, W, C] with C 1 or 3; on the GPU or the host.
        labels: int [N], on the host.
        answers: Name of a model to float [N, K] probabilities, on the host.
        class_names: K names.
        count: Maximum number of images.
    """
    choices = numpy.stack([probabilities.argmax(axis=1) for probabilities in answers.values()])
    shown = numpy.flatnonzero((choices != choices[0]).any(axis=0))[:count]
    titles = []
    for index in shown:
        lines = [f"true: {class_names[labels[index]]}"]
        for name, probabilities in answers.items():
            best = probabilities[index].argmax()
            lines.append(f"{name.removeprefix('model_')}: {class_names[best]} {probabilities[index, best]:.0%}")
        titles.append("\n".join(lines))
    return image_grid(device.to_numpy(images)[shown], titles, columns=count, size=2.4)
