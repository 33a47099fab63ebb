"""The dataset `table`: images listed in a CSV or Parquet file."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.data.load import load_dataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Each test starts without a cache."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def photos(tmp_path):
    """A folder with photos/0.png to photos/9.png; the value of an image is its number."""
    (tmp_path / "photos").mkdir()
    for value in range(10):
        Image.new("L", (8, 8), value).save(tmp_path / "photos" / f"{value}.png")
    return tmp_path


def write(path, columns, delimiter=","):
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = [columns, *zip(*columns.values(), strict=True)]
        path.write_text("".join(delimiter.join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    return path


def content(split):
    values, labels = device.to_numpy(split.images)[:, 0, 0, 0], device.to_numpy(split.labels)
    return sorted(zip(values.tolist(), labels.tolist(), strict=True))


FILES = [f"photos/{value}.png" for value in range(10)]
LABELS = ["dog", "cat"] * 5
SPLITS = ["train"] * 6 + ["Test"] * 2 + ["val"] * 2


@pytest.mark.parametrize("name, delimiter", [("t.csv", ","), ("t.CSV", ";"), ("t.csv", "\t"), ("t.parquet", None)])
def test_files_labels_and_splits(photos, name, delimiter):
    table = write(photos / name, {"note": ["a b"] * 10, "file": FILES, "label": LABELS, "split": SPLITS}, delimiter)
    for data_dir in (table, photos):
        dataset = load_dataset("table", data_dir)
        assert dataset.class_names == ["cat", "dog"]
        assert content(dataset.train) == [(value, 1 - value % 2) for value in range(6)]
        assert content(dataset.test) == [(6, 1), (7, 0)]
        assert content(dataset.validation) == [(8, 1), (9, 0)]
        assert dataset.train.sources.iloc[0] == str(photos / "photos" / "0.png")


def test_named_columns_and_one_of_several_tables(photos):
    columns = {"id": FILES, "label": ["x"] * 10, "animal": LABELS, "part": SPLITS}
    write(photos / "b.csv", columns)
    write(photos / "a.csv", {"file": FILES})
    settings = {"file": "b.csv", "file_column": "id", "label_column": "animal", "split_column": "part"}
    dataset = load_dataset("table", photos, **settings)
    assert dataset.class_names == ["cat", "dog"] and len(dataset.test) == 2
    with pytest.raises(PipelineError, match=r"a\.csv, b\.csv"):
        load_dataset("table", photos)
    with pytest.raises(PipelineError, match=r"c\.csv"):
        load_dataset("table", photos, **settings | {"file": "c.csv"})


def test_without_splits_the_test_split_is_divided(photos):
    dataset = load_dataset("table", write(photos / "t.csv", {"path": FILES, "class": LABELS}), validation_fraction=0)
    assert [len(split) for split in dataset.splits.values()] == [8, 0, 2]


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_numbers_are_sorted_as_numbers(photos, name):
    labels = [10, 9, 2, 2, 9, 10, 2, 2, 9, 10]
    dataset = load_dataset("table", write(photos / name, {"file": FILES, "label": labels}), test_fraction=0)
    assert dataset.class_names == ["2", "9", "10"]


def test_labels_keep_their_text(photos):
    labels = ["007", "NA", "true", "1e5", "null"] * 2
    table = write(photos / "t.csv", {"file": FILES, "label": labels})
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())  # as spreadsheets write it
    dataset = load_dataset("table", table, test_fraction=0, validation_fraction=0)
    assert dataset.class_names == sorted(set(labels))


def test_a_changed_label_and_another_column_are_noticed(photos):
    table = write(photos / "t.csv", {"file": FILES, "label": LABELS, "class": LABELS[::-1]})
    first = load_dataset("table", table)
    assert load_dataset("table", table, label_column="class").digest != first.digest
    write(table, {"file": FILES, "label": [*LABELS[:8], "cat", "dog"]})
    assert load_dataset("table", table).digest != first.digest
    write(table, {"file": FILES, "label": LABELS})
    assert load_dataset("table", table).digest == first.digest


def test_unreadable_images_are_left_out_as_in_other_datasets(photos):
    (photos / "photos" / "3.png").write_bytes(b"")
    table = write(photos / "t.csv", {"file": FILES, "label": LABELS})
    with pytest.raises(PipelineError, match=r"3\.png"):
        load_dataset("table", table)
    assert len(load_dataset("table", table, max_rejected=0.2).rejected) == 1


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
@pytest.mark.parametrize(
    "columns, settings, words",
    [
        ({"name": FILES, "label": LABELS}, {}, ["'file'", "name, label", "file_column"]),
        ({"file": FILES, "kind": LABELS}, {}, ["'label' or 'class'", "label_column"]),
        ({"file": FILES, "label": LABELS}, {"split_column": "part"}, ["'part'", "split_column"]),
        ({"file": FILES, "label": ["", *LABELS[1:]]}, {}, ["1 rows", "'label'"]),
        ({"file": FILES, "label": LABELS, "split": ["train"] * 8 + ["tset"] * 2}, {}, ["'tset' (2 rows)", "test"]),
        ({"file": FILES, "label": LABELS, "split": ["test"] * 10}, {}, ["no training images"]),
        ({"file": FILES, "label": ["cat"] * 10}, {}, ["two classes"]),
        ({"file": [FILES[0], *FILES[:9]], "label": LABELS}, {}, ["0.png", "2 rows"]),
        ({"file": [f"no{n}.png" for n in range(10)] * 2, "label": LABELS * 2}, {}, ["20 of 20", "no9.png"]),
        ({"file": [], "label": []}, {}, ["no rows"]),
    ],
)
def test_unusable_tables_say_why(photos, name, columns, settings, words):
    if name.endswith("parquet"):
        columns = {key: pa.array(values, pa.string()) for key, values in columns.items()}
    table = write(photos / name, columns)
    with pytest.raises(PipelineError) as info:
        load_dataset("table", table, **settings)
    message = str(info.value)
    assert all(word in message for word in words), message
    assert str(table) in message


def test_at_most_ten_missing_files_are_listed(photos):
    table = write(photos / "t.csv", {"file": FILES + [f"gone{n}.png" for n in range(30)], "label": LABELS * 4})
    with pytest.raises(PipelineError, match="30 of 40") as info:
        load_dataset("table", table)
    assert str(info.value).count("gone") == 10


@pytest.mark.parametrize("name, data", [("t.csv", b""), ("t.csv", b"file,label\n\xff\xfe,cat\n"), ("t.parquet", b"x")])
def test_damaged_tables_are_named(photos, name, data):
    (photos / name).write_bytes(data)
    with pytest.raises(PipelineError, match=name.replace(".", r"\.")):
        load_dataset("table", photos / name)


def test_a_ragged_row_is_named(photos):
    (photos / "t.csv").write_text("file,label\nphotos/0.png,cat,extra\n", encoding="utf-8")
    with pytest.raises(PipelineError, match="CSV"):
        load_dataset("table", photos / "t.csv")


def test_no_folder_no_table_and_settings_of_the_table_elsewhere(tmp_path):
    for data_dir in (None, tmp_path / "missing", tmp_path):
        with pytest.raises(PipelineError, match="data_dir"):
            load_dataset("table", data_dir)
    with pytest.raises(PipelineError, match="label_column"):
        load_dataset("digits", label_column="label")


def test_the_labels_follow_the_files_of_other_folders(photos):
    absolute = [str(photos / name) for name in FILES]
    (photos / "tables").mkdir()
    relative = [f"../{name}" for name in FILES]
    for number, files in enumerate((absolute, relative)):
        table = write(photos / "tables" / f"{number}.csv", {"file": files, "label": LABELS, "split": SPLITS})
        assert np.array_equal(content(load_dataset("table", table).test), [(6, 1), (7, 0)])
