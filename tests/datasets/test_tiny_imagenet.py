"""Tiny ImageNet: small copies of its layout that these tests write, as a folder and as an archive, and the real one."""

import io
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core import config, device
from pipeline.core.errors import PipelineError
from pipeline.data.load import load_dataset, load_from_settings
from pipeline.data.sources import tiny_imagenet

WORDS = """n00000001\tgoldfish, Carassius auratus
n00000002\tcrane
n00000003\tcrane, hoist
n00000009\tnot among the classes
"""
IDENTIFIERS = ["n00000003", "n00000001", "n00000002", "n00000004"]
NAMES = ["goldfish", "crane", "crane, hoist", "n00000004"]  # in the order of the identifiers
COLOURS = {"n00000001": (250, 100, 20), "n00000002": (10, 200, 60), "n00000003": (30, 60, 220), "n00000004": 90}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Each test starts without a cache."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path_factory.mktemp("cache")))


def jpeg(colour) -> bytes:
    """A plain 64×64 JPEG: grey for a number, else RGB."""
    buffer = io.BytesIO()
    Image.new("L" if isinstance(colour, int) else "RGB", (64, 64), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def written(root: Path) -> Path:
    """The official layout with four classes: ten training images a class, three for validation."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "wnids.txt").write_text("\n".join(IDENTIFIERS), encoding="utf-8")
    (root / "words.txt").write_text(WORDS, encoding="utf-8")
    for identifier, colour in COLOURS.items():
        folder = root / "train" / identifier / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{identifier}_boxes.txt").write_text(f"{identifier}_0.JPEG\t0\t0\t62\t62\n", encoding="utf-8")
        for index in range(10):
            (folder / f"{identifier}_{index}.JPEG").write_bytes(jpeg(colour))
    lines = []
    (root / "val" / "images").mkdir(parents=True)
    for index in range(12):
        identifier = IDENTIFIERS[index % 4]
        (root / "val" / "images" / f"val_{index}.JPEG").write_bytes(jpeg(COLOURS[identifier]))
        lines.append(f"val_{index}.JPEG\t{identifier}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines), encoding="utf-8")
    (root / "test" / "images").mkdir(parents=True)
    (root / "test" / "images" / "test_0.JPEG").write_bytes(jpeg(0))  # without a label: not used
    return root


def zipped(folder: Path, archive: Path, inside: str = "tiny-imagenet-200/") -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, inside + path.relative_to(folder).as_posix())
    return archive


def centres(split):
    return device.to_numpy(split.images)[:, 32, 32].astype(int)


def check(dataset):
    """Every image has the colour of its class, and the splits are the official ones."""
    assert dataset.class_names == NAMES and dataset.image_shape == (64, 64, 3)
    assert [np.bincount(device.to_numpy(split.labels)).tolist() for split in dataset.splits.values()] == [
        [8] * 4,
        [2] * 4,
        [3] * 4,
    ]
    colours = np.array([np.broadcast_to(COLOURS[identifier], 3) for identifier in sorted(IDENTIFIERS)])
    for split in dataset.splits.values():
        assert np.abs(centres(split) - colours[device.to_numpy(split.labels)]).max() <= 3  # JPEG is slightly lossy


@pytest.mark.parametrize("inner", ["", "tiny-imagenet-200", "tiny-imagenet", "tiny-imagenet/tiny-imagenet-200"])
def test_the_unpacked_folder_wherever_it_is(tmp_path, inner):
    root = written(tmp_path / inner)
    before = sorted(root.rglob("*"))
    check(load_dataset("tiny_imagenet", tmp_path, validation_fraction=0.2))
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("inside", ["tiny-imagenet-200/", ""])
@pytest.mark.parametrize("name", ["tiny-imagenet-200.zip", "tiny-imagenet/tiny-imagenet-200-subset.zip"])
def test_the_archive_is_read_without_unpacking(tmp_path, tmp_path_factory, name, inside):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    archive = zipped(written(tmp_path_factory.mktemp("made")), tmp_path / name, inside)
    check(load_dataset("tiny_imagenet", tmp_path, validation_fraction=0.2))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


def test_grey_when_asked_for(tmp_path):
    dataset = load_dataset("tiny_imagenet", written(tmp_path), channels=1, image_size=32)
    assert dataset.image_shape == (32, 32, 1)
    grey = device.to_numpy(dataset.test.images)[device.to_numpy(dataset.test.labels) == 3]
    assert np.abs(grey.astype(int) - 90).max() <= 3


def test_names_are_readable_and_different():
    assert tiny_imagenet.readable_names(sorted(IDENTIFIERS), WORDS) == NAMES
    same = "n1\tmouse\nn2\tmouse\nn3\tcat, feline\n"
    assert tiny_imagenet.readable_names(["n1", "n2", "n3"], same) == ["mouse (n1)", "mouse (n2)", "cat"]


def remove(name):
    return lambda root: (root / name).unlink()


def replace(name, content):
    return lambda root: (root / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (remove("words.txt"), r"words\.txt"),
        (remove("val/val_annotations.txt"), r"val/val_annotations\.txt"),
        (replace("wnids.txt", "n00000001\nn00000002\nn00000003"), "'n00000004'"),
        (replace("wnids.txt", "\n".join([*IDENTIFIERS, "n00000005"])), "'n00000005'"),
        (lambda root: (root / "words.txt").write_bytes(b"\xff\xfe\xff"), r"words\.txt"),
    ],
)
@pytest.mark.parametrize("archived", [False, True])
def test_wrong_lists_are_named(tmp_path, tmp_path_factory, damage, word, archived):
    root = written(tmp_path_factory.mktemp("made") if archived else tmp_path)
    damage(root)
    if archived:
        zipped(root, tmp_path / "tiny-imagenet-200.zip")
    with pytest.raises(PipelineError) as caught:
        load_dataset("tiny_imagenet", tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert re.search(word, str(caught.value).replace(str(tmp_path), ""))  # the folder may contain the same number


def test_a_label_that_is_no_class_is_named(tmp_path):
    annotations = written(tmp_path) / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text(encoding="utf-8").replace("n00000004", "n00000008"))
    with pytest.raises(PipelineError, match="'n00000008'"):
        load_dataset("tiny_imagenet", tmp_path)


def test_unreadable_images_are_listed_and_left_out(tmp_path):
    root = written(tmp_path)
    (root / "val" / "images" / "val_0.JPEG").unlink()
    (root / "train" / "n00000001" / "images" / "n00000001_0.JPEG").write_bytes(b"no image")
    (root / "train" / "n00000004" / "images" / "n00000004_3.JPEG").write_bytes(jpeg(90)[:200])
    with pytest.raises(PipelineError, match="max_rejected"):
        load_dataset("tiny_imagenet", tmp_path)
    dataset = load_dataset("tiny_imagenet", tmp_path, max_rejected=0.1)
    rejected = {image.path: image.reason for image in dataset.rejected}
    assert set(rejected) == {
        "val/images/val_0.JPEG",
        "train/n00000001/images/n00000001_0.JPEG",
        "train/n00000004/images/n00000004_3.JPEG",
    }
    assert "truncated" in rejected["train/n00000004/images/n00000004_3.JPEG"]
    assert len(dataset.test) == 11


def test_a_damaged_member_of_the_archive_is_listed(tmp_path, tmp_path_factory):
    archive = zipped(written(tmp_path_factory.mktemp("made")), tmp_path / "tiny-imagenet-200.zip")
    with zipfile.ZipFile(archive) as file:
        place = file.getinfo("tiny-imagenet-200/val/images/val_1.JPEG").header_offset
    content = bytearray(archive.read_bytes())
    content[place + 200 : place + 220] = bytes(20)
    archive.write_bytes(content)
    dataset = load_dataset("tiny_imagenet", tmp_path, max_rejected=0.1)
    (rejected,) = dataset.rejected
    assert rejected.path == "val/images/val_1.JPEG" and "damaged" in rejected.reason


def test_no_archive_is_named(tmp_path):
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(b"PK but nothing else")
    with pytest.raises(PipelineError, match=r"tiny-imagenet-200\.zip"):
        load_dataset("tiny_imagenet", tmp_path)


def test_a_change_is_noticed(tmp_path):
    before = load_dataset("tiny_imagenet", written(tmp_path))
    shutil.rmtree(tmp_path / "train" / "n00000004")
    (tmp_path / "wnids.txt").write_text("\n".join(one for one in IDENTIFIERS if one != "n00000004"), encoding="utf-8")
    annotations = tmp_path / "val" / "val_annotations.txt"
    lines = annotations.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        if "n00000004" in line:
            (tmp_path / "val" / "images" / line.split("\t")[0]).unlink()
    annotations.write_text("".join(line for line in lines if "n00000004" not in line), encoding="utf-8")
    after = load_dataset("tiny_imagenet", tmp_path)
    assert after.class_names == NAMES[:3] and after.digest != before.digest


def test_downloaded_where_it_is_not_found(tmp_path, monkeypatch):
    asked = []

    def download(address, path, digest, *, progress):
        asked.append((address, path, digest))
        path.parent.mkdir(parents=True)
        return zipped(written(tmp_path / "made"), path)

    (tmp_path / "data").mkdir()
    monkeypatch.setattr(tiny_imagenet.download, "download", download)
    check(load_dataset("tiny_imagenet", tmp_path / "data", validation_fraction=0.2, progress=False))
    address = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    path = tmp_path / "data" / "tiny-imagenet" / "tiny-imagenet-200.zip"
    assert asked == [(address, path, "md5:90528d7ca1a48142e341f4ef8d21d0de")]


def test_the_configuration_fits_load(tmp_path):
    settings = config.compose(["dataset=tiny_imagenet", f"data_dir={written(tmp_path)}"]).dataset
    assert len(load_from_settings(settings).test) == 12


def test_the_real_subset(real_data):
    if not (real_data / "tiny-imagenet").is_dir():
        pytest.skip(f"no tiny-imagenet in {real_data}")
    dataset = load_dataset("tiny_imagenet", real_data, image_size=16, progress=False)  # small, to be fast
    assert len(set(dataset.class_names)) == 200
    assert {"goldfish", "Chihuahua", "espresso"} <= set(dataset.class_names)
    labels = [np.bincount(device.to_numpy(split.labels), minlength=200) for split in dataset.splits.values()]
    assert [set(counts.tolist()) for counts in labels] == [{90}, {10}, {25}] and not dataset.rejected
    # Some images are grey, so their channels are equal; most are not.
    images = device.to_numpy(dataset.test.images)
    grey = (images[..., 0] == images[..., 1]).all(axis=(1, 2)) & (images[..., 0] == images[..., 2]).all(axis=(1, 2))
    assert 0 < grey.mean() < 0.1
