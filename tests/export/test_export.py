"""Exported models: input, size, agreement with the Keras model, measurements and error messages."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from export import artifacts, predict, saved_model, tensorrt_library, tflite, tftrt
from export.predict import Predictor
from pipeline import models, runs
from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.evaluate import exports
from tests.conftest import REPOSITORY
from tests.export.small_run import digits, write_run


@pytest.fixture
def run(trained_run, tmp_path):
    """A private copy of the trained run."""
    shutil.copytree(trained_run.path, tmp_path / "runs" / "small")
    return runs.Run(tmp_path / "runs" / "small")


def keras_probabilities(run, images):
    """The predictions of Keras's `predict`."""
    return run.load_model().predict(images, verbose=0)


def interpreter(path):
    return device.tensorflow().lite.Interpreter(model_path=str(path))


@pytest.mark.parametrize(
    ("artifact", "least"),
    [
        ("saved_model", 0.99),
        ("model_float32.tflite", 0.99),
        ("model_float16.tflite", 0.99),
        ("model_int8.tflite", 0.97),
    ],
)
def test_artifact_agrees_with_keras(exported_run, digit_images, artifact, least):
    images, labels = digit_images
    expected = keras_probabilities(exported_run, images)
    assert np.mean(expected.argmax(1) == labels) > 0.9, "agreement of an untrained model means nothing"
    answers = Predictor.load(exported_run.export_dir / artifact).probabilities(images)
    assert answers.dtype == np.float32
    assert np.mean(answers.argmax(1) == expected.argmax(1)) >= least
    assert abs(np.mean(answers.argmax(1) == labels) - np.mean(expected.argmax(1) == labels)) <= 0.01
    np.testing.assert_allclose(answers.sum(1), 1, atol=0.03)
    if artifact in ("saved_model", "model_float32.tflite"):
        np.testing.assert_allclose(answers, expected, atol=1e-4)


def test_int8_computes_in_integers_only(exported_run):
    path = exported_run.export_dir / "model_int8.tflite"
    loaded = interpreter(path)
    pixels, probabilities = loaded.get_input_details()[0], loaded.get_output_details()[0]
    assert pixels["dtype"] == np.uint8
    assert pixels["quantization"] == (1.0, 0)
    assert probabilities["dtype"] == np.uint8
    loaded.allocate_tensors()
    floats = [tensor["name"] for tensor in loaded.get_tensor_details() if tensor["dtype"] in (np.float32, np.float16)]
    assert floats == []


def test_int8_is_at_most_30_percent_of_float32_and_float16_about_half(exported_run):
    size = {p: (exported_run.export_dir / f"model_{p}.tflite").stat().st_size for p in tflite.PRECISIONS}
    assert size["int8"] <= 0.30 * size["float32"]
    assert size["float16"] <= 0.55 * size["float32"]


@pytest.mark.parametrize("precision", tflite.PRECISIONS)
def test_tflite_takes_any_batch(exported_run, digit_images, precision):
    images, _ = digit_images
    predictor = Predictor.load(exported_run.export_dir / f"model_{precision}.tflite")
    one_by_one = np.concatenate([predictor.probabilities(images[i : i + 1]) for i in range(5)])
    tolerance = 1 / 256 if precision == "int8" else 1e-5
    for count in (5, 1, 2, 3):
        np.testing.assert_allclose(predictor.probabilities(images[:count]), one_by_one[:count], atol=tolerance)
    assert predictor.probabilities(images[:130]).shape == (130, 10)


def test_mixed_precision_run_exports_in_float32(tmp_path, digit_images):
    run = write_run(tmp_path / "mixed", precision="mixed_bfloat16", epochs=1)
    images = digit_images[0][:100]
    expected = keras_probabilities(run, images)
    answers = Predictor.load(saved_model.save(run)).probabilities(images)
    assert np.abs(answers - expected).max() < 0.1
    assert np.mean(answers.argmax(1) == expected.argmax(1)) >= 0.95
    graph = (
        device.tensorflow().saved_model.load(str(run.export_dir / "saved_model")).signatures["serving_default"].graph
    )
    functions = [node for function in graph.as_graph_def().library.function for node in function.node_def]
    kinds = {node.attr["T"].type for node in functions if node.op == "Conv2D"}
    assert kinds == {1}, "DT_FLOAT, no bfloat16"
    content = tflite.convert(run.load_model(), "float32")
    assert content[4:8] == b"TFL3"


