"""`make` on a fresh machine: install once, install again when necessary, and report what is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core import device

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = [f"requirements{kind}.txt" for kind in ("", "-gpu", "-tensorrt", "-extras")]
# Stands for Python and for the Python and pip of .venv, and writes pip's arguments to the file `calls`.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  --version)
    if [[ $0 == *pip ]]; then echo "pip 24.0 from $PWD/.venv/lib/pip (python 3.11)"; else echo "Python 3.11.9"; fi ;;
  *libcuda*) [[ $FAKE_GPU ]] ;;
  *ensurepip*) [[ ! $FAKE_OLD ]] ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/pip ;;
  "-m pip install"*) echo "${@:5}" >>calls; [[ ! $FAKE_FAILURE || "$*" != *"$FAKE_FAILURE"* ]] ;;
esac
"""
# A build backend without dependencies, so that `pip install -e .` needs no network.
BACKEND = """
import zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(f"{folder}/x-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("x-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: x\\nVersion: 1\\n")
        wheel.writestr("x-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("x-1.dist-info/RECORD", "")
    return "x-1-py3-none-any.whl"
"""


def make(folder, *arguments, **environment):
    """Run make in `folder`; returns the finished process with its output."""
    variables = {n: v for n, v in os.environ.items() if not n.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "here"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "scripts" / "install.sh", folder / "scripts")
    for name in (*REQUIREMENTS, "constraints.txt", "pyproject.toml"):
        (folder / name).write_text("# nothing\n", encoding="utf-8")
    return folder


@pytest.fixture
def install(checkout, tmp_path):
    """Runs make install with a fake Python: returns (process, the arguments of each pip call after "install")."""
    python = tmp_path / "python3.11"
    python.write_text(FAKE_PYTHON, encoding="utf-8")
    python.chmod(0o755)

    def run(*arguments, folder=checkout, **environment):
        calls = folder / "calls"
        calls.unlink(missing_ok=True)
        settings = {"PIPELINE_DEVICE": "", "FAKE_GPU": "", "FAKE_OLD": "", "FAKE_FAILURE": "", **environment}
        process = make(folder, "install", f"PYTHON={python}", *arguments, **settings)
        lines = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
        return process, [line.removeprefix("--no-input ") for line in lines]

    return run


def test_the_first_call_installs_and_the_second_does_nothing(install):
    process, calls = install()
    assert process.returncode == 0, process.stderr
    assert calls == ["-r requirements.txt", "--no-deps -e ."]
    process, calls = install("PYTHON=no-such-python")
    assert (process.returncode, process.stdout, process.stderr, calls) == (0, "", "", [])


def test_with_the_real_python_and_pip(checkout):
    (checkout / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1"\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        encoding="utf-8",
    )
    (checkout / "backend.py").write_text(BACKEND, encoding="utf-8")
    arguments = ["install", f"PYTHON={sys.executable}"]
    first = make(checkout, *arguments, PIPELINE_DEVICE="cpu", PIP_USER="1")
    assert first.returncode == 0, first.stderr
    old = checkout / ".venv" / "old"
    old.touch()
    assert make(checkout, *arguments, PIPELINE_DEVICE="cpu").stdout == ""
    (checkout / "constraints.txt").write_text("# changed\n", encoding="utf-8")
    assert make(checkout, *arguments, PIPELINE_DEVICE="cpu").returncode == 0
    assert old.exists()
    moved = checkout.rename(checkout.with_name("there"))
    assert make(moved, *arguments, PIPELINE_DEVICE="cpu").returncode == 0
    assert not (moved / ".venv" / "old").exists()
    assert str(moved) in (moved / ".venv" / "bin" / "pip").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("file", ["requirements.txt", "constraints.txt", "pyproject.toml"])
def test_a_changed_file_is_installed_into_the_same_environment(install, checkout, file):
    install()
    (checkout / ".venv" / "old").touch()
    (checkout / file).write_text("# changed\n", encoding="utf-8")
    assert install()[1] == ["-r requirements.txt", "--no-deps -e ."]
    assert (checkout / ".venv" / "old").exists()


