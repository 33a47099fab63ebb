"""The summary of a folder of images agrees with the dataset that is loaded from it."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.data import images
from pipeline.data.inspect import inspect_folder
from pipeline.data.load import load_dataset


def save(path, width=8, height=6, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), 90).save(path, **options)


def test_classes_splits_sizes_and_grey_images(tmp_path):
    for number, width in enumerate((10, 20, 70)):
        save(tmp_path / "train" / "dog" / f"{number}.png", width, 30)
    save(tmp_path / "train" / "cat" / "deep" / "0.jpg", 20, 40, "L")
    save(tmp_path / "test" / "cat" / "0.png", 20, 30, "I;16")
    (tmp_path / "train" / "cat" / "bad.png").write_bytes(b"not an image")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("ignored", encoding="utf-8")
    summary = inspect_folder(tmp_path)
    assert summary.class_names == ["cat", "dog"]
    assert summary.images_per_class == {"cat": 2, "dog": 3}
    assert summary.images_per_split == {"train": 5, "test": 1} and summary.total == 6
    assert summary.smallest_class == ("cat", 2) and summary.largest_class == ("dog", 3)
    assert summary.widths == (10, 20, 70) and summary.heights == (30, 30, 40)
    assert summary.grey_fraction == 2 / 5
    assert (summary.sampled, summary.unreadable) == (6, 1)


def test_the_summary_agrees_with_the_photos(real_data):
    folder = real_data / "photos10"
    summary, dataset = inspect_folder(folder), load_dataset("image_folder", folder, channels=3, validation_fraction=0)
    assert summary.class_names == dataset.class_names
    assert summary.images_per_split == {"train": len(dataset.train), "test": len(dataset.test)}
    assert list(summary.images_per_class.values()) == np.bincount(dataset.train.labels).tolist()
    assert summary.widths == summary.heights == (64, 64, 64)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_size_is_that_of_the_decoded_image(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"rotated.{suffix}"
    save(path, 8, 6, exif=exif)
    assert images.image_shape(path) == images.decode_image(path).shape == (8, 6, 3)


@pytest.mark.parametrize("tree", [None, [], ["a/0.png"], ["a/0.png", "b/notes.txt"], ["train/a/0.png", "test/c/0.png"]])
def test_the_errors_are_those_of_the_dataset(tmp_path, tree):
    root = tmp_path / "photos"
    for name in tree or []:
        save(root / name, format="PNG")
    if tree == []:
        root.mkdir()
    messages = []
    for function in (inspect_folder, lambda folder: load_dataset("image_folder", folder)):
        with pytest.raises(PipelineError) as info:
            function(root)
        messages.append(str(info.value))
    assert messages[0] == messages[1] and str(root) in messages[0]


def test_no_readable_image_is_an_error(tmp_path):
    for name in ("a/0.png", "b/0.png"):
        save(tmp_path / name)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(PipelineError, match=r"0\.png") as info:
        inspect_folder(tmp_path)
    assert info.value.exit_code == 1


def test_large_folders_are_sampled_over_all_classes(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    for label in range(20):
        (tmp_path / f"class{label:02}").mkdir()
        for number in range(500):
            (tmp_path / f"class{label:02}" / f"{number}.png").write_bytes(buffer.getvalue())
    read = []
    original = images.image_shape
    monkeypatch.setattr("pipeline.data.inspect.image_shape", lambda path: read.append(path) or original(path))
    start = time.perf_counter()
    summary = inspect_folder(tmp_path)
    assert time.perf_counter() - start < 2
    assert summary.total == 10_000 and summary.sampled == len(set(read)) == 500
    assert {path.parent.name for path in read} == set(summary.images_per_class)
