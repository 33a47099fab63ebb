"""The console command image-pipeline, and the package that installs it."""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml

import pipeline
from pipeline.commands import console

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def call(folder, *arguments):
    """Run the installed command's code in another folder."""
    code = "from pipeline.commands.console import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_help_lists_each_command_without_importing_the_libraries(tmp_path):
    code = "import sys; from pipeline.commands.console import _run_command; _run_command(); print(*sys.modules)"
    command = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert all(sum(line.startswith(f"  {name} ") for line in lines) >= 1 for name in console.COMMANDS)
    assert not {"numpy", "tensorflow", "hydra", "papermill"} & set(lines[-1].split())


@pytest.mark.parametrize("arguments", [["trian"], [], ["export"], ["export", "onnx"]])
def test_an_unknown_command_is_one_error(tmp_path, arguments):
    done = call(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert repr(" ".join(arguments)) in done.stderr and "--help" in done.stderr


@pytest.mark.parametrize("module", [module for module, _ in console.COMMANDS.values()])
def test_every_command_is_a_module_with_a_main_block(module):
    found = importlib.util.find_spec(module)
    if found.submodule_search_locations is not None:
        found = importlib.util.find_spec(f"{module}.__main__")
    assert '__name__ == "__main__"' in Path(found.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (["export", "tflite", "--help"], "export.tflite"),
        (["predict", "--help"], "export.tflite_infer"),
        (["predict", "--tensorrt", "--help"], "export.trt_infer"),
    ],
)
def test_arguments_are_passed_to_the_module(tmp_path, arguments, module):
    done = call(tmp_path, *arguments)
    assert done.returncode == 0
    assert f"python -m {module} " in done.stdout.splitlines()[0]


def test_commands_work_on_the_runs_of_the_current_folder(tmp_path):
    done = call(tmp_path, "compare")
    assert done.returncode == 2 and "runs" in done.stderr
    settings = ["epochs=1", "model.stages=[[8]]", "dataset.limit_per_class=30", "name=first"]
    done = call(tmp_path, "train", *settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/first/model.keras").is_file() and (tmp_path / "logs/first").is_dir()
    done = call(tmp_path, "compare")
    assert done.returncode == 0 and (tmp_path / "runs/comparison.csv").is_file()


# --- the package ----------------------------------------------------------------------------------------------------


def test_the_project_metadata():
    module, _, function = PROJECT["project"]["scripts"]["image-pipeline"].partition(":")
    assert getattr(importlib.import_module(module), function) is console.main
    assert f"## {pipeline.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").partition("# tests and development")[0].splitlines()
    required = {match[1] for line in lines if (match := re.match(r"([A-Za-z][\w-]*)==", line))}
    assert set(PROJECT["project"]["dependencies"]) == required


def test_the_package_contains_settings_sources_and_commands(tmp_path):
    for name in ("pipeline", "export", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    subprocess.run([*command, "-w", "dist"], cwd=tmp_path, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("dist/*.whl"))).namelist())
    expected = [
        path.relative_to(ROOT).as_posix()
        for folder, pattern in (("pipeline", "*.py"), ("export", "*.py"), ("pipeline/conf", "*.yaml"))
        for path in (ROOT / folder).rglob(pattern)
    ]
    expected += [f"pipeline/ops/src/{path.name}" for path in (ROOT / "pipeline/ops/src").iterdir() if path.is_file()]
    assert {*expected, "pipeline/py.typed"} <= names
    assert any(name.endswith("/LICENSE") for name in names)


# --- the hooks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("0*.ipynb")), ids=lambda path: path.stem)
def test_the_hook_undoes_what_jupyterlab_saves(path, tmp_path):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    entry = next(shlex.split(hook["entry"]) for hook in hooks if hook["id"] == "nbstripout")
    notebook = nbformat.read(path, 4)
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.7", "mimetype": "text/x-python"}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            cell.execution_count = number
            cell.outputs = [nbformat.v4.new_output("stream", text="done\n")]
    saved = tmp_path / path.name
    nbformat.write(notebook, saved)
    assert saved.read_bytes() != path.read_bytes()
    subprocess.run([Path(sys.executable).with_name(entry[0]), *entry[1:], saved], check=True)
    assert saved.read_bytes() == path.read_bytes()
