"""Every source returns the same types, and unusable input raises an error that names the cause."""

import hashlib
import http.server
import io
import json
import logging
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.core import config, device
from pipeline.core.errors import PipelineError
from pipeline.data import cache, download, images, load, source, statistics
from pipeline.data.dataset import Split
from pipeline.data.load import dataset_names, load_dataset, load_from_settings
from pipeline.data.sources import cifar10

CONFIGURATION = config.FOLDER / "dataset"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Each test starts without a cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PIPELINE_CACHE", str(folder))
    return folder


def png(value: int | tuple[int, int, int], size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    """A plain image: grey for a number, else RGB."""
    buffer = io.BytesIO()
    Image.new("L" if isinstance(value, int) else "RGB", size, value).save(buffer, kind)
    return buffer.getvalue()


def folder_of(root: Path, tree: dict[str, list[bytes]]) -> Path:
    """Write images below `root`: folder name to contents."""
    for name, contents in tree.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index, content in enumerate(contents):
            (root / name / f"{index:03}.png").write_bytes(content)
    return root


def parquet_of(path: Path, images: list, labels, image="img", label="label", metadata=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = labels if isinstance(labels, pa.Array) else pa.array(labels)
    table = pa.table({image: pa.array(images), label: labels})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def greys(*values: int) -> list[bytes]:
    return [png(value) for value in values]


def pixels_of(split) -> list[int]:
    """The first value of each image."""
    return device.to_numpy(split.images)[:, 0, 0, 0].tolist()


def labels_of(split) -> list[int]:
    return device.to_numpy(split.labels).tolist()


def everything(dataset) -> set[tuple[int, int]]:
    """(first pixel, label) of every image of every split."""
    return {pair for split in dataset.splits.values() for pair in zip(pixels_of(split), labels_of(split), strict=True)}


# digits


def test_digits_are_scikit_learns_enlarged():
    dataset = load_dataset("digits")
    reference = load_digits()
    assert dataset.class_names == [str(digit) for digit in range(10)]
    assert dataset.image_shape == (32, 32, 1) and dataset.num_classes == 10
    images = np.concatenate([device.to_numpy(split.images) for split in dataset.splits.values()])
    labels = np.concatenate([device.to_numpy(split.labels) for split in dataset.splits.values()])
    sources = np.concatenate([split.sources.to_numpy() for split in dataset.splits.values()])
    order = [int(name.split("#")[1]) for name in sources]
    assert sorted(order) == list(range(1797))
    assert np.array_equal(labels, reference.target[order])
    # Averaging blocks of 4×4 gives back the 8×8 original, but for the smoothing: compare where it is smooth.
    shrunk = images[..., 0].reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))
    original = reference.images[order] * 255 / 16
    assert np.corrcoef(shrunk.ravel(), original.ravel())[0, 1] > 0.97
    assert images.max() == 255 and images.min() == 0


def test_digits_have_a_fixed_stratified_test_split():
    first, second = load_dataset("digits", seed=0), load_dataset("digits", seed=1)
    assert list(first.test.sources.to_numpy()) == list(second.test.sources.to_numpy())
    assert list(first.validation.sources.to_numpy()) != list(second.validation.sources.to_numpy())
    expected = np.floor(np.bincount(load_digits().target) * 0.2 + 0.5)
    assert np.array_equal(np.bincount(labels_of(first.test)), expected)


def test_image_size_and_channels_are_obeyed():
    dataset = load_dataset("digits", image_size=[16, 24], channels=3)
    assert dataset.image_shape == (16, 24, 3)
    images = device.to_numpy(dataset.train.images)
    assert np.array_equal(images[..., 0], images[..., 2])
    assert len(dataset.mean) == len(dataset.std) == 3


def test_mean_and_deviation_are_those_of_the_training_split():
    dataset = load_dataset("digits", classes=["3", "7"], limit_per_class=50)
    images = device.to_numpy(dataset.train.images) / 255
    assert np.allclose(dataset.mean, images.mean(axis=(0, 1, 2)), atol=1e-12)
    assert np.allclose(dataset.std, images.std(axis=(0, 1, 2)), atol=1e-12)


def test_classes_and_limits():
    dataset = load_dataset("digits", classes=["7", "3"], limit_per_class=20, validation_fraction=0.25)
    assert dataset.class_names == ["3", "7"]
    assert [np.bincount(labels_of(split)).tolist() for split in dataset.splits.values()] == [[15, 15], [5, 5], [20, 20]]
    target = load_digits().target
    for split in dataset.splits.values():
        order = [int(name.split("#")[1]) for name in split.sources.to_numpy()]
        assert [{3: 0, 7: 1}[target[index]] for index in order] == labels_of(split)


