"""The cuDF path compared with the pandas path: the same numbers, in device memory, without copies through the host."""

import dataclasses
import gc
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pipeline.core import device
from pipeline.data import cache, near_duplicates, statistics
from pipeline.data.load import load_dataset

pytestmark = pytest.mark.gpu

RNG = np.random.default_rng(11)

# Prints the digits as a machine without a GPU loads them, for comparison.
ON_THE_CPU = """
import hashlib, json
from pipeline.data import statistics
from pipeline.data.load import load_dataset
dataset = load_dataset("digits", limit_per_class=100, classes=["1", "2", "5", "8"], seed=3)
print(json.dumps({
    "splits": {
        name: [
            hashlib.md5(split.images.tobytes()).hexdigest(),
            split.labels.tolist(),
            split.sources.tolist(),
            [str(value) for value in statistics.content_hashes(split.images).tolist()],
        ]
        for name, split in dataset.splits.items()
    },
    "mean": dataset.mean,
    "std": dataset.std,
    "counts": statistics.counts(dataset).values.tolist(),
    "means": statistics.class_mean_images(dataset.train.images, dataset.train.labels, 4)[:, ::8, ::8, 0].tolist(),
    "table": statistics.table(dataset).values.tolist(),
}))
"""


@pytest.fixture(scope="module")
def on_the_cpu():
    environment = {**os.environ, "PIPELINE_DEVICE": "cpu"}
    answer = subprocess.run(
        [sys.executable, "-c", ON_THE_CPU], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", limit_per_class=100, classes=["1", "2", "5", "8"], seed=3)


def test_cudf_is_the_dataframe_module():
    assert device.dataframe().__name__ == "cudf"


def test_splits_filters_and_statistics_are_those_of_the_cpu(digits, on_the_cpu):
    for name, split in digits.splits.items():
        pixels, labels, sources, hashes = on_the_cpu["splits"][name]
        assert hashlib.md5(device.to_numpy(split.images).tobytes()).hexdigest() == pixels
        assert split.labels.get().tolist() == labels
        assert split.sources.to_pandas().tolist() == sources
        assert [str(value) for value in statistics.content_hashes(split.images).get().tolist()] == hashes
    assert np.allclose(digits.mean, on_the_cpu["mean"], rtol=0, atol=1e-12)
    assert np.allclose(digits.std, on_the_cpu["std"], rtol=0, atol=1e-12)


def test_tables_are_those_of_the_cpu(digits, on_the_cpu):
    assert statistics.counts(digits).to_pandas().to_numpy().tolist() == on_the_cpu["counts"]
    assert statistics.table(digits).to_pandas().to_numpy().tolist() == on_the_cpu["table"]
    means = statistics.class_mean_images(digits.train.images, digits.train.labels, 4)[:, ::8, ::8, 0]
    assert np.allclose(means.get(), on_the_cpu["means"], atol=1e-4)


def test_everything_lives_on_the_gpu(digits):
    import cupy

    for split in digits.splits.values():
        assert isinstance(split.images, cupy.ndarray) and isinstance(split.labels, cupy.ndarray)
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        assert split.images.flags.c_contiguous
        assert type(split.sources).__module__.startswith("cudf")
    assert isinstance(statistics.channel_statistics(digits.train.images)[0][0], float)


def written(path, count=3000, shape=(32, 32, 3)):
    images = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
    labels = RNG.integers(0, 10, count)
    names = [str(index) for index in range(10)]
    rows = (cache.Row("train", *row, f"image {i}") for i, row in enumerate(zip(images, labels, strict=True)))
    cache.write(path, rows, digest="d", class_names=names, rejected=[])
    return images, labels


def test_reading_is_a_view_of_what_cudf_decoded(tmp_path, monkeypatch):
    """The images are cuDF's own memory, in the file's order, and no helper that crosses the bus is called."""
    import cupy

    path = tmp_path / "cache.parquet"
    images, labels = written(path)
    header = cache.read_header(path)

    def forbidden(*_):
        raise AssertionError("an array crossed the bus")

    for name in ("to_numpy", "to_device"):
        monkeypatch.setattr(device, name, forbidden)
    monkeypatch.setattr(cache, "_read_with_pyarrow", forbidden)
    split = cache.read(path, header)["train"]
    assert isinstance(split.images.data.mem, cupy.cuda.UnownedMemory)
    assert isinstance(split.labels.data.mem, cupy.cuda.UnownedMemory)
    assert np.array_equal(split.images.get(), images)
    assert np.array_equal(split.labels.get(), labels)
    assert split.sources.iloc[2999] == "image 2999"


def test_the_view_outlives_the_frame(tmp_path):
    """Memory that cuDF allocates afterwards must not overwrite the images."""
    import cudf

    path = tmp_path / "cache.parquet"
    images, _ = written(path)
    split = cache.read(path, cache.read_header(path))["train"]
    gc.collect()
    others = [cudf.Series(np.zeros(images.size, np.uint8)) for _ in range(8)]
    assert len(others) == 8 and np.array_equal(split.images.get(), images)


def test_a_split_of_several_runs_is_joined_in_order(tmp_path, monkeypatch):
    path = tmp_path / "cache.parquet"
    monkeypatch.setattr(cache, "ROW_GROUP_BYTES", 500 * 32 * 32 * 3)
    images, labels = written(path)
    monkeypatch.setattr(cache, "LIST_LIMIT", 1000 * 32 * 32 * 3)
    split = cache.read(path, cache.read_header(path))["train"]
    assert np.array_equal(split.images.get(), images)
    assert np.array_equal(split.labels.get(), labels)
    assert split.sources.to_pandas().tolist() == [f"image {index}" for index in range(3000)]


@pytest.mark.parametrize("shape", [(7, 7, 1), (5, 3, 3)])
def test_checksums_are_those_of_the_cpu(tmp_path, shape):
    path = tmp_path / "cache.parquet"
    images, labels = written(path, count=100, shape=shape)
    split = cache.read(path, cache.read_header(path))["train"]
    assert cache.checksum(split.images, split.labels) == cache.checksum(images, labels.astype(np.int32))


def test_a_damaged_cache_is_noticed(tmp_path):
    path = tmp_path / "cache.parquet"
    written(path, count=500)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(255 - value for value in data[middle : middle + 16])
    path.write_bytes(data)
    header = cache.read_header(path)
    assert header is None or cache.read(path, header) is None


def test_duplicates_on_the_gpu(digits):
    images = digits.train.images.copy()
    images[5] = digits.test.images[2]
    images[9] = images[40]
    changed = dataclasses.replace(digits, train=dataclasses.replace(digits.train, images=images))
    known = {("train", 5), ("test", 2), ("train", 9), ("train", 40)}
    before = statistics.duplicates(digits).to_pandas()
    found = statistics.duplicates(changed).to_pandas()
    pairs = set(zip(found["split"], found["index"], strict=True))
    assert known <= pairs
    assert pairs - known <= set(zip(before["split"], before["index"], strict=True))


def test_hand_over_to_tensorflow(digits):
    tensor = device.to_tensorflow(digits.train.images)
    assert "GPU" in tensor.device
    assert np.array_equal(tensor.numpy(), digits.train.images.get())


def test_near_duplicates_are_found_on_the_gpu():
    coarse = RNG.integers(0, 200, (300, 8, 8, 3), dtype=np.uint8)
    train = np.kron(coarse, np.ones((1, 8, 8, 1), np.uint8))
    found, partners = near_duplicates.find(device.to_device(train[40:60] + np.uint8(20)), device.to_device(train))
    assert device.to_numpy(found).tolist() == list(range(20))
    assert device.to_numpy(partners).tolist() == list(range(40, 60))
    nothing, _ = near_duplicates.find(device.to_device(train[:5]), device.to_device(train[100:]))
    assert len(nothing) == 0
