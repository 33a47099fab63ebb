"""Pictures for the notebooks and reports: grids of images, bars. Each function draws, and returns the figure.

Arrays may live on the GPU; what is drawn is copied to the host.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from pipeline import device

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
