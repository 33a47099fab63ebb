"""Ten times, a random one of two training processes is killed at a random moment, and the training is resumed."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import environment
from pipeline.core import device

SETTINGS = ["dataset=digits", "epochs=100000", "name=pair"]


def start(*overrides):
    """`python -m pipeline.workers 2 OVERRIDES`, on the GPUs of a machine with two, otherwise on the CPU."""
    variables = {} if device.gpu_count() >= 2 else {"PIPELINE_DEVICE": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.workers", "2", *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), **variables},
    )


def epochs():
    """Numbers of the epochs that have a checkpoint."""
    return {int(path.stem.split("-")[1]) for path in Path("runs/pair/checkpoints").glob("epoch-*.npz")}


@pytest.mark.parametrize("seed", range(10))
def test_a_process_is_killed_at_a_random_moment(tmp_path, monkeypatch, seed):
    import psutil

    monkeypatch.chdir(tmp_path)
    generator = random.Random(seed)
    launcher = start(*SETTINGS)
    if seed % 2:  # every second time after the first epoch, otherwise also while the processes start
        while not epochs():
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.1)
        time.sleep(generator.uniform(0, 5))
    else:
        time.sleep(generator.uniform(2, 30))
    psutil.Process(launcher.pid).children()[generator.randrange(2)].kill()
    killed = time.monotonic()
    _, problems = launcher.communicate(timeout=60)
    assert time.monotonic() - killed < 31, problems
    assert launcher.returncode == 1, problems
    assert "was ended by SIGKILL" in problems and "Traceback" not in problems, problems
    saved = epochs()
    config = Path("runs/pair/config.yaml")
    if config.exists():
        text = config.read_text(encoding="utf-8")
        config.write_text(text.replace("epochs: 100000", f"epochs: {max(saved, default=0) + 1}"), encoding="utf-8")
        launcher = start("resume=runs/pair")
    else:
        launcher = start(*SETTINGS[:1], "epochs=1", SETTINGS[2])
    _, problems = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, problems
    assert (tmp_path / "runs/pair/model.keras").is_file()
    assert max(epochs()) == max(saved, default=0) + 1
