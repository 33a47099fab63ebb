"""`make` on a fresh machine: one installation, redone when it must be, and a sentence when it cannot."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.core import device

ROOT = Path(__file__).resolve().parent.parent
HERE = {"PIPELINE_DEVICE": "cpu"}  # the GPU stack is not installed by a test


def make(folder, *arguments, **environment):
    """Run make in `folder`; returns the finished process with its text."""
    command = ["make", "--no-print-directory", *arguments, f"PYTHON={sys.executable}"]
    settings = {n: v for n, v in os.environ.items() if not n.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        command, cwd=folder, env={**settings, **HERE, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with no requirements at all and its `.venv` made: (folder, what the first make said)."""
    folder = tmp_path_factory.mktemp("checkout") / "here"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "scripts" / "bootstrap.py", folder / "scripts")
    requirements = [f"requirements{kind}.txt" for kind in ("", "-gpu", "-tensorrt", "-extras")]
    for name in (*requirements, "constraints.txt"):
        (folder / name).write_text("# nothing\n", encoding="utf-8")
    return folder, make(folder, "install")


@pytest.fixture
def bootstrap(checkout):
    """The installer as a module, working on the small checkout."""
    specification = importlib.util.spec_from_file_location("bootstrap", checkout[0] / "scripts" / "bootstrap.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_first_call_installs_and_the_second_does_nothing(checkout):
    folder, first = checkout
    assert first.returncode == 0, first.stderr
    assert ".venv" in first.stdout
    before = (folder / ".venv" / ".installed").stat().st_mtime_ns
    started = time.monotonic()
    second = make(folder, "install")
    assert (second.returncode, second.stdout) == (0, "")
    assert (folder / ".venv" / ".installed").stat().st_mtime_ns == before
    assert time.monotonic() - started < 5


def test_new_requirements_are_installed_into_the_same_environment(checkout):
    folder, _ = checkout
    kept = folder / ".venv" / "kept"
    kept.touch()
    (folder / "constraints.txt").write_text("# something else\n", encoding="utf-8")
    result = make(folder, "install")
    assert result.returncode == 0, result.stderr
    assert "requirements.txt" in result.stdout
    assert kept.exists()


def test_the_extras_are_installed_once_where_they_are_asked_for(checkout, bootstrap, monkeypatch):
    folder, _ = checkout
    asked = []
    monkeypatch.setattr(bootstrap, "install", lambda requirements, title: asked.append(requirements))
    monkeypatch.setattr(sys, "argv", ["bootstrap.py"])
    make(folder, "install")
    bootstrap.main()
    assert asked == []
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", "--extras"])
    bootstrap.main()
    bootstrap.main()
    assert asked == ["requirements-extras.txt"]
    (folder / "requirements-extras.txt").write_text("# something else\n", encoding="utf-8")
    bootstrap.main()
    assert asked == 2 * ["requirements-extras.txt"]


def test_an_interrupted_installation_begins_again(checkout):
    folder, _ = checkout
    half_done = folder / ".venv" / "half-done"
    half_done.touch()
    (folder / ".venv" / ".installing").touch()
    (folder / ".venv" / ".installed").unlink()
    result = make(folder, "install")
    assert result.returncode == 0, result.stderr
    assert not half_done.exists()
    assert (folder / ".venv" / ".installed").exists()


def test_a_moved_checkout_is_installed_again(checkout):
    folder, _ = checkout
    moved = folder.rename(folder.with_name("there"))
    try:
        result = make(moved, "install")
        assert ".venv" in result.stdout
        assert str(moved) in (moved / ".venv" / "bin" / "pip").read_text(encoding="utf-8").splitlines()[0]
    finally:
        moved.rename(folder)


def test_a_failed_download_is_one_sentence_and_the_last_lines(checkout):
    folder, _ = checkout
    (folder / "requirements.txt").write_text("no-such-package-anywhere==1.0\n", encoding="utf-8")
    try:
        result = make(
            folder,
            "install",
            PIP_CONFIG_FILE=os.devnull,
            PIP_INDEX_URL="http://127.0.0.1:9/simple",
            PIP_EXTRA_INDEX_URL="",
            PIP_FIND_LINKS="",
            PIP_RETRIES="0",
        )
        assert result.returncode != 0
        assert "pip config list" in result.stderr
        assert "no-such-package-anywhere" in result.stderr
        assert "no-such-package-anywhere" in (folder / ".venv" / "install.log").read_text(encoding="utf-8")
        assert not (folder / ".venv" / ".installed").exists()
    finally:
        (folder / "requirements.txt").write_text("# nothing\n", encoding="utf-8")


def test_a_link_to_an_environment_is_left_as_it_is(checkout):
    folder, _ = checkout
    elsewhere = (folder / ".venv").rename(folder.with_name("environment"))
    try:
        (folder / ".venv").symlink_to(elsewhere)
        (elsewhere / ".installed").unlink(missing_ok=True)
        (elsewhere / ".installing").touch()  # as an interrupted installation leaves it
        result = make(folder, "install")
        assert result.returncode != 0
        assert "make PY=" in result.stderr
        assert (elsewhere / "pyvenv.cfg").is_file()
    finally:
        (folder / ".venv").unlink()
        elsewhere.rename(folder / ".venv")
        assert make(folder, "install").returncode == 0


def test_another_python_is_one_sentence(bootstrap, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1, "final", 0))
    with pytest.raises(SystemExit) as stopped:
        bootstrap.main()
    assert "apt install python3.11" in str(stopped.value)


