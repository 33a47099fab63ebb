"""The Parquet cache, and the statistics and selections of a dataset."""

import errno
import time
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.data import cache, statistics
from pipeline.data.dataset import Dataset, Rejected, Split

RNG = np.random.default_rng(3)


def rows(split: str, count: int, shape=(6, 5, 3), classes: int = 3) -> list[cache.Row]:
    images = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
    return [cache.Row(split, image, RNG.integers(0, classes), f"{split}/{i}") for i, image in enumerate(images)]


def write(path, rows, digest="d", rejected=()):
    cache.write(path, rows, digest=digest, class_names=["a", "b", "c"], rejected=list(rejected))


@pytest.mark.parametrize("shape", [(6, 5, 3), (32, 32, 1), (7, 7, 1), (1, 1, 3)])
def test_what_is_written_comes_back(tmp_path, shape):
    written = [*rows("train", 45, shape), *rows("validation", 1, shape), *rows("test", 9, shape)]
    path = tmp_path / "cache.parquet"
    write(path, written, rejected=[Rejected("bad.png", "truncated")])
    header = cache.read_header(path)
    assert (header.digest, header.class_names, header.image_shape) == ("d", ["a", "b", "c"], shape)
    assert header.rejected == [Rejected("bad.png", "truncated")]
    splits = cache.read(path, header)
    assert list(splits) == ["train", "validation", "test"]
    for name, split in splits.items():
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        assert split.images.flags.c_contiguous
        expected = [row for row in written if row.split == name]
        assert np.array_equal(device.to_numpy(split.images), [row.image for row in expected])
        assert device.to_numpy(split.labels).tolist() == [row.label for row in expected]
        assert list(split.sources.to_numpy()) == [row.source for row in expected]