def test_no_validation_split_when_none_is_wanted():
    dataset = load_dataset("digits", validation_fraction=0)
    assert len(dataset.validation) == 0 and len(dataset.train) + len(dataset.test) == 1797
    assert tuple(dataset.validation.images.shape[1:]) == (32, 32, 1)


# The cache


def count_decoding(monkeypatch) -> list[str]:
    """Names of the datasets that are decoded from now on."""
    decoded = []
    decode = source.decode
    monkeypatch.setattr(load, "decode", lambda *args: decoded.append(args[1].name) or decode(*args))
    return decoded


def test_the_second_load_decodes_nothing_and_gives_the_same(monkeypatch):
    decoded = count_decoding(monkeypatch)
    first, second = load_dataset("digits"), load_dataset("digits")
    assert decoded == ["digits"]
    for name, split in first.splits.items():
        other = second.splits[name]
        assert np.array_equal(device.to_numpy(split.images), device.to_numpy(other.images))
        assert labels_of(split) == labels_of(other)
        assert list(split.sources.to_numpy()) == list(other.sources.to_numpy())
    assert (first.digest, first.mean, first.std) == (second.digest, second.mean, second.std)


def test_another_size_is_another_cache_and_a_filter_is_not(monkeypatch, own_cache):
    decoded = count_decoding(monkeypatch)
    load_dataset("digits")
    load_dataset("digits", classes=["1", "2"], limit_per_class=3, seed=4, validation_fraction=0.5)
    assert len(decoded) == 1
    load_dataset("digits", image_size=16)
    assert len(decoded) == 2 and len(list((own_cache / "datasets").iterdir())) == 2


def test_a_changed_source_is_decoded_again_in_place(tmp_path, monkeypatch, own_cache):
    root = folder_of(tmp_path / "photos", {"cat": greys(1, 2, 3, 4), "dog": greys(11, 12, 13, 14)})
    decoded = count_decoding(monkeypatch)
    before = load_dataset("image_folder", root)
    (root / "cat" / "new.png").write_bytes(png(5))
    after = load_dataset("image_folder", root)
    assert len(decoded) == 2 and before.digest != after.digest
    assert everything(after) - everything(before) == {(5, 0)}
    assert len(list((own_cache / "datasets").iterdir())) == 1