def test_a_missing_venv_package_is_one_sentence(bootstrap, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)  # as on Debian without python3-venv
    with pytest.raises(SystemExit) as stopped:
        bootstrap.main()
    assert "python3.11-venv" in str(stopped.value)


def test_a_missing_interpreter_is_one_sentence(checkout):
    result = subprocess.run(
        ["make", "install", "PYTHON=no-such-python"], cwd=checkout[0], capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "no-such-python" in result.stderr


def test_a_driver_brings_the_gpu_stack_and_a_failing_tensorrt_stops_nothing(bootstrap, monkeypatch, capsys):
    asked = []

    def install(requirements, title, **environment):
        asked.append(requirements)
        if "tensorrt" in requirements:
            raise bootstrap.InstallError("no such index")

    monkeypatch.setattr(bootstrap, "has_driver", lambda: True)
    monkeypatch.setattr(bootstrap, "install", install)
    bootstrap.prepare()
    assert asked == ["requirements-gpu.txt", "requirements-tensorrt.txt"]
    assert "requirements-tensorrt.txt" in capsys.readouterr().out
    asked.clear()
    bootstrap.prepare()
    monkeypatch.setattr(bootstrap, "has_driver", lambda: False)  # PIPELINE_DEVICE=cpu: what is there is enough
    bootstrap.prepare()
    assert asked == []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("OSError: [Errno 28] No space left on device", ["disk"]),
        ("Temporary failure in name resolution", ["pip config list"]),
        ("No matching distribution found for x==1 (from versions: 2.0)", [platform.machine()]),
        ("error: subprocess-exited-with-error", []),
    ],
)
def test_what_pip_says_becomes_a_sentence(bootstrap, said, words):
    sentence = bootstrap.reason(said)
    assert [word for word in ("disk", "pip config list", platform.machine()) if word in sentence] == words
    assert ".venv/install.log" in sentence


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("run", "-m pipeline "),
        ("test", "-m pytest"),
        ("test-gpu", "-m pytest tests/gpu"),
        ("lab", "-m pipeline.lab"),
        ("tensorboard", "-m tensorboard.main --logdir logs"),
    ],
)
def test_targets_run_in_the_environment_or_in_the_given_one(target, command):
    ours = make(ROOT, "-n", target).stdout
    assert f".venv/bin/python {command}".strip() in ours
    assert "scripts/bootstrap.py" in ours and ("--extras" in ours) == (target == "test")
    given = make(ROOT, "-n", target, "PY=/opt/python").stdout
    assert f"/opt/python {command}".strip() in given
    assert "scripts/bootstrap.py" not in given


def test_the_gpus_tests_without_a_gpu_are_one_sentence():
    if device.has_gpu():
        pytest.skip("there is a GPU here")
    answer = make(ROOT, "test-gpu", f"PY={sys.executable}", "ARGS=-q")
    assert answer.returncode == 2
    assert "PIPELINE_DEVICE" in answer.stdout + answer.stderr
    assert "skipped" not in answer.stdout


def test_clean_keeps_the_runs(checkout, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("runs/first/notebooks", "logs/first", ".venv", "pipeline/__pycache__", ".ruff_cache"):
        (tmp_path / name).mkdir(parents=True)
    assert make(tmp_path, "clean").returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Makefile", "logs", "pipeline", "runs"]
    assert not (tmp_path / "pipeline" / "__pycache__").exists()
    assert (tmp_path / "runs" / "first" / "notebooks").is_dir()


def test_continuous_integration_runs_make_test_in_the_root(tmp_path):
    recorder = tmp_path / "make"
    recorder.write_text('#!/bin/sh\necho "$PWD $*"; cat\n', encoding="utf-8")
    recorder.chmod(0o755)
    result = subprocess.run(
        [ROOT / ".ci" / "run"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        input="not read",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == f"{ROOT} test\n"