def test_the_file_is_the_promised_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "ROW_GROUP_BYTES", 10 * 90)
    path = tmp_path / "cache.parquet"
    write(path, [*rows("train", 32), *rows("test", 4)])
    metadata, schema = pq.read_metadata(path), pq.read_schema(path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [10, 10, 10, 2, 4]
    assert {metadata.row_group(0).column(i).compression for i in range(3)} == {"ZSTD"}
    assert schema.names == ["pixels", "label", "source"]
    assert [str(schema.field(name).type) for name in ("label", "source")] == ["int32", "string"]
    assert str(schema.field("pixels").type.value_type) == "uint8"
    header = cache.read_header(path)
    assert header.row_groups == ["train"] * 4 + ["test"]
    assert len(cache.read(path, header)["train"]) == 32


def test_row_groups_stay_below_64_mebibytes(tmp_path):
    path = tmp_path / "cache.parquet"
    write(path, rows("train", 5000, (64, 64, 3)))
    metadata = pq.read_metadata(path)
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    assert len(sizes) > 1 and max(sizes) < 64 * 2**20


def test_splits_too_large_for_one_cudf_column_are_read_in_runs(monkeypatch):
    monkeypatch.setattr(cache, "LIST_LIMIT", 100)
    header = cache.Header(cache.FORMAT, "d", [], (2, 5, 1), ["train"] * 5, [4, 6, 3, 20, 1], {}, "", [])
    # 40 + 60 values fit, then 30, then 200 alone although too large, then 10.
    assert list(cache._chunks([0, 1, 2, 3, 4], header)) == [[0, 1], [2], [3], [4]]


def test_a_missing_or_foreign_file_is_no_cache(tmp_path):
    assert cache.read_header(tmp_path / "missing.parquet") is None
    (tmp_path / "text.parquet").write_text("no Parquet", encoding="utf-8")
    assert cache.read_header(tmp_path / "text.parquet") is None
    pq.write_table(pa.table({"label": [1]}), tmp_path / "foreign.parquet")
    assert cache.read_header(tmp_path / "foreign.parquet") is None


def test_another_format_version_is_no_cache(tmp_path, monkeypatch):
    path = tmp_path / "cache.parquet"
    write(path, rows("train", 3))
    assert cache.read_header(path) is not None
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert cache.read_header(path) is None


@pytest.mark.parametrize("where", [0.1, 0.3, 0.5])
def test_a_damaged_cache_is_noticed(tmp_path, where):
    path = tmp_path / "cache.parquet"
    write(path, rows("train", 200))
    data = bytearray(path.read_bytes())
    position = int(len(data) * where)
    data[position : position + 4] = bytes(255 - value for value in data[position : position + 4])
    path.write_bytes(data)
    header = cache.read_header(path)
    assert header is None or cache.read(path, header) is None


def test_a_truncated_cache_is_noticed(tmp_path):
    path = tmp_path / "cache.parquet"
    write(path, rows("train", 200))
    path.write_bytes(path.read_bytes()[:-100])
    assert cache.read_header(path) is None


class CudaError(RuntimeError):
    """As raised by CuPy, and by cuDF also for a damaged file."""


@pytest.fixture
def failing_cudf(monkeypatch):
    """cuDF, which raises a RuntimeError whatever it reads."""

    def fail(*_):
        raise CudaError("cudaErrorIllegalAddress")

    monkeypatch.setattr(device, "dataframe", lambda: types.SimpleNamespace(__name__="cudf"))
    monkeypatch.setattr(cache, "_read_with_cudf", fail)


def test_a_cuda_error_is_not_taken_for_a_damaged_file(tmp_path, failing_cudf):
    path = tmp_path / "cache.parquet"
    write(path, rows("train", 200))
    with pytest.raises(CudaError):
        cache.read(path, cache.read_header(path))


def test_a_damaged_file_is_told_from_a_cuda_error(tmp_path, failing_cudf):
    path = tmp_path / "cache.parquet"
    write(path, rows("train", 200))
    header = cache.read_header(path)
    data = bytearray(path.read_bytes())
    data[1000:1100] = bytes(100)
    path.write_bytes(data)
    assert cache.read(path, header) is None


@pytest.mark.parametrize("error", [MemoryError, pa.ArrowMemoryError, AssertionError])
def test_only_a_damaged_file_is_taken_for_one(tmp_path, monkeypatch, error):
    path = tmp_path / "cache.parquet"
    write(path, rows("train", 3))

    def fail(*_):
        raise error

    for name in ("_read_with_cudf", "_read_with_pyarrow"):
        monkeypatch.setattr(cache, name, fail)
    with pytest.raises(error):
        cache.read(path, cache.read_header(path))


def test_no_image_at_all_leaves_no_file(tmp_path):
    with pytest.raises(PipelineError, match=r"x\.png"):
        write(tmp_path / "cache.parquet", [], rejected=[Rejected("x.png", "empty")])
    assert list(tmp_path.iterdir()) == []


def test_an_error_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "cache.parquet"
    write(path, rows("train", 3), digest="old")

    def failing():
        yield from rows("train", 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, failing(), digest="new")
    assert cache.read_header(path).digest == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["cache.parquet"]


def test_a_full_disk_names_a_fix(tmp_path, monkeypatch):
    """The disk is full from the second row group on."""
    path = tmp_path / "cache.parquet"

    def filling():
        yield from rows("train", 3)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(PipelineError, match="PIPELINE_CACHE") as info:
        write(path, filling())
    assert info.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


# The dataframe work


def data_set(train, test=None, validation=None, names=("a", "b", "c")) -> Dataset:
    def split(pair):
        images, labels = pair if pair is not None else (np.zeros((0, *train[0].shape[1:]), np.uint8), [])
        sources = device.dataframe().Series([f"image {i}" for i in range(len(images))], dtype="str")
        return Split(device.to_device(images), device.to_device(np.asarray(labels, np.int32)), sources)

    mean, std = statistics.channel_statistics(device.to_device(train[0]))
    return Dataset("x", list(names), split(train), split(validation), split(test), mean, std, "d", [])


def pandas(frame):
    return frame.to_pandas() if hasattr(frame, "to_pandas") else frame


def test_counts_a_class_and_split():
    labels = [0, 0, 0, 2, 1]
    images = RNG.integers(0, 256, (5, 2, 2, 3), dtype=np.uint8)
    counts = pandas(statistics.counts(data_set((images, labels), test=(images[:2], [2, 2]))))
    assert counts.to_dict("list") == {
        "class_name": ["a", "b", "c"],
        "train": [3, 1, 1],
        "validation": [0, 0, 0],
        "test": [0, 0, 2],
        "total": [3, 1, 3],
    }


def test_the_table_has_one_row_an_image():
    images = RNG.integers(0, 256, (3, 2, 2, 1), dtype=np.uint8)
    table = pandas(statistics.table(data_set((images, [2, 0, 1]), test=(images[:1], [1]))))
    assert table["split"].tolist() == ["train", "train", "train", "test"]
    assert table["index"].tolist() == [0, 1, 2, 0]
    assert table["class_name"].tolist() == ["c", "a", "b", "b"]
    assert table["source"].tolist() == ["image 0", "image 1", "image 2", "image 0"]


def test_a_stratified_split_takes_its_share_of_every_class():
    labels = device.to_device(np.repeat(np.arange(4, dtype=np.int32), [100, 10, 2, 1]))
    kept, held_out = (device.to_numpy(part) for part in statistics.stratified_split(labels, 0.25, seed=1))
    assert np.array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(113))
    # 25 of 100; 2.5 of 10 is rounded up; one of two; none where there is one only.
    assert np.bincount(device.to_numpy(labels)[held_out], minlength=4).tolist() == [25, 3, 1, 0]
    again = device.to_numpy(statistics.stratified_split(labels, 0.25, seed=1)[1])
    other = device.to_numpy(statistics.stratified_split(labels, 0.25, seed=2)[1])
    assert np.array_equal(held_out, again) and not np.array_equal(held_out, other)


