"""Fashion-MNIST from IDX files that these tests write, whole and damaged, and from an address."""

import gzip
import hashlib
import http.server
import re
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline.core import config, device
from pipeline.core.errors import PipelineError
from pipeline.data.load import load_dataset, load_from_settings
from pipeline.data.sources import fashion_mnist

COUNTS = {"train": 40, "t10k": 20}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Each test starts without a cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PIPELINE_CACHE", str(folder))
    return folder


def idx(values) -> bytes:
    """An IDX file of unsigned bytes, written as its definition says."""
    values = np.asarray(values, np.uint8)
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def arrays(prefix: str):
    """Images [N, 28, 28] and labels [N], every class equally often."""
    count = COUNTS[prefix]
    images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
    return images, np.arange(count) % 10


def written(folder: Path, compressed: bool = True) -> Path:
    """The four files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in COUNTS:
        for kind, values in zip(("images-idx3", "labels-idx1"), arrays(prefix), strict=True):
            content = idx(values)
            name = f"{prefix}-{kind}-ubyte"
            path = folder / (f"{name}.gz" if compressed else name)
            path.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
    return folder


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("inner", ["", "fashion-mnist", "fashion_mnist"])
def test_the_files_are_read_wherever_they_are(tmp_path, compressed, inner):
    written(tmp_path / inner, compressed)
    dataset = load_dataset("fashion_mnist", tmp_path, validation_fraction=0)
    assert dataset.image_shape == (28, 28, 1) and dataset.class_names[0] == "T-shirt/top" and dataset.num_classes == 10
    for split, prefix in ((dataset.train, "train"), (dataset.test, "t10k")):
        images, labels = arrays(prefix)
        assert np.array_equal(device.to_numpy(split.images)[..., 0], images)
        assert np.array_equal(device.to_numpy(split.labels), labels)


def test_a_stratified_validation_split(tmp_path):
    dataset = load_dataset("fashion_mnist", written(tmp_path), validation_fraction=0.25, channels=3, image_size=32)
    assert np.bincount(device.to_numpy(dataset.validation.labels)).tolist() == [1] * 10
    assert np.bincount(device.to_numpy(dataset.train.labels)).tolist() == [3] * 10
    assert dataset.image_shape == (32, 32, 3)


def test_changed_files_are_noticed(tmp_path):
    before = load_dataset("fashion_mnist", written(tmp_path), validation_fraction=0)
    images, _ = arrays("train")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(255 - images)))
    after = load_dataset("fashion_mnist", tmp_path, validation_fraction=0)
    assert after.digest != before.digest
    assert np.array_equal(device.to_numpy(after.train.images)[..., 0], 255 - images)


def wrong_magic(content: bytes) -> bytes:
    return content[:2] + b"\x0d" + content[3:]


@pytest.mark.parametrize(
    ("name", "damage", "word"),
    [
        ("train-images-idx3-ubyte", wrong_magic, "0x00000d03"),
        ("t10k-labels-idx1-ubyte", wrong_magic, "0x00000d01"),
        ("train-labels-idx1-ubyte", lambda content: idx(arrays("train")[0]), "0x00000803"),
        ("train-images-idx3-ubyte", lambda content: content[:-1], "31375"),
        ("train-images-idx3-ubyte", lambda content: content + b"\0", "31377"),
        ("train-images-idx3-ubyte", lambda content: content[:10], "train-images-idx3-ubyte"),
        ("train-labels-idx1-ubyte", lambda content: content[:7], "train-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte", lambda content: b"", r"\b0 bytes"),
        ("t10k-labels-idx1-ubyte", lambda content: idx([10] * 20), r"\b10\b"),
        ("train-labels-idx1-ubyte", lambda content: idx([1] * 40), "'T-shirt/top'"),
    ],
)
@pytest.mark.parametrize("compressed", [True, False])
def test_a_wrong_file_is_named(tmp_path, name, damage, word, compressed):
    path = written(tmp_path, compressed) / (f"{name}.gz" if compressed else name)
    content = path.read_bytes()
    damaged = damage(gzip.decompress(content) if compressed else content)
    path.write_bytes(gzip.compress(damaged) if compressed else damaged)
    with pytest.raises(PipelineError) as caught:
        load_dataset("fashion_mnist", tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert re.search(word, str(caught.value).replace(str(tmp_path), ""))  # the folder may contain the same number


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-20],
        lambda content: content[:200] + b"\xff" * 50 + content[250:],
        lambda content: content[:-8] + bytes(4) + content[-4:],  # another checksum
        lambda content: content[:5],
    ],
)
def test_damaged_gzip_is_named(tmp_path, damage):
    path = written(tmp_path) / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PipelineError, match=r"train-images-idx3-ubyte\.gz"):
        load_dataset("fashion_mnist", tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PipelineError, match=str(tmp_path / "file")):
        load_dataset("fashion_mnist", tmp_path / "file")
    with pytest.raises(PipelineError, match="nowhere"):
        load_dataset("fashion_mnist", tmp_path / "nowhere")


@pytest.fixture
def address(tmp_path_factory, monkeypatch):
    """A server with the four files in place of the official one; gives the names that were asked for."""
    folder = written(tmp_path_factory.mktemp("served"))
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path.strip("/"))
            content = (folder / asked[-1]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fashion_mnist, "ADDRESS", f"http://127.0.0.1:{server.server_port}/")
    digests = {n: "md5:" + hashlib.md5((folder / f"{n}.gz").read_bytes()).hexdigest() for n in fashion_mnist.DIGESTS}
    monkeypatch.setattr(fashion_mnist, "DIGESTS", digests)
    yield asked
    server.shutdown()
    server.server_close()


def test_downloaded_once_and_checked(tmp_path, address, monkeypatch):
    first = load_dataset("fashion_mnist", tmp_path, progress=False)
    assert sorted(address) == sorted(f"{name}.gz" for name in fashion_mnist.DIGESTS)
    assert len(list((tmp_path / "fashion-mnist").iterdir())) == 4
    again = load_dataset("fashion_mnist", tmp_path, progress=False)
    assert len(address) == 4 and again.digest == first.digest
    (tmp_path / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    load_dataset("fashion_mnist", tmp_path, progress=False)
    assert address[4:] == ["t10k-labels-idx1-ubyte.gz"]


def test_downloaded_into_the_cache_without_data_dir(address):
    assert len(load_dataset("fashion_mnist", progress=False).test) == 20


def test_a_changed_download_in_the_cache_is_refused(address, own_cache):
    load_dataset("fashion_mnist", progress=False)
    (path,) = own_cache.rglob("train-images-idx3-ubyte.gz")
    path.write_bytes(gzip.compress(idx(255 - arrays("train")[0])))  # valid, but not the published file
    with pytest.raises(PipelineError, match="md5"):
        load_dataset("fashion_mnist", progress=False)


def test_a_download_with_another_digest_is_refused(tmp_path, address, monkeypatch):
    name = "train-labels-idx1-ubyte"
    monkeypatch.setitem(fashion_mnist.DIGESTS, name, "md5:25c81989df183df01b3e8a0aad5dffbe")
    with pytest.raises(PipelineError, match="25c81989df183df01b3e8a0aad5dffbe"):
        load_dataset("fashion_mnist", tmp_path, progress=False)
    assert not (tmp_path / "fashion-mnist" / f"{name}.gz").exists()


def test_the_configuration_fits_load(tmp_path):
    settings = config.compose(["dataset=fashion_mnist", f"data_dir={written(tmp_path)}"]).dataset
    assert len(load_from_settings(settings).test) == 20