def test_export_json_contains_the_measurements(exported_run, digit_images):
    images, labels = digit_images
    rows = exports.recorded(exported_run)
    names = {"model.keras", "model_float32.tflite", "model_float16.tflite", "model_int8.tflite"}
    assert set(rows) == names
    expected = keras_probabilities(exported_run, images).argmax(1)
    assert rows["model.keras"]["test_accuracy"] == pytest.approx(np.mean(expected == labels))
    assert rows["model.keras"]["agreement"] == 1
    for name in names - {"model.keras"}:
        row = rows[name]
        assert row["size_bytes"] == (exported_run.export_dir / name).stat().st_size
        assert row["test_images"] == len(labels)
        assert row["agreement"] >= 0.97
        assert row["latency_ms"] > 0
        assert row["images_per_second"] > 0


def test_deleted_files_are_removed_from_the_table(run, capsys):
    measured = dict(size_bytes=1, test_accuracy=1.0, agreement=1.0, latency_ms=1.0, images_per_second=1.0)
    for name in ("model_int8.tflite", "model_float16.tflite"):
        exports.record(run, run.export_dir / name, measured)
        (run.export_dir / name).write_bytes(b"x")
    (run.export_dir / "model_int8.tflite").unlink()
    assert list(exports.recorded(run)) == ["model_float16.tflite"]
    exports.print_table(run)
    assert capsys.readouterr().out.count(".tflite") == 1


def test_reading_a_run_without_exports_creates_no_files(trained_run, tmp_path):
    shutil.copytree(trained_run.path, tmp_path / "bare", ignore=shutil.ignore_patterns("export"))
    bare = runs.Run(tmp_path / "bare")
    before = sorted(path.name for path in bare.path.iterdir())
    assert exports.recorded(bare) == {}
    assert Predictor.load(bare.path).class_names == list("0123456789")
    assert sorted(path.name for path in bare.path.iterdir()) == before and not bare.export_dir.exists()


def test_concurrent_records_are_all_written(run):
    threads = [
        threading.Thread(target=exports.record, args=(run, run.export_dir / f"artifact{index}", {"size_bytes": index}))
        for index in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads((run.export_dir / "export.json").read_text(encoding="utf-8"))) == 20


def test_exporting_again_replaces_the_folder(run):
    first = saved_model.save(run)
    (first / "stale").write_text("from the older export", encoding="utf-8")
    assert saved_model.save(run) == first
    assert not (first / "stale").exists()
    assert sorted(p.name for p in run.export_dir.iterdir()) == [".lock", "saved_model"]


def test_balanced_sample_is_seeded_and_has_no_duplicates():
    labels = np.repeat([0, 1, 2], [500, 100, 8])
    chosen = artifacts.balanced_sample(labels, 60, seed=1)
    assert len(set(chosen.tolist())) == 60
    assert np.bincount(labels[chosen]).tolist() == [26, 26, 8], "as even as the sizes of the classes allow"
    np.testing.assert_array_equal(chosen, artifacts.balanced_sample(labels, 60, seed=1))
    assert not np.array_equal(chosen, artifacts.balanced_sample(labels, 60, seed=2))
    assert sorted(artifacts.balanced_sample(labels, 10_000).tolist()) == list(range(608))
    assert np.any(np.diff(labels[chosen]) < 0), "shuffled, so that a batch contains all classes"


def test_a_dataset_of_other_classes_is_an_error(run):
    other = dataclasses.replace(digits(), class_names=["cat", "dog"])
    with pytest.raises(PipelineError, match=r"\b2\b"):
        tflite.export(run, other)
    nothing = dataclasses.replace(digits().test, images=digits().test.images[:0], labels=digits().test.labels[:0])
    empty = dataclasses.replace(digits(), test=nothing)
    with pytest.raises(PipelineError, match="digits"):
        tflite.export(run, empty)


def test_convert_reports_wrong_arguments(run):
    with pytest.raises(PipelineError, match="int4"):
        tflite.convert(run.load_model(), "int4")


