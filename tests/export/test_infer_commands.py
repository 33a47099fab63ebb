"""The commands: standard output, standard error and exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from export import infer, tflite_infer, trt_infer
from pipeline import runs
from pipeline.core.errors import PipelineError
from tests.conftest import REPOSITORY


@pytest.fixture
def workdir(exported_run, digit_images, tmp_path, monkeypatch):
    """A working directory with runs/latest and a folder of digits; images/0.png is the first test digit, and so on."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "small").symlink_to(exported_run.path)
    folder = tmp_path / "images" / "inner [bold]"
    folder.mkdir(parents=True)
    for index, image in enumerate(digit_images[0][:3]):
        Image.fromarray(image).save((folder if index else tmp_path / "images") / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    runs.set_latest(tmp_path / "runs" / "small")
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def call(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    return main()


def run_command(folder, *arguments):
    """Run a command in a new process; returns (exit code, standard output, standard error)."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PIPELINE_DEVICE": "cpu", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_tflite_infer_prints_a_line_for_each_image_and_nothing_else(workdir, digit_images, exported_run):
    code, output, errors = run_command(workdir, "export.tflite_infer", "images")
    assert (code, errors) == (0, "")
    lines = [line for line in output.splitlines() if ".png" in line]
    assert len(lines) == 3
    expected = exported_run.load_model().predict(digit_images[0][:3], verbose=0).argmax(1)
    for line, label in zip(lines, expected, strict=True):
        assert re.search(r"\.png +(\d) ", line)[1] == str(label)
        assert line.count("%") == 3
    assert "inner [bold]/1.png" in output


def test_prediction_creates_no_files_in_the_current_folder(exported_run, digit_images, tmp_path, monkeypatch):
    monkeypatch.delenv("PIPELINE_LOG", raising=False)
    Image.fromarray(digit_images[0][0]).save(tmp_path / "0.png")
    (tmp_path / "empty").mkdir()
    code, _, errors = run_command(tmp_path / "empty", "export.tflite_infer", "../0.png", "--run", exported_run.path)
    assert (code, errors) == (0, "")
    assert list((tmp_path / "empty").iterdir()) == []


def test_json_with_unreadable_images(workdir, monkeypatch, capsys):
    (workdir / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    (workdir / "empty").mkdir()
    paths = ["images/0.png", "broken.png", "missing.png", "empty", "images/inner [bold]/2.png"]
    code = call(monkeypatch, tflite_infer.main, *paths, "--json", "--top", "2")
    captured = capsys.readouterr()
    assert code == 1
    answers = json.loads(captured.out)
    assert [answer["path"] for answer in answers] == paths
    assert [set(answer) for answer in answers[1:4]] == [{"path", "error"}] * 3
    for answer in (answers[0], answers[4]):
        assert set(answer) == {"path", "label", "probability", "top"}
        assert answer["top"][0]["label"] == answer["label"]
        assert len(answer["top"]) == 2
    for path in paths[1:4]:
        assert sum(line.startswith(f"{path}: ") for line in captured.err.splitlines()) == 1


def test_nothing_is_printed_when_all_images_are_unreadable(workdir, monkeypatch, capsys):
    assert call(monkeypatch, tflite_infer.main, "missing.png") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "missing.png" in captured.err and captured.err.count("\n") == 1


def test_artifact_selects_the_file(workdir, monkeypatch, capsys, exported_run):
    for given, used in {
        None: "model_float32.tflite",
        "model_int8.tflite": "model_int8.tflite",
        exported_run.export_dir / "model_float16.tflite": "model_float16.tflite",
    }.items():
        extra = [] if given is None else ["--artifact", given]
        assert call(monkeypatch, tflite_infer.main, "images/0.png", "--run", "small", *extra) == 0
        assert used in capsys.readouterr().out


def test_a_missing_file_names_the_command_that_creates_it(workdir, monkeypatch, trained_run):
    with pytest.raises(PipelineError, match=r"export.tflite"):
        call(monkeypatch, tflite_infer.main, "images", "--run", trained_run.path)
    with pytest.raises(PipelineError, match="model_int4"):
        call(monkeypatch, tflite_infer.main, "images", "--artifact", "model_int4.tflite")
    with pytest.raises(PipelineError, match=r"model_int8\.tflite"):
        call(monkeypatch, tflite_infer.main, "images", "--artifact", "int8")
    monkeypatch.setattr(trt_infer.tensorrt_library, "require", lambda: (8, 6, 1))
    with pytest.raises(PipelineError, match=r"export.tftrt"):
        call(monkeypatch, trt_infer.main, "images")


def test_a_copied_keras_file_without_class_names_gives_a_note(workdir, monkeypatch, capsys, exported_run):
    shutil.copy(exported_run.model_path, workdir / "alone.keras")
    assert call(monkeypatch, tflite_infer.main, "images/0.png", "--artifact", "alone.keras") == 0
    captured = capsys.readouterr()
    assert "class " in captured.out
    assert captured.err.startswith("note: ") and captured.err.count("\n") == 1 and "alone.keras" in captured.err


@pytest.mark.parametrize("main", [tflite_infer.main, trt_infer.main])
def test_help_has_an_example(monkeypatch, capsys, main):
    with pytest.raises(SystemExit):
        call(monkeypatch, main, "--help")
    printed = capsys.readouterr().out
    assert "Example: python -m export." in printed and "`" not in printed


def test_a_missing_run_names_the_command_that_creates_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match=r"pipeline.train"):
        call(monkeypatch, tflite_infer.main, "image.png")


@pytest.mark.parametrize("command", ["export.trt_infer image.png", "export.tftrt"])
def test_tensorrt_commands_without_a_gpu(tmp_path, command):
    code, output, errors = run_command(tmp_path, *command.split())
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert "export.tflite" in errors


@pytest.mark.parametrize("wrong", [["--top", "0", "x.png"], ["--top", "three", "x.png"], []])
def test_wrong_use_is_exit_code_2(workdir, monkeypatch, capsys, wrong):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tflite_infer.main, *wrong)
    assert stopped.value.code == 2
    assert "export.tflite_infer" in capsys.readouterr().err


def test_folders_are_searched_recursively_in_order(workdir):
    (workdir / "images" / "notes.txt").write_text("no image", encoding="utf-8")
    (workdir / "images" / "scan.TIFF").write_bytes(b"a format that cannot be read")
    (workdir / "images" / "Upper.PNG").write_bytes((workdir / "images" / "0.png").read_bytes())
    inner = ["images/inner [bold]/1.png", "images/inner [bold]/2.png"]
    expected = ["images/0.png", "images/Upper.PNG", *inner, "images/scan.TIFF"]
    assert list(infer._files(["images"])) == expected
    assert list(infer._files(["images/0.png", "images/0.png"])) == ["images/0.png"] * 2


def test_output_that_cannot_be_written_is_one_line(workdir):
    command = f"{sys.executable} -m export.tflite_infer images --json > /dev/full"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, shell=True, cwd=workdir, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr and done.stderr.count("\n") == 1


def test_export_tflite_command(workdir, trained_run):
    shutil.copytree(trained_run.path, workdir / "runs" / "fresh")
    code, output, errors = run_command(workdir, "export.tflite", "--run", "fresh")
    assert (code, errors) == (0, "")
    lines = [line for line in output.splitlines() if "%" in line]
    names = ["model.keras", "model_float32.tflite", "model_float16.tflite", "model_int8.tflite"]
    assert [line.split()[0] for line in lines] == names
    assert str(workdir / "runs" / "fresh" / "export") in output.splitlines()[-1]


def test_export_saved_model_command(workdir, trained_run):
    shutil.copytree(trained_run.path, workdir / "runs" / "fresh")
    code, output, errors = run_command(workdir, "export.saved_model", "--run", "runs/fresh")
    assert (code, output, errors) == (0, f"{workdir / 'runs' / 'fresh' / 'export' / 'saved_model'}\n", "")