def test_images_in_unsupported_formats_are_listed(tmp_path, caplog):
    root = folder_of(tmp_path / "photos", {"cat": greys(1, 2, 3, 4), "dog": greys(11, 12, 13, 14)})
    (root / "cat" / "phone.HEIC").write_bytes(b"ftypheic")
    (root / "cat" / "notes.txt").write_text("not an image", encoding="utf-8")
    with pytest.raises(PipelineError, match=r"phone\.HEIC"):
        load_dataset("image_folder", root)
    dataset = load_dataset("image_folder", root, max_rejected=0.5)
    assert dataset.class_names == ["cat", "dog"]
    assert [Path(image.path).name for image in dataset.rejected] == ["phone.HEIC"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    from pipeline.data.sources import image_folder

    root = folder_of(tmp_path / "photos", {"cat": greys(1, 2), "dog": greys(11, 12)})

    def closed(place, onerror):
        onerror(PermissionError(13, "Permission denied", str(place)))
        return iter(())

    monkeypatch.setattr(image_folder.os, "walk", closed)  # root may read everything
    with pytest.raises(PermissionError, match="photos"):
        load_dataset("image_folder", root)


def test_a_copy_has_the_same_digest_and_swapped_labels_another(tmp_path):
    tree = {"cat": greys(1, 2, 3, 4), "dog": greys(11, 12, 13, 14)}
    first = load_dataset("image_folder", folder_of(tmp_path / "first", tree))
    copy = load_dataset("image_folder", folder_of(tmp_path / "second", tree))
    swapped = load_dataset("image_folder", folder_of(tmp_path / "third", {"cat": tree["dog"], "dog": tree["cat"]}))
    assert first.digest == copy.digest != swapped.digest


def test_a_file_that_becomes_readable_is_noticed(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "photos", {"cat": greys(1, 2, 3, 4), "dog": greys(11, 12, 13, 14)})
    decoded = count_decoding(monkeypatch)
    load_dataset("image_folder", root)
    (root / "cat" / "000.png").chmod(0o600)  # size and time of writing stay
    load_dataset("image_folder", root)
    assert len(decoded) == 2


@pytest.mark.parametrize("library", [(images, "__version__"), (images.features, "version")])
def test_an_upgrade_of_the_decoder_decodes_again(tmp_path, monkeypatch, own_cache, library):
    decoded = count_decoding(monkeypatch)
    root = folder_of(tmp_path / "photos", {"cat": greys(1, 2, 3, 4), "dog": greys(11, 12, 13, 14)})
    before = load_dataset("image_folder", root)
    module, name = library
    monkeypatch.setattr(module, name, "99.0" if module is images else lambda _: "99.0")
    images.decoder_version.cache_clear()
    after = load_dataset("image_folder", root)
    images.decoder_version.cache_clear()
    assert len(decoded) == 2 and before.digest == after.digest
    assert len(list((own_cache / "datasets").iterdir())) == 1


def test_the_code_of_the_decoder_is_part_of_its_version(tmp_path, monkeypatch):
    before = images.decoder_version()
    (tmp_path / "images.py").write_bytes(Path(images.__file__).read_bytes() + b"\nchanged = True\n")
    monkeypatch.setattr(images, "__file__", str(tmp_path / "images.py"))
    assert images.decoder_version.__wrapped__() != before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_cache_is_made_again(damage, own_cache, caplog):
    before = load_dataset("digits")
    (path,) = (own_cache / "datasets").iterdir()
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        for position in range(1000, 1100):
            data[position] ^= 0xFF
    path.write_bytes({"truncated": data[:5000], "flipped": data, "emptied": b""}[damage])
    after = load_dataset("digits")
    assert np.array_equal(device.to_numpy(before.train.images), device.to_numpy(after.train.images))
    assert load_dataset("digits").digest == before.digest


def test_too_little_memory_names_a_fix(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(cache, "_read_with_pyarrow", full)
    monkeypatch.setattr(cache, "_read_with_cudf", full)
    with pytest.raises(PipelineError, match="image_size"):
        load_dataset("digits")


def test_a_cache_folder_that_is_a_file_names_the_variable(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(PipelineError, match="PIPELINE_CACHE"):
        load_dataset("digits", cache_dir=tmp_path / "file")


# image_folder


def test_class_folders_with_a_test_split_made_from_them(tmp_path):
    tree = {"dog": greys(*range(100, 110)), "cat": greys(*range(10))}
    dataset = load_dataset("image_folder", folder_of(tmp_path, tree), validation_fraction=0.25)
    assert dataset.class_names == ["cat", "dog"]
    assert [len(split) for split in dataset.splits.values()] == [12, 4, 4]
    assert everything(dataset) == {(value, 0) for value in range(10)} | {(value, 1) for value in range(100, 110)}
    assert dataset.image_shape == (8, 8, 1)


def test_train_test_and_validation_folders_are_kept_apart(tmp_path):
    tree = {
        "train/a": greys(1, 2),
        "train/b": greys(3, 4),
        "test/a": greys(5),
        "test/b": greys(6),
        "val/b": greys(7),
    }
    dataset = load_dataset("image_folder", folder_of(tmp_path, tree))
    assert sorted(pixels_of(dataset.train)) == [1, 2, 3, 4]
    assert pixels_of(dataset.validation) == [7] and labels_of(dataset.validation) == [1]
    assert pixels_of(dataset.test) == [5, 6] and labels_of(dataset.test) == [0, 1]
    assert [Path(name).name for name in dataset.test.sources.to_numpy()] == ["000.png", "000.png"]


def test_nested_folders_hidden_files_and_other_kinds(tmp_path):
    folder_of(tmp_path, {"a/deep/er": greys(1), "a": greys(2), "b": greys(3, 4), ".hidden": greys(9)})
    (tmp_path / "a" / "notes.txt").write_text("no image", encoding="utf-8")
    (tmp_path / "a" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "README.md").write_text("no class", encoding="utf-8")
    for suffix, kind in ((".JPEG", "JPEG"), (".bmp", "BMP"), (".GIF", "GIF"), (".webp", "WEBP")):
        (tmp_path / "b" / f"x{suffix}").write_bytes(png(5, kind=kind))
    dataset = load_dataset("image_folder", tmp_path, channels=1, test_fraction=0, validation_fraction=0)
    assert dataset.class_names == ["a", "b"]
    assert np.bincount(labels_of(dataset.train)).tolist() == [2, 6]


def test_different_sizes_ask_for_image_size(tmp_path):
    folder_of(tmp_path, {"a": [png(1), png(2, (10, 6))], "b": greys(3, 4)})
    with pytest.raises(PipelineError, match="image_size"):
        load_dataset("image_folder", tmp_path)
    assert load_dataset("image_folder", tmp_path, image_size=8).image_shape == (8, 8, 1)


def test_mixed_grey_and_colour_ask_for_channels(tmp_path):
    folder_of(tmp_path, {"a": [png(1), png((2, 3, 4))], "b": greys(3, 4)})
    with pytest.raises(PipelineError, match="channels"):
        load_dataset("image_folder", tmp_path)
    assert load_dataset("image_folder", tmp_path, channels=3).image_shape == (8, 8, 3)


def test_bad_images_are_listed_and_left_out(tmp_path, caplog):
    folder_of(tmp_path, {"a": [*greys(*range(98)), b"", png(7)[:50]], "b": greys(*range(100, 200))})
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset("image_folder", tmp_path)
    reasons = {Path(bad.path).name: bad.reason for bad in dataset.rejected}
    assert set(reasons) == {"098.png", "099.png"}
    assert "empty" in reasons["098.png"] and "truncated" in reasons["099.png"]
    assert sum(len(split) for split in dataset.splits.values()) == 198
    assert "098.png" in caplog.text
    assert load_dataset("image_folder", tmp_path).rejected == dataset.rejected  # from the cache as well


def test_many_bad_images_are_counted_and_listed_in_a_file(tmp_path, caplog, own_cache):
    root = folder_of(tmp_path, {"a": [*greys(*range(20)), *[b""] * 30], "b": greys(*range(100, 120))})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # as in a notebook
            dataset = load_dataset("image_folder", root, max_rejected=0.5)
    (record,) = caplog.records
    message = record.getMessage()
    (listed,) = (own_cache / "datasets").glob("*.txt")
    assert "30 of 70" in message and str(listed) in message
    assert message.count(".png") == 10
    lines = listed.read_text(encoding="utf-8").splitlines()
    assert [line.split(": ")[0] for line in lines] == [bad.path for bad in dataset.rejected]
    with pytest.raises(PipelineError, match="max_rejected") as info:
        load_dataset("image_folder", root)
    assert str(info.value).count(".png") == 10 and str(listed) in str(info.value)
    for line in lines:
        Path(line.split(": ")[0]).unlink()
    load_dataset("image_folder", root)
    assert not listed.exists()


def test_too_many_bad_images_stop_the_load(tmp_path):
    folder_of(tmp_path, {"a": [*greys(*range(9)), b"broken"], "b": greys(*range(100, 110))})
    with pytest.raises(PipelineError, match=r"009\.png") as info:
        load_dataset("image_folder", tmp_path)
    assert info.value.exit_code == 1
    assert len(load_dataset("image_folder", tmp_path, max_rejected=0.05).rejected) == 1
    with pytest.raises(PipelineError, match="max_rejected"):  # the cache does not hide it
        load_dataset("image_folder", tmp_path)


def test_a_class_of_bad_images_only(tmp_path):
    folder_of(tmp_path, {"a": greys(1, 2), "b": [b"", b""]})
    with pytest.raises(PipelineError, match="'b'"):
        load_dataset("image_folder", tmp_path, max_rejected=1)


def test_bad_images_only(tmp_path):
    folder_of(tmp_path, {"a": [b""], "b": [b""]})
    with pytest.raises(PipelineError, match=r"000\.png"):
        load_dataset("image_folder", tmp_path)


@pytest.mark.parametrize(
    "tree, word",
    [
        ({}, "{root}"),
        ({"a": [png(1)]}, "'a'"),
        ({"a": [png(1)], "b": []}, "'b'"),
        ({"train/a": [png(1)], "train/b": [png(1)], "test/c": [png(1)]}, "{root}/test/c"),
        ({"train/a": [png(1)], "train/b": [png(1)], "test": [png(1)]}, "{root}/test"),
        ({"train": [png(1)], "test": [png(1)]}, "{root}/train"),
        ({"train/a": [png(1)], "train/b": [png(1)], "cat": [png(1)], "dog": [png(1)]}, "cat, dog"),
    ],
)
def test_unusable_folders_say_why(tmp_path, tree, word):
    folder_of(tmp_path, tree)
    with pytest.raises(PipelineError) as info:
        load_dataset("image_folder", tmp_path)
    assert word.format(root=tmp_path) in str(info.value)


def test_folders_without_images_next_to_train_are_ignored(tmp_path):
    folder_of(tmp_path, {"train/a": greys(1, 2), "train/b": greys(3, 4), "labels": []})
    assert load_dataset("image_folder", tmp_path).class_names == ["a", "b"]


def test_a_class_may_be_called_train(tmp_path):
    dataset = load_dataset("image_folder", folder_of(tmp_path, {"train": greys(1, 2), "plane": greys(3, 4)}))
    assert dataset.class_names == ["plane", "train"]


def test_a_class_name_may_be_any_text(tmp_path):
    dataset = load_dataset("image_folder", folder_of(tmp_path, {"chat noir": greys(1, 2), "Schäfer": greys(3, 4)}))
    assert dataset.class_names == ["Schäfer", "chat noir"]


# parquet

HUGGING_FACE = {
    "huggingface": json.dumps({"info": {"features": {"label": {"names": ["x", "y"], "_type": "ClassLabel"}}}})
}


def test_a_single_file_with_integers(tmp_path):
    path = parquet_of(tmp_path / "all.parquet", greys(*range(20)), [5, 9] * 10, image="image", label="labels")
    dataset = load_dataset("parquet", path)
    assert dataset.class_names == ["5", "9"]
    assert everything(dataset) == {(value, value % 2) for value in range(20)}
    assert len(dataset.test) == 4
    assert dataset.train.sources.iloc[0].startswith("all.parquet#")


def test_a_folder_of_splits_with_structs_and_names_in_the_metadata(tmp_path):
    def structs(*values):
        return [{"bytes": png(value), "path": f"{value}.png"} for value in values]

    parquet_of(tmp_path / "data/train-00000-of-00002.parquet", structs(1, 2), [0, 1], metadata=HUGGING_FACE)
    parquet_of(tmp_path / "data/train-00001-of-00002.parquet", structs(3, 4), [0, 1], metadata=HUGGING_FACE)
    parquet_of(tmp_path / "data/validation-00000-of-00001.parquet", structs(5), [1], metadata=HUGGING_FACE)
    parquet_of(tmp_path / "data/test-00000-of-00001.parquet", structs(6, 7), [1, 0], metadata=HUGGING_FACE)
    dataset = load_dataset("parquet", tmp_path)
    assert dataset.class_names == ["x", "y"]
    assert [pixels_of(split) for split in dataset.splits.values()] == [[1, 2, 3, 4], [5], [6, 7]]
    assert [labels_of(split) for split in dataset.splits.values()] == [[0, 1, 0, 1], [1], [1, 0]]
    assert list(dataset.test.sources.to_numpy()) == ["6.png", "7.png"]


def test_texts_as_labels(tmp_path):
    labels = pa.array(["b", "a", "b", "a"]).dictionary_encode()
    dataset = load_dataset("parquet", parquet_of(tmp_path / "x.parquet", greys(1, 2, 3, 4), labels))
    assert dataset.class_names == ["a", "b"]
    assert everything(dataset) == {(1, 1), (2, 0), (3, 1), (4, 0)}


def test_class_names_as_an_argument(tmp_path):
    path = parquet_of(tmp_path / "x.parquet", greys(1, 2, 3, 4), [0, 1, 0, 1])
    assert load_dataset("parquet", path, class_names=["no", "yes"]).class_names == ["no", "yes"]
    assert load_dataset("parquet", path, class_names=["low", "high"]).class_names == ["low", "high"]


def test_a_row_without_an_image_is_rejected(tmp_path):
    path = parquet_of(tmp_path / "x.parquet", [*greys(*range(5)), None], [0, 1] * 3)
    dataset = load_dataset("parquet", path, max_rejected=0.5)
    assert [bad.path for bad in dataset.rejected] == ["x.parquet#5"]


@pytest.mark.parametrize(
    "images, labels, options, word",
    [
        (greys(1, 2), [0, 5], {"class_names": ["a", "b"]}, "5"),
        (greys(1, 2), [0, -1], {"class_names": ["a", "b"]}, "-1"),
        (greys(1, 2), [3, 3], {}, "'3'"),
        (greys(1, 2), [0, 1], {"class_names": ["a", "b", "c"]}, "'c'"),
        (greys(1, 2), [0, 1], {"class_names": ["a", "a"]}, "'a'"),
        (greys(1, 2), [0, 1], {"class_names": "ab"}, "'ab'"),
        (greys(1, 2), ["a", "z"], {"class_names": ["a", "b"]}, "'z'"),
        (greys(1, 2), [0, None], {}, "1"),
        (greys(1, 2), [0.5, 1.5], {}, "double"),
        ([1, 2], [0, 1], {}, "int64"),
        ([], pa.array([], pa.int64()), {}, "x.parquet"),
        ([], pa.array([], pa.int64()), {"class_names": ["a", "b"]}, "train"),
    ],
)
def test_unusable_parquet_says_why(tmp_path, images, labels, options, word):
    path = parquet_of(tmp_path / "x.parquet", images, labels)
    with pytest.raises(PipelineError) as info:
        load_dataset("parquet", path, **options)
    assert word in str(info.value).replace(str(tmp_path), "")  # the folder may contain the same number


def parquet_of_structs(path: Path, kind: pa.DataType, values: list, names: object = None, where: object = "x") -> Path:
    images = [{"bytes": value, "path": where} for value in values]
    inner = pa.string() if isinstance(where, str) else pa.int64()
    column = pa.array(images, pa.struct([("bytes", kind), ("path", inner)]))
    table = pa.table({"image": column, "label": [0, 1] * (len(values) // 2)})
    if names is not None:
        features = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path / "train.parquet")
    return path


def test_texts_in_a_struct_are_no_images_and_no_files_to_open(tmp_path):
    own_file = tmp_path / "own.png"
    own_file.write_bytes(png(3))
    parquet_of_structs(tmp_path, pa.string(), [str(own_file)] * 20)
    with pytest.raises(PipelineError, match="struct<bytes: string"):
        load_dataset("parquet", tmp_path)


@pytest.mark.parametrize("names", [5, {"a": "b"}, [1, 2], {"0": "zero", "1": "one"}])
def test_odd_class_names_in_the_metadata_stop_nothing(tmp_path, names):
    parquet_of_structs(tmp_path, pa.binary(), [png(value) for value in range(40)], names, where=7)
    expected = {list: ["1", "2"], dict: ["zero", "one"]}.get(type(names), ["0", "1"])
    found = load_dataset("parquet", tmp_path).class_names
    assert found == (["0", "1"] if names == {"a": "b"} else expected)


def test_labels_too_large_for_any_class_are_refused(tmp_path):
    table = pa.table({"image": [png(value) for value in range(4)], "label": pa.array([2**63 + 5] * 4, pa.uint64())})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(PipelineError, match=r"train\.parquet"):
        load_dataset("parquet", tmp_path)


def test_a_file_whose_name_is_no_text_is_loaded_like_any_other(tmp_path):
    folder_of(tmp_path, {"a": greys(*range(20)), "b": greys(*range(100, 120))})
    name = os.fsdecode(b"\xff.png")
    (tmp_path / "a" / name).write_bytes(png(99))
    splits = load_dataset("image_folder", tmp_path).splits.values()
    assert sum(len(split) for split in splits) == 41
    assert any(source.endswith("\\udcff.png") for split in splits for source in split.sources.to_numpy())


@pytest.mark.parametrize(
    "setting, word",
    [
        ("+dataset.foo=3", "foo"),
        ("dataset.image_size=3000000000", "image_size"),
        ("dataset.image_size=[.inf,3]", "image_size"),
    ],
)
def test_unknown_and_wrong_settings_are_named(setting, word):
    with pytest.raises(PipelineError, match=word):
        load_from_settings(config.compose([setting]).dataset)


def test_no_training_file(tmp_path):
    parquet_of(tmp_path / "test.parquet", greys(1, 2), [0, 1])
    with pytest.raises(PipelineError, match="training"):
        load_dataset("parquet", tmp_path)


def test_missing_columns_are_named(tmp_path):
    path = parquet_of(tmp_path / "x.parquet", greys(1), [0], image="picture", label="class")
    with pytest.raises(PipelineError, match="'label'"):
        load_dataset("parquet", path)
    path = parquet_of(tmp_path / "y.parquet", greys(1, 2), [0, 1], image="picture")
    with pytest.raises(PipelineError, match="'img'"):
        load_dataset("parquet", path)


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(PipelineError, match=r"x\.parquet"):
        load_dataset("parquet", tmp_path)


def test_files_of_no_split_among_others(tmp_path):
    parquet_of(tmp_path / "train.parquet", greys(1, 2), [0, 1])
    parquet_of(tmp_path / "extra.parquet", greys(1, 2), [0, 1])
    with pytest.raises(PipelineError, match=r"extra\.parquet"):
        load_dataset("parquet", tmp_path)


def test_an_empty_folder_and_none(tmp_path):
    with pytest.raises(PipelineError, match=r"\.parquet"):
        load_dataset("parquet", tmp_path)
    for name in ("parquet", "image_folder"):
        with pytest.raises(PipelineError, match="data_dir"):
            load_dataset(name)
        with pytest.raises(PipelineError, match="/missing"):
            load_dataset(name, tmp_path / "missing")


# cifar10


def binary_archive(path: Path, count: int = 20) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Write an archive of the official layout with `count` random images a file; returns what is in it."""
    generator = np.random.default_rng(0)
    contents = {}
    with tarfile.open(path, "w:gz") as archive:
        for name in [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]:
            images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            contents[name] = list(zip([index % 10 for index in range(count)], images, strict=True))
            # The official order: the label, then all red values row by row, then green, then blue.
            data = b"".join(
                bytes([label]) + b"".join(image[:, :, channel].tobytes() for channel in range(3))
                for label, image in contents[name]
            )
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return contents


def md5_of(path: Path) -> str:
    return "md5:" + hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("inside", ["", "cifar10"])
def test_the_official_binary_archive(tmp_path, monkeypatch, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    path = tmp_path / inside / cifar10.ARCHIVE
    contents = binary_archive(path)
    monkeypatch.setattr(cifar10, "DIGEST", md5_of(path))
    dataset = load_dataset("cifar10", tmp_path)
    assert [len(split) for split in dataset.splits.values()] == [90, 10, 20]
    assert dataset.class_names[0] == "airplane" and dataset.class_names[9] == "truck"
    for split in dataset.splits.values():
        images = device.to_numpy(split.images)
        for image, label, name in zip(images, labels_of(split), split.sources.to_numpy(), strict=True):
            file, index = name.split("#")
            assert contents[file][int(index)][0] == label
            assert np.array_equal(contents[file][int(index)][1], image)


def test_nothing_is_unpacked_and_a_changed_archive_is_refused(tmp_path, monkeypatch, own_cache):
    path = tmp_path / cifar10.ARCHIVE
    binary_archive(path)
    monkeypatch.setattr(cifar10, "DIGEST", md5_of(path))
    load_dataset("cifar10", tmp_path)
    assert [path.suffix for path in own_cache.rglob("*") if path.is_file()] == [".parquet"]
    binary_archive(path, count=10)
    with pytest.raises(PipelineError, match="md5"):
        load_dataset("cifar10", tmp_path)


def test_an_archive_of_another_digest_is_refused(tmp_path):
    binary_archive(tmp_path / cifar10.ARCHIVE, count=1)
    with pytest.raises(PipelineError, match="c32a1d"):
        load_dataset("cifar10", tmp_path)


def test_parquet_is_preferred_to_the_archive(tmp_path, monkeypatch):
    binary_archive(tmp_path / cifar10.ARCHIVE, count=1)
    images = [png((value, 0, 0), (32, 32)) for value in range(20)]
    parquet_of(tmp_path / "cifar10/train.parquet", images, list(range(10)) * 2)
    parquet_of(tmp_path / "cifar10/test.parquet", images[:10], list(range(10)))
    dataset = load_dataset("cifar10", tmp_path)
    assert len(dataset.test) == 10 and dataset.class_names == cifar10.CLASS_NAMES
    assert load_dataset("cifar10", tmp_path / "cifar10").digest == dataset.digest


def test_cifar10_of_the_real_data(real_data):
    """5,000 training and 1,000 test images of each class; a sample compared with Pillow's own decoding."""
    dataset = load_dataset("cifar10", real_data, progress=False)
    counts = statistics.counts(dataset)
    counts = counts.to_pandas() if hasattr(counts, "to_pandas") else counts
    assert (counts[["train", "validation", "test"]] == [4500, 500, 1000]).all(axis=None)
    # The published statistics of CIFAR-10 (0.4914, 0.4822, 0.4465), on JPEG copies and nine tenths of the images.
    assert np.allclose(dataset.mean, (0.4914, 0.4822, 0.4465), atol=2e-3)
    assert np.allclose(dataset.std, (0.2470, 0.2435, 0.2616), atol=4e-3)
    table = pq.read_table(real_data / "cifar10" / "test.parquet").slice(0, 200).to_pylist()
    for index, row in enumerate(table):
        expected = np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB"))
        assert np.array_equal(device.to_numpy(dataset.test.images[index]), expected)
        assert int(dataset.test.labels[index]) == row["label"]


# Downloads


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda _: None)


@pytest.fixture
def server(no_waiting):
    """A web server: what is put into `pages` is served; a page ending early declares more than it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content, declared = self.server.pages.get(self.path, (None, 0))
            if content is None:
                self.send_error(404)
                return
            if content in (b"silence", b"noise"):
                self.wfile.write(b"" if content == b"silence" else b"what?\r\n\r\n")
                self.close_connection = True
                return
            self.send_response(200)
            self.send_header("Content-Length", str(declared))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.pages = {}
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_cifar10_is_downloaded_where_it_is_not_found(tmp_path, server, monkeypatch, own_cache):
    binary_archive(tmp_path / "official.tar.gz")
    content = (tmp_path / "official.tar.gz").read_bytes()
    server.pages["/cifar"] = (content, len(content))
    monkeypatch.setattr(cifar10, "ADDRESS", f"http://127.0.0.1:{server.server_port}/cifar")
    monkeypatch.setattr(cifar10, "DIGEST", md5_of(tmp_path / "official.tar.gz"))
    assert len(load_dataset("cifar10").test) == 20
    assert (own_cache / "downloads" / "cifar10" / cifar10.ARCHIVE).read_bytes() == content
    server.pages.clear()
    assert len(load_dataset("cifar10", limit_per_class=1).test) == 10  # not downloaded twice


@pytest.mark.parametrize(
    "page, word",
    [
        (None, "data_dir"),
        ((b"other", 5), "md5"),
        ((b"half", 8), "data_dir"),
        ((b"silence", 0), "data_dir"),
        ((b"noise", 0), "data_dir"),
    ],
)
def test_a_failed_download_leaves_nothing(tmp_path, server, page, word):
    if page:
        server.pages["/x"] = page
    address = f"http://127.0.0.1:{server.server_port}/x"
    with pytest.raises(PipelineError, match=word):
        download.download(address, tmp_path / "folder" / "x", "md5:" + hashlib.md5(b"halfhalf").hexdigest())
    assert list((tmp_path / "folder").iterdir()) == []


def test_no_connection_says_where_to_put_the_file(tmp_path, no_waiting):
    with pytest.raises(PipelineError, match=str(tmp_path / "x")) as info:
        download.download("http://127.0.0.1:9/x", tmp_path / "x", "md5:0")
    assert info.value.exit_code == 1


def test_an_existing_download_is_verified(tmp_path):
    (tmp_path / "x").write_bytes(b"half")
    with pytest.raises(PipelineError, match="md5"):
        download.download("http://127.0.0.1:9/x", tmp_path / "x", "md5:" + hashlib.md5(b"halfhalf").hexdigest())
    good = "sha256:" + hashlib.sha256(b"half").hexdigest()
    assert download.download("http://127.0.0.1:9/x", tmp_path / "x", good) == tmp_path / "x"


def test_a_download_is_tried_again(tmp_path, server):
    pages = [None, (b"whole", 9), (b"whole", 5)]

    class Changing(dict):
        def get(self, *_):
            return pages.pop(0) or (None, 0)

    server.pages = Changing()
    address = f"http://127.0.0.1:{server.server_port}/x"
    path = download.download(address, tmp_path / "x", "md5:" + hashlib.md5(b"whole").hexdigest())
    assert path.read_bytes() == b"whole" and pages == []


# Arguments and configuration


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"name": "mnist"}, "'mnist'"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": "big"}, "'big'"),
        ({"image_size": [1, 2, 3]}, "[1, 2, 3]"),
        ({"image_size": 7.5}, "7.5"),
        ({"channels": 4}, "channels"),
        ({"class_names": ["a"]}, "class_names"),
        ({"classes": ["1"]}, "['1']"),
        ({"classes": "12"}, "'12'"),
        ({"classes": ["1", "eleven"]}, "'eleven'"),
        ({"limit_per_class": 0}, "limit_per_class"),
        ({"validation_fraction": 1}, "validation_fraction"),
        ({"test_fraction": -1}, "test_fraction"),
        ({"max_rejected": 2}, "max_rejected"),
    ],
)
def test_wrong_arguments_are_named(arguments, word):
    with pytest.raises(PipelineError) as info:
        load_dataset(**{"name": "digits", **arguments})
    assert word in str(info.value)


@pytest.mark.parametrize("path", sorted(CONFIGURATION.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_dataset_has_a_configuration_that_load_takes(path):
    import inspect

    settings = OmegaConf.load(path)
    settings.pop("defaults", None)  # selects the augmentation
    parameters = inspect.signature(load_dataset).parameters
    assert settings.name == path.stem and set(settings) <= set(parameters)
    for key, value in settings.items():
        if key not in ("name", "data_dir"):
            assert value == parameters[key].default, key


def test_a_configuration_for_every_dataset():
    assert {path.stem for path in CONFIGURATION.glob("*.yaml")} == set(dataset_names())


def test_lists_of_the_configuration_are_taken():
    dataset = load_from_settings(config.compose(["dataset.classes=[1,2]", "dataset.image_size=[8,16]"]).dataset)
    assert dataset.class_names == ["1", "2"] and dataset.image_shape == (8, 16, 1)


def test_arrays_live_where_the_pipeline_computes():
    dataset = load_dataset("digits")
    for split in dataset.splits.values():
        assert isinstance(split.images, device.xp().ndarray) and isinstance(split.labels, device.xp().ndarray)
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
    assert isinstance(dataset.train, Split)