def test_the_held_out_images_are_spread_evenly():
    labels = device.to_device(np.zeros(20_000, np.int32))
    held_out = device.to_numpy(statistics.stratified_split(labels, 0.5, seed=5)[1])
    in_tenths = np.histogram(held_out, bins=10, range=(0, 20_000))[0]
    # Each tenth holds 1,000 ± 4.5 standard deviations of a hypergeometric draw (22).
    assert np.abs(in_tenths - 1000).max() < 100
    chosen = np.isin(np.arange(20_000), held_out)
    assert abs(np.corrcoef(chosen[:-1], chosen[1:])[0, 1]) < 0.05


def test_a_smaller_limit_chooses_a_subset():
    labels = device.to_device(np.repeat(np.arange(3, dtype=np.int32), [50, 5, 20]))
    ten = device.to_numpy(statistics.limit_per_class(labels, 10, seed=0))
    four = device.to_numpy(statistics.limit_per_class(labels, 4, seed=0))
    assert np.bincount(device.to_numpy(labels)[ten]).tolist() == [10, 5, 10]
    assert np.bincount(device.to_numpy(labels)[four]).tolist() == [4, 4, 4]
    assert set(four) <= set(ten)


def test_select_classes_numbers_anew():
    labels = device.to_device(np.array([3, 1, 0, 1, 2], np.int32))
    indices, renumbered, names = statistics.select_classes(labels, ["a", "b", "c", "d"], ["d", "b"])
    assert device.to_numpy(indices).tolist() == [0, 1, 3]
    assert device.to_numpy(renumbered).tolist() == [1, 0, 0]
    assert names == ["b", "d"]
    with pytest.raises(PipelineError, match="'e'"):
        statistics.select_classes(labels, ["a", "b"], ["e"])


