"""The figures show the data they were given."""

import io
import warnings

import numpy as np
import pytest
from matplotlib import pyplot

from pipeline.core import device
from pipeline.evaluate import figures

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_and_nothing_else(channels):
    images = RNG.integers(0, 256, (7, 4, 5, channels), dtype=np.uint8)
    figure = figures.image_grid(device.to_device(images), titles=list("abcdefg"), columns=3, row_titles=["x", "y", "z"])
    shown = [axis for axis in figure.axes if axis.images]
    assert len(figure.axes) == 9 and len(shown) == 7
    for axis, image, title in zip(shown, images, "abcdefg", strict=True):
        assert np.array_equal(np.asarray(axis.images[0].get_array()).reshape(image.shape), image)
        assert axis.get_title() == title
        assert axis.images[0].get_clim() == (0, 255)
    figure.canvas.draw()


def test_titles_overlap_neither_images_nor_each_other():
    titles = ["pomegranate 77%\nis computer keyboard", "European fire salamander 12%", "x" * 60, "cat"] * 5
    figure = figures.image_grid(np.zeros((20, 8, 8, 3), np.uint8), titles, title_colours=["red"] * 20)
    figure.savefig(io.BytesIO())  # lays it out
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    image_boxes = [axes.images[0].get_window_extent() for axes in figure.axes]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index]), figure.axes[index].get_title()
        assert not any(box.y0 < other.y1 - 1 and box.y1 > other.y0 + 1 and box.overlaps(other) for other in image_boxes)
        assert box.y1 <= figure.bbox.y1 + 1
    assert figure.axes[2].get_title().endswith("…")
    assert figure.axes[0].title.get_color() == "red"


def test_floats_are_shown_from_0_to_1():
    figure = figures.image_grid(np.array([-0.5, 0.25, 1.5]).reshape(3, 1, 1, 1))
    values = [float(axis.images[0].get_array()[0, 0]) for axis in figure.axes if axis.images]
    assert values == [0.0, 0.25, 1.0]
    assert figure.axes[0].images[0].get_clim() == (0, 1)


def test_bars_are_stacked_in_the_order_of_the_classes():
    figure = figures.class_bars(["a", "b"], {"train": device.to_device(np.array([3, 4])), "test": np.array([1, 2])})
    bars = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]
    assert bars == [(0, 3), (0, 4), (3, 1), (4, 2)]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_a_histogram_counts_every_pixel():
    images = RNG.integers(0, 256, (5000, 2, 3, 3), dtype=np.uint8)
    figure = figures.histogram(device.to_device(images))
    for channel, patch in enumerate(figure.axes[0].patches):
        expected = np.histogram(images[..., channel], bins=32, range=(0, 256))[0] / images[..., channel].size
        assert np.allclose(patch.get_data().values, expected)


def test_no_figure_stays_open():
    before = pyplot.get_fignums()
    figures.image_grid(np.zeros((1, 2, 2, 1), np.uint8))
    figures.class_bars(["a"], {"n": np.array([1])})
    figures.histogram(
        np.zeros((1, 2, 2, 1), np.uint8) if not device.has_gpu() else device.xp().zeros((1, 2, 2, 1), "u1")
    )
    assert pyplot.get_fignums() == before


def test_class_names_in_any_script_make_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.confusion_matrix_figure(np.array([0, 1]), np.array([0, 1]), ["猫", "дом"])
        figures.save_figure(tmp_path / "confusion.png", figure)
        assert figures.figure_pixels(figure).std() > 0
    assert (tmp_path / "confusion.png").stat().st_size > 1000


@pytest.mark.parametrize(("classes", "labels"), [(10, ["p, top-1"]), (200, ["p, top-1", "p, top-5"])])
def test_training_curves_show_top_5_only_for_many_classes(classes, labels):
    history = [{"val_accuracy": 0.2, "val_top5": 0.5}, {"val_accuracy": 0.3, "val_top5": 0.6}]
    (axes,) = figures.training_curves({"preset": "p", "classes": classes, "history": history}).axes
    assert [line.get_label() for line in axes.lines] == labels
    assert list(axes.lines[0].get_ydata()) == [0.2, 0.3]
