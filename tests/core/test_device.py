"""The device on a machine without a GPU; tests/gpu/test_device.py tests it with one."""

import os
import signal
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line

REPOSITORY = Path(__file__).resolve().parents[2]


def python(code, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )


def test_cpu_choice_gives_numpy_pandas_and_no_gpu():
    answer = python(
        "from pipeline.core import device; print(device.has_gpu(), device.xp().__name__, device.dataframe().__name__)",
        PIPELINE_DEVICE="cpu",
    )
    assert answer.stdout.split() == ["False", "numpy", "pandas"]


def test_unknown_choice_and_missing_gpu_are_errors(monkeypatch):
    monkeypatch.setenv("PIPELINE_DEVICE", "tpu")
    with pytest.raises(PipelineError, match="'tpu'"):
        device.gpu_requested()
    monkeypatch.setenv("PIPELINE_DEVICE", "gpu")
    monkeypatch.setattr(device, "_driver_gpus", lambda: 0)
    with pytest.raises(PipelineError, match="NVIDIA"):
        device.gpu_requested()


def test_native_messages_go_to_the_log_and_python_errors_to_the_terminal(tmp_path):
    log = tmp_path / "deep" / "native.log"
    answer = python(
        "import os, sys; from pipeline.core import device; device.native_log();"
        "os.write(2, b'from native code\\n'); print('from Python', file=sys.stderr)",
        PIPELINE_LOG=str(log),
    )
    assert answer.stderr == "from Python\n"
    assert "from native code" in log.read_text(encoding="utf-8")


def test_dash_leaves_native_messages_in_the_terminal():
    answer = python(
        "import os; from pipeline.core import device; print(device.native_log()); os.write(2, b'native')",
        PIPELINE_LOG="-",
    )
    assert (answer.stdout.strip(), answer.stderr) == ("None", "native")


def test_a_native_crash_prints_a_traceback_and_the_path_of_the_log(tmp_path):
    log = tmp_path / "native.log"
    answer = python(
        "import os\nfrom pipeline.core import device\ndevice.native_log()\n"
        "def crash():\n    os.write(2, b'Check failed')\n    os.abort()\ncrash()",
        PIPELINE_LOG=str(log),
    )
    assert answer.returncode == -signal.SIGABRT
    assert "in crash" in answer.stderr and str(log) in answer.stderr
    assert "Check failed" in log.read_text(encoding="utf-8")


def test_the_log_is_in_the_cache_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("PIPELINE_LOG", raising=False)
    cache, work = tmp_path / "cache", tmp_path / "work"
    work.mkdir()
    answer = python("from pipeline.core import device; print(device.native_log())", cwd=work, PIPELINE_CACHE=str(cache))
    assert answer.stdout.strip() == str(cache / "tensorflow.log")
    assert list(work.iterdir()) == []


def test_tensorflow_gets_the_same_values():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensor = device.to_tensorflow(device.to_device(array))
    assert (tensor.shape, tensor.dtype.name) == ((2, 3, 4), "float32")
    np.testing.assert_array_equal(device.to_numpy(tensor), array)
    assert device.to_tensorflow(device.to_device(array[:0])).shape == (0, 3, 4)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU with 1000 free bytes and 30 unused bytes in the default pool, whose handle is 77."""
    calls = SimpleNamespace(waited=[], resource=None)

    def stream(name):
        return SimpleNamespace(synchronize=lambda: calls.waited.append(name))

    def module(name, **members):
        fake = ModuleType(name)
        fake.__spec__ = ModuleSpec(name, None)
        fake.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, fake)
        return fake

    runtime = SimpleNamespace(
        memGetInfo=lambda: (1000, 2000), getDevice=lambda: 0, deviceGetDefaultMemPool=lambda _: 77
    )
    pool = SimpleNamespace(free_bytes=lambda: 30)
    module(
        "cupy",
        cuda=SimpleNamespace(
            runtime=runtime, MemoryAsyncPool=lambda: pool, get_current_stream=lambda: stream("current")
        ),
    )
    module("cudf")
    module(
        "rmm",
        mr=SimpleNamespace(
            CudaAsyncViewMemoryResource=lambda handle: ("view", handle),
            CudaAsyncMemoryResource=lambda: "second pool",
            set_current_device_resource=lambda resource: setattr(calls, "resource", resource),
        ),
    )
    module("cuda")
    module("cuda.bindings", runtime=SimpleNamespace(cudaMemPool_t=lambda handle: ("pool", handle)))
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    calls.stream = stream
    device._default_pool.cache_clear()
    device.dataframe.cache_clear()
    yield calls
    device._default_pool.cache_clear()
    device.dataframe.cache_clear()


def test_rmm_uses_the_default_pool(fake_gpu):
    assert device.dataframe().__name__ == "cudf"
    assert fake_gpu.resource == ("view", ("pool", 77))


def test_unused_memory_of_the_pool_is_free(fake_gpu):
    assert device.free_memory() == 1030


@pytest.mark.parametrize("name", [None, "other"])
def test_to_tensorflow_waits_for_the_stream_that_wrote_the_array(fake_gpu, monkeypatch, name):
    monkeypatch.setattr(device, "tensorflow", lambda: SimpleNamespace(zeros=lambda shape, dtype: "empty"))
    array = SimpleNamespace(__cuda_array_interface__={}, size=0, shape=(0,), dtype=np.dtype("i4"))
    assert device.to_tensorflow(array, name and fake_gpu.stream(name)) == "empty"
    assert fake_gpu.waited == [name or "current"]


def test_description_names_the_machine_and_the_versions():
    described = device.describe()
    assert described["device"] in ("cpu", "gpu") and described["cores"] >= 1 and described["cpu"]
    assert described["packages"]["numpy"] == np.__version__


def test_free_memory_is_between_64_mib_and_16_tib():
    assert 2**26 < device.free_memory() < 2**44


@pytest.mark.parametrize(
    "problem, line",
    [
        ("one\ntwo", "one"),
        (ValueError(), "ValueError"),
        (
            "Graph execution error:\n\nDetected at node pool defined at (most recent call last):\n"
            '  File "train.py", line 1, in main\n\nMaxPool has no deterministic gradient.\n\t [[{{node pool}}]]',
            "MaxPool has no deterministic gradient",
        ),
        ("Graph execution error:\n", "Graph execution error:"),
    ],
)
def test_first_line_skips_what_precedes_the_cause(problem, line):
    assert first_line(problem) == line