def test_dark_calibration_images_do_not_narrow_the_input_range(run, digit_images):
    """The input scale is 1 even if no calibration image has a pixel of 255."""
    path = run.path / "dark.tflite"
    path.write_bytes(tflite.convert(run.load_model(), "int8", digit_images[0][:20] // 2))
    assert interpreter(path).get_input_details()[0]["quantization"] == (1.0, 0)


def test_a_tflite_file_contains_its_labels(exported_run, tmp_path):
    path = shutil.copy(exported_run.export_dir / "model_int8.tflite", tmp_path / "elsewhere.tflite")
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("labels.json"))["input_shape"] == [16, 16, 3]
    assert Predictor.load(path).class_names == list("0123456789")


def test_tftrt_without_a_gpu_recommends_tflite(run, monkeypatch):
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    with pytest.raises(PipelineError, match=r"export.tflite") as raised:
        tftrt.export(run, digits())
    assert raised.value.exit_code == 2
    with pytest.raises(PipelineError, match="INT4"):
        tftrt.export(run, digits(), precision="INT4")


def test_missing_tensorrt_names_the_requirements_file(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PipelineError, match=r"requirements-tensorrt.txt"):
        tensorrt_library.find()


def test_tensorrt_is_found_in_its_package(tmp_path, monkeypatch):
    folder = tmp_path / "tensorrt_libs"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('the package must not be imported')", encoding="utf-8")
    (folder / "libnvinfer.so.8").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert tensorrt_library.find() == folder


def test_a_library_is_found_under_another_name():
    """Opening a name that is not on the search path finds the library that was loaded under this name."""
    import ctypes

    wanted = "libwanted_by_a_test.so.8.6.1"
    with pytest.raises(OSError):
        ctypes.CDLL(wanted)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").split()
    math = next(Path(word) for word in maps if Path(word).name.startswith(("libm.so", "libm-")))
    tensorrt_library.load_as(wanted, math)
    library = ctypes.CDLL(wanted)
    library.cos.restype, library.cos.argtypes = ctypes.c_double, [ctypes.c_double]
    assert library.cos(0.0) == 1.0


def test_tensorflow_finds_a_library_under_its_other_name():
    """TensorFlow opens the two libraries by name after they were loaded under this name."""
    program = """
from pathlib import Path
from export import tensorrt_library
from pipeline.core import device
device.tensorflow()
from tensorflow.compiler.tf2tensorrt import _pywrap_py_utils as tf2tensorrt
print(tf2tensorrt.is_tensorrt_enabled())
words = Path("/proc/self/maps").read_text(encoding="utf-8").split()
library = next(Path(word) for word in words if Path(word).name.startswith(("libm.so", "libm-")))
for name in tensorrt_library.LIBRARIES:
    tensorrt_library.load_as(f"{name}.so.{tensorrt_library.VERSION}", library)
print(tf2tensorrt.is_tensorrt_enabled())
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PIPELINE_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    before, after = done.stdout.split()
    if before == "True":
        pytest.skip("TensorRT is on the loader's path here")
    assert after == "True"


def test_loading_an_invalid_library_is_an_error(tmp_path):
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"not a library at all")
    with pytest.raises(OSError, match=r"libbroken.so"):
        tensorrt_library.load_as("libother_name.so.1", broken)
    broken.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00" + bytes(100))
    with pytest.raises(OSError):
        tensorrt_library.load_as("libother_name.so.1", broken)


def test_errors_name_the_unsupported_layer():
    tf = device.tensorflow()
    import keras

    @keras.saving.register_keras_serializable("tests")
    class Gamma(keras.layers.Layer):
        def call(self, x):
            return tf.math.lgamma(x + 2.0)

    images = keras.Input((8, 8, 3))
    x = Gamma(name="odd_layer")(keras.layers.Conv2D(4, 3, name="even_layer")(images))
    logits = keras.layers.Dense(3)(keras.layers.Flatten()(x))
    network = models.deployable(keras.Model(images, logits, name="network"), (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(PipelineError, match="odd_layer"):
        tflite.convert(network, "float32")
    attention = models.build("vit_lite", (8, 8, 3), 3, depth=1, width=16, heads=2, operations="tensorflow")
    after = keras.Model(attention.inputs, Gamma(name="odd_layer")(attention.outputs[0]), name="network")
    network = models.deployable(after, (0.5,) * 3, (0.2,) * 3)
    assert "odd_layer" in tflite.find_unsupported_layer(network)


def test_converted_nodes_are_counted():
    tf = device.tensorflow()
    graph = tf.compat.v1.GraphDef()
    for name, operation in (
        ("x", "Placeholder"),
        ("cast", "Cast"),
        ("TRTEngineOp_000_000", "TRTEngineOp"),
        ("y", "Identity"),
    ):
        graph.node.add(name=name, op=operation)
    segment = graph.library.function.add()
    segment.signature.name = "TRTEngineOp_000_000_native_segment"
    for name in ("conv", "bias", "relu", "pool", "softmax"):
        segment.node_def.add(name=name, op="Conv2D")
    graph.library.function.add().signature.name = "unrelated"
    assert tftrt.count_nodes(graph) == {
        "engines": 1,
        "nodes_converted": 5,
        "nodes": 8,
        "nodes_left": {"Placeholder": 1, "Cast": 1, "Identity": 1},
    }


@pytest.fixture
def converter_input(monkeypatch):
    """What `tftrt` gives to a fake TF-TRT converter; the real one needs a GPU (tests/gpu)."""
    tf = device.tensorflow()
    seen = {}

    class Converter:
        def __init__(self, **settings):
            seen["settings"] = settings

        def convert(self, calibration_input_fn):
            seen["calibration"] = calibration_input_fn and [batch.numpy() for (batch,) in calibration_input_fn()]
            graph = tf.compat.v1.GraphDef()
            graph.node.add(name="TRTEngineOp_000_000", op="TRTEngineOp")
            return types.SimpleNamespace(graph=types.SimpleNamespace(as_graph_def=lambda: graph))

        def build(self, input_fn):
            seen["profiles"] = [batch.numpy() for (batch,) in input_fn()]

        def save(self, folder, save_gpu_specific_engines):
            seen["scratch"] = tempfile.mkdtemp()
            assert save_gpu_specific_engines
            (Path(folder) / "assets").mkdir(parents=True)
            (Path(folder) / "assets" / "trt-serialized-engine.TRTEngineOp_000_000").write_bytes(b"engine")

    monkeypatch.setattr(tf.experimental.tensorrt, "Converter", Converter)
    return seen


def test_the_tftrt_converter_gets_every_calibration_image_once(tmp_path, converter_input):
    images = np.arange(512, dtype=np.uint16).view(np.uint8).reshape(512, 1, 2, 1)
    manifest = tftrt._convert(tmp_path, tmp_path / "int8", "INT8", images)
    assert {batch.shape for batch in converter_input["calibration"]} == {(64, 1, 2, 1)}, "one shape for all batches"
    np.testing.assert_array_equal(np.concatenate(converter_input["calibration"]), images)
    assert [len(batch) for batch in converter_input["profiles"]] == [1, 64, 1024]
    assert {batch.dtype.name for batch in converter_input["profiles"]} == {"uint8"}
    assert converter_input["settings"]["precision_mode"] == "INT8"
    assert converter_input["settings"]["use_dynamic_shape"] is True
    assert manifest["calibration_images"] == 512
    assert not Path(converter_input["scratch"]).exists(), "the converter's copy of the engines"
    assert Path(tempfile.gettempdir()).exists()
    manifest = tftrt._convert(tmp_path, tmp_path / "fp16", "FP16", images[:5])
    assert converter_input["calibration"] is None
    assert manifest["calibration_images"] == 0


@pytest.mark.parametrize("size", [32, 224, 512, 3000])
def test_the_largest_profile_batch_is_the_largest_batch_of_a_predictor(tmp_path, converter_input, size):
    manifest = tftrt._convert(tmp_path, tmp_path / "out", "FP16", np.zeros((1, size, size, 1), np.uint8))
    batches = [len(batch) for batch in converter_input["profiles"]]
    assert manifest["profile_batches"] == batches == sorted(set(batches))
    sent = []

    def forward(images):
        sent.append(len(images))
        return np.ones((len(images), 1), np.float32)

    predictor = Predictor(tmp_path, "tftrt", predict._Graph(forward, np.uint8, (size, size, 1), 1), ["x"])
    count = batches[-1] + 1
    predictor.probabilities(np.broadcast_to(np.zeros((), np.uint8), (count, size, size, 1)))
    assert sent == [batches[-1], 1]
    assert {32: 1024, 224: 83, 512: 16, 3000: 1}[size] == batches[-1]


def test_an_unconvertible_network_is_an_error(tmp_path, monkeypatch):
    tf = device.tensorflow()
    converted = types.SimpleNamespace(graph=tf.Graph())
    converter = types.SimpleNamespace(convert=lambda calibration_input_fn: converted)
    monkeypatch.setattr(tf.experimental.tensorrt, "Converter", lambda **_: converter)
    with pytest.raises(PipelineError, match=r"export.tflite") as raised:
        tftrt._convert(tmp_path, tmp_path / "out", "FP32", np.zeros((1, 4, 4, 3), np.uint8))
    assert raised.value.exit_code == 1


def test_another_tensorrt_version_is_an_error(tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("Incompatible TensorRT major version")

    monkeypatch.setattr(device.tensorflow().experimental.tensorrt, "Converter", refuse)
    with pytest.raises(PipelineError, match=r"8\.6\.1"):
        tftrt._convert(tmp_path, tmp_path / "out", "FP32", np.zeros((1, 4, 4, 3), np.uint8))