def test_the_tests_install_the_extras_once(install):
    extras = "EXTRAS=requirements-extras.txt"
    assert [call for call in install(extras)[1] if "-r" in call] == [
        "-r requirements.txt",
        "-r requirements-extras.txt",
    ]
    assert install(extras)[1] == []


def test_an_interrupted_installation_starts_again(install, checkout):
    process, _ = install(FAKE_FAILURE="-r requirements.txt")
    assert process.returncode == 2
    assert "pip config list" in process.stderr
    (checkout / ".venv" / "incomplete").touch()
    process, calls = install()
    assert process.returncode == 0 and calls
    assert not (checkout / ".venv" / "incomplete").exists()


def test_an_environment_made_by_hand_is_used(install, checkout):
    install()
    (checkout / ".venv" / ".installed-requirements.txt").unlink()
    (checkout / ".venv" / "old").touch()
    assert install()[1]
    assert (checkout / ".venv" / "old").exists()


def test_a_link_to_an_environment_is_left_as_it_is(install, checkout, tmp_path):
    install()
    elsewhere = (checkout / ".venv").rename(tmp_path / "environment")
    (checkout / ".venv").symlink_to(elsewhere)
    (elsewhere / ".installed-requirements.txt").unlink()
    process, calls = install()
    assert process.returncode == 2 and not calls
    assert "make PY=" in process.stderr


@pytest.mark.parametrize(("arguments", "found"), [([], "3.11.9"), (["PYTHON=no-such-python"], "no-such-python")])
def test_a_wrong_or_missing_python_is_one_error_that_says_how_to_get_it(install, arguments, found):
    process, calls = install(*arguments, FAKE_OLD="1")
    assert process.returncode == 2 and not calls
    assert all(word in process.stderr for word in (found, "uv ", "pyenv ", "conda "))


def test_a_driver_selects_the_gpu_packages_and_tensorrt_is_optional(install):
    process, calls = install(FAKE_GPU="1", FAKE_FAILURE="tensorrt")
    assert process.returncode == 0
    assert calls == ["-r requirements-gpu.txt", "--no-deps -e .", "-r requirements-tensorrt.txt"]
    assert "requirements-tensorrt.txt" in process.stdout
    assert install(FAKE_GPU="1")[1] == []
    assert install(PIPELINE_DEVICE="cpu")[1] == []  # the GPU packages include the others


def test_pipeline_device_cpu_ignores_the_driver(install):
    assert install(FAKE_GPU="1", PIPELINE_DEVICE="cpu")[1] == ["-r requirements.txt", "--no-deps -e ."]
    assert "-r requirements-gpu.txt" in install(FAKE_GPU="1")[1]


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("run", "-m pipeline "),
        ("test", "-m pytest"),
        ("test-slow", "-m pytest tests/slow"),
        ("test-gpu", "-m pytest tests/gpu"),
        ("lab", "-m pipeline.lab"),
        ("tensorboard", "-m tensorboard.main --logdir logs"),
    ],
)
def test_targets_run_in_the_environment_or_in_the_given_one(target, command):
    ours = make(ROOT, "-n", target).stdout
    assert f".venv/bin/python {command}".strip() in ours
    assert "scripts/install.sh" in ours and ("requirements-extras.txt" in ours) == (target in ("test", "test-slow"))
    given = make(ROOT, "-n", target, "PY=/opt/python").stdout
    assert f"/opt/python {command}".strip() in given
    assert "scripts/install.sh" not in given


def test_an_interpreter_that_does_not_start_is_an_error():
    answer = make(ROOT, "lab", "PY=no-such-python")
    assert answer.returncode == 2
    assert "no-such-python" in answer.stderr


def test_the_gpu_tests_fail_without_a_gpu():
    if device.has_gpu():
        pytest.skip("this machine has a GPU")
    answer = make(ROOT, "test-gpu", f"PY={sys.executable}", "ARGS=-q")
    assert answer.returncode == 2
    assert "PIPELINE_DEVICE" in answer.stdout + answer.stderr
    assert "skipped" not in answer.stdout


def test_clean_keeps_the_runs(tmp_path):
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
