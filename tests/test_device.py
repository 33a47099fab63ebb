"""The module that knows whether there is a GPU, on a machine without one (tests/gpu has the other half)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.core import cli, device
from pipeline.core.errors import PipelineError, first_line

REPOSITORY = Path(__file__).resolve().parent.parent


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
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


def test_unknown_choice_and_missing_gpu_are_one_sentence(monkeypatch):
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


def test_arrays_go_to_tensorflow_and_back_unchanged():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensor = device.to_tensorflow(device.to_device(array))
    assert (tensor.shape, tensor.dtype.name) == ((2, 3, 4), "float32")
    np.testing.assert_array_equal(device.to_numpy(device.from_tensorflow(tensor)), array)
    assert device.to_tensorflow(device.to_device(array[:0])).shape == (0, 3, 4)


def test_non_contiguous_arrays_are_refused():
    with pytest.raises(PipelineError, match=r"\(4, 2\)"):
        device.to_tensorflow(device.to_device(np.zeros((4, 4)))[:, ::2])


def test_description_names_the_machine_and_the_versions():
    described = device.describe()
    assert described["device"] in ("cpu", "gpu") and described["cores"] >= 1 and described["cpu"]
    assert described["packages"]["numpy"] == np.__version__


def test_memory_is_a_plausible_number():
    assert 2**26 < device.free_memory() < 2**44


@pytest.mark.parametrize(
    ("work", "code", "word"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (lambda: (_ for _ in ()).throw(PipelineError("no disk", 1)), 1, "no disk"),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt()), 130, "Ctrl-C"),
    ],
)
def test_commands_end_with_a_code_and_a_sentence(work, code, word, capsys):
    def main():
        result = work()
        return next(result) if hasattr(result, "__next__") else result

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    said = capsys.readouterr().err
    assert end.value.code == code and word in said
    assert len(said.strip().splitlines()) == (1 if word else 0)


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
def test_the_telling_line_of_an_error(problem, line):
    assert first_line(problem) == line
