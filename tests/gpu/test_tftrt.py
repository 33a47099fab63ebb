"""TF-TRT on a GPU: engines are built, agree with Keras, take every batch size, and load in a new process."""
# ruff: noqa: F811  (fixtures are imported by name)

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export import tensorrt_library, tftrt
from export.predict import Predictor
from pipeline import runs
from pipeline.core.errors import PipelineError
from pipeline.data.images import decode_image
from pipeline.evaluate import exports
from tests.conftest import REPOSITORY
from tests.export.small_run import digit_images, digits, trained_run  # noqa: F401

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=tftrt.PRECISIONS)
def converted(request, trained_run, tmp_path_factory):
    """(run, TF-TRT folder) of one precision."""
    try:
        tensorrt_library.require()
    except PipelineError as error:
        pytest.skip(str(error))
    run = runs.Run(tmp_path_factory.mktemp("tftrt") / "runs" / "small")
    shutil.copytree(trained_run.path, run.path)
    return run, tftrt.export(run, digits(), request.param)


def test_engines_are_built_saved_and_described(converted):
    run, path = converted
    manifest = json.loads((path / "tftrt.json").read_text(encoding="utf-8"))
    assert manifest["engines"] >= 1
    assert manifest["nodes_converted"] / manifest["nodes"] > 0.8
    assert manifest["profile_batches"] == [1, 64, 1024]
    assert manifest["calibration_images"] == (512 if manifest["precision"] == "INT8" else 0)
    engines = list((path / "assets").glob("trt-serialized-engine.*"))
    assert len(engines) == manifest["engines"]
    assert all(engine.stat().st_size > 10_000 for engine in engines)
    row = exports.recorded(run)[path.name]
    assert row["engines"] == manifest["engines"]
    assert row["agreement"] >= (0.97 if manifest["precision"] == "INT8" else 0.99)
    assert sorted(p.name for p in run.export_dir.iterdir()) == [".lock", "export.json", "saved_model", path.name]


def test_agrees_with_keras(converted, digit_images):
    run, path = converted
    images, labels = digit_images
    expected = run.load_model().predict(images, verbose=0)
    answers = Predictor.load(path).probabilities(images)
    least = 0.97 if path.name == "tftrt_int8" else 0.99
    assert np.mean(answers.argmax(1) == expected.argmax(1)) >= least
    assert abs(np.mean(answers.argmax(1) == labels) - np.mean(expected.argmax(1) == labels)) <= 0.01
    if path.name == "tftrt_fp32":
        np.testing.assert_allclose(answers, expected, atol=0.02)  # TensorRT uses TF32, with 10 bits of mantissa
        assert np.mean(np.abs(answers - expected)) < 1e-3


def test_every_batch_size_and_pixels_on_the_gpu(converted, digit_images):
    _, path = converted
    images = np.concatenate([digit_images[0]] * 4)
    predictor = Predictor.load(path)
    expected = predictor.probabilities(images[:1024]).argmax(1)
    for count in (1, 2, 63, 64, 65, 1023, 1024):
        assert np.mean(predictor.probabilities(images[:count]).argmax(1) == expected[:count]) >= 0.99
    assert len(predictor.predict(images[:1100])) == 1100
    on_gpu = digits().test.images
    np.testing.assert_allclose(predictor.probabilities(on_gpu), predictor.probabilities(on_gpu.get()), atol=1e-3)


def infer(folder, environment=None):
    """`python -m export.trt_infer` in a new process on folder/0.png; returns its JSON."""
    command = [sys.executable, "-m", "export.trt_infer", "0.png", "--run", "small", "--json"]
    environment = {**os.environ, **(environment or {})}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_predictions_in_a_new_process(converted, digit_images):
    run, path = converted
    folder = run.path.parent.parent
    Image.fromarray(digit_images[0][0]).save(folder / "0.png")
    (answer,) = infer(folder)
    (expected,) = Predictor.load(path).predict(decode_image(folder / "0.png"))
    assert answer["label"] == expected.label
    assert answer["probability"] == pytest.approx(expected.probability, abs=0.01)


def test_a_new_process_needs_no_library_path(converted, digit_images):
    """TensorRT is found in its pip package although LD_LIBRARY_PATH does not contain it."""
    if Path(f"/usr/lib/x86_64-linux-gnu/libnvinfer.so.{tensorrt_library.VERSION}").exists():
        pytest.skip("TensorRT is installed system-wide")
    run, _ = converted
    ctypes.CDLL("libnvinfer.so.8", mode=ctypes.RTLD_GLOBAL)
    words = Path("/proc/self/maps").read_text(encoding="utf-8").split()
    library = next(Path(word) for word in words if Path(word).name.startswith("libnvinfer.so"))
    if library.parent.name not in ("tensorrt_libs", "tensorrt"):
        pytest.skip(f"TensorRT is not installed as a package but in {library.parent}")
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    without = os.pathsep.join(f for f in folders if f and Path(f).resolve() != library.parent.resolve())
    folder = run.path.parent.parent
    Image.fromarray(digit_images[0][0]).save(folder / "0.png")
    packages = os.pathsep.join(filter(None, [str(library.parent.parent), os.environ.get("PYTHONPATH")]))
    (answer,) = infer(folder, {"LD_LIBRARY_PATH": without, "PYTHONPATH": packages})
    assert answer["label"] in digits().class_names


def test_engines_of_another_gpu_are_an_error(converted, tmp_path):
    _, path = converted
    shutil.copytree(path, tmp_path / path.name)
    manifest = json.loads((path / "tftrt.json").read_text(encoding="utf-8"))
    (tmp_path / path.name / "tftrt.json").write_text(
        json.dumps(manifest | {"compute_capability": [5, 0]}), encoding="utf-8"
    )
    with pytest.raises(PipelineError, match=r"\(5, 0\)"):
        Predictor.load(tmp_path / path.name)