@pytest.mark.parametrize("shape", [(4, 4, 3), (3, 3, 1)])
def test_duplicates_within_and_across_splits(shape):
    train = RNG.integers(0, 256, (50, *shape), dtype=np.uint8)
    test = RNG.integers(0, 256, (10, *shape), dtype=np.uint8)
    train[7] = train[31]
    test[4] = train[31]
    test[2] = train[0]
    labels = np.arange(50) % 3
    found = pandas(statistics.duplicates(data_set((train, labels), test=(test, labels[:10]))))
    groups = {frozenset(zip(part["split"], part["index"], strict=True)) for _, part in found.groupby("group")}
    assert groups == {
        frozenset({("train", 7), ("train", 31), ("test", 4)}),
        frozenset({("train", 0), ("test", 2)}),
    }
    assert sorted(found["group"].unique()) == [0, 1]


def test_no_duplicates_is_an_empty_table():
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    assert len(statistics.duplicates(data_set((images, [0, 1, 2])))) == 0


def test_images_that_differ_a_little_hash_differently():
    """Also where two pixels change by the same amount, which a plain sum would not see."""
    images = np.zeros((4, 4, 4, 3), np.uint8)
    images[1, 0, 0, 0] = 1
    images[2, 0, 0, 0], images[2, 3, 0, 1] = 128, 128
    images[3, 1, 0, 0], images[3, 2, 0, 0] = 128, 128
    hashes = device.to_numpy(statistics.content_hashes(device.to_device(images)))
    assert hashes.dtype == np.uint64 and len(set(hashes.tolist())) == 4


@pytest.mark.parametrize("shape", [(600, 8, 8, 3), (1, 5, 4, 1), (257, 3, 3, 3)])
def test_mean_and_deviation_are_numpys(shape):
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    mean, std = statistics.channel_statistics(device.to_device(images))
    assert np.allclose(mean, (images / 255).mean(axis=(0, 1, 2)), atol=1e-12)
    assert np.allclose(std, (images / 255).std(axis=(0, 1, 2)), atol=1e-12)


def test_sums_of_white_images_stay_exact():
    mean, std = statistics.channel_statistics(device.to_device(np.full((1000, 4, 4, 1), 255, np.uint8)))
    assert mean == (1.0,)
    assert std == (1.0,)  # a constant channel must not divide by nothing


def test_class_mean_images_are_numpys():
    images = RNG.integers(0, 256, (700, 4, 3, 3), dtype=np.uint8)
    labels = RNG.integers(0, 2, 700).astype(np.int32)
    means = device.to_numpy(statistics.class_mean_images(device.to_device(images), device.to_device(labels), 3))
    expected = np.stack([images[labels == 0].mean(axis=0), images[labels == 1].mean(axis=0), np.zeros((4, 3, 3))])
    assert means.dtype == np.float32
    assert np.allclose(means, expected, atol=1e-4)


def test_examples_are_the_first_of_each_class():
    images = RNG.integers(1, 256, (6, 2, 2, 1), dtype=np.uint8)
    train = data_set((images, [0, 1, 0, 0, 2, 0])).train
    shown = device.to_numpy(statistics.examples(train, 2, 3))
    assert np.array_equal(shown[:4], images[[0, 2, 3, 1]])
    assert not shown[4:].any()  # class 1 has only one image


def test_taking_keeps_images_labels_and_sources_together():
    images = RNG.integers(0, 256, (6, 2, 2, 1), dtype=np.uint8)
    split = data_set((images, [0, 1, 2, 0, 1, 2])).train.take(device.to_device(np.array([5, 0, 3])))
    assert np.array_equal(device.to_numpy(split.images), images[[5, 0, 3]])
    assert device.to_numpy(split.labels).tolist() == [2, 0, 0]
    assert list(split.sources.to_numpy()) == ["image 5", "image 0", "image 3"]


def test_the_whole_of_cifar10_is_read_in_time(tmp_path):
    """60,000 images of 32×32×3 from the cache, without counting what else the machine does."""
    path = tmp_path / "cache.parquet"
    write(path, rows("train", 3000, (32, 32, 3)) * 4)
    header = cache.read_header(path)
    start = time.process_time()
    cache.read(path, header)
    # A fifth of the data; two cores share the work.
    assert (time.process_time() - start) * 5 / 2 < 4
