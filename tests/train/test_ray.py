"""scripts/ray_train.py with the real Ray on this machine; tests/slow/test_ray_failures.py ends one of the processes."""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts/ray_train.py"
SMALL = ["2", "batch_size=64", "model.stages=[[8],[16]]", "dataset.limit_per_class=40", "name=pair"]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the optional package ray is missing")


@contextlib.contextmanager
def ray_training(folder, *overrides):
    """Start a training of two processes with Ray in `folder`; yields the process and the processes below it.

    Ray's files are written to a temporary folder with a short path, because a socket's path has at most 107 characters.
    """
    import psutil

    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    environment = {**os.environ, "RAY_TMPDIR": temporary, "HOME": temporary, "PIPELINE_DEVICE": "cpu"}
    environment = {**environment, "PYTHONPATH": str(REPOSITORY), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}

    def processes():
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == temporary:
                    yield process

    command = subprocess.Popen(
        [sys.executable, str(SCRIPT), *SMALL, *overrides],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield command, processes
        ended = time.monotonic() + 30
        while list(processes()) and time.monotonic() < ended:
            time.sleep(0.2)
        assert not list(processes())
    finally:
        for process in processes():
            process.kill()
        command.communicate()
        shutil.rmtree(temporary, ignore_errors=True)


def refused(folder, *arguments, before="pass"):
    """The error output of the script, which must end with exit code 2; `before` is executed first."""
    code = f"import runpy, sys; {before}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    answer = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT), *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert answer.returncode == 2, answer.stderr
    assert "Traceback" not in answer.stderr
    return answer.stderr


@needs_ray
def test_ray_trains_in_two_processes(tmp_path):
    with ray_training(tmp_path, "epochs=2") as (command, _):
        output, _ = command.communicate(timeout=500)
        assert command.returncode == 0, output
    assert "the run is in runs/pair" in output
    metrics = json.loads((tmp_path / "runs/pair/metrics.json").read_text(encoding="utf-8"))
    assert len(metrics["history"]) == 2 and "test_accuracy" in metrics
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "logs"}
    assert (tmp_path / "logs/pair").is_dir()
    assert "resume=runs/pair" in refused(tmp_path, *SMALL)


def test_wrong_use_is_an_error_before_ray_starts(tmp_path):
    assert "batch_size" in refused(tmp_path, *SMALL, "batch_size=33")
    assert "requirements-extras.txt" in refused(tmp_path, *SMALL, before="sys.modules['ray'] = None")
