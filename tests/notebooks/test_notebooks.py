"""The committed notebooks from start to end, run from a folder outside the checkout, with fewer epochs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*_*.ipynb"))
pytestmark = pytest.mark.slow  # all notebooks run once


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """An empty folder in which all notebooks of the checkout were run; and what the command printed."""
    folder = tmp_path_factory.mktemp("workshop")
    command = [sys.executable, "-m", "pipeline.console", "notebooks", "--name", "book", "-p", "epochs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PIPELINE_LOG": str(folder / "tensorflow.log")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_run_is_complete_and_the_latest(workshop):
    folder, done = workshop
    assert sorted(path.name for path in folder.iterdir()) == ["logs", "runs", "tensorflow.log"]
    run = folder / "runs" / "book"
    assert (folder / "runs" / "latest").resolve() == run
    for name in ("model.keras", "metrics.json", "model_card.json", "config.yaml", "report.html", "export/export.json"):
        assert (run / name).is_file(), name
    assert "runs/book/export" in done.stdout.splitlines()[-1]
    recorded = json.loads((run / "export" / "export.json").read_text(encoding="utf-8"))
    assert "model_int8.tflite" in recorded
    assert "model_int8.tflite" in done.stdout
    assert done.stderr == "", "the terminal stays free of noise"


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_cell_ran_and_every_chapter_shows_an_image(workshop, name):
    executed = nbformat.read(workshop[0] / "runs" / "book" / "notebooks" / f"{name}.ipynb", 4)
    code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    noise = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert not [text for text in noise if "Warning" in text or "Traceback" in text]


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_first_cell_chooses_the_folder_of_runs(name, tmp_path):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells
    first = next(cell.source for cell in cells if cell.cell_type == "code")
    environment = {key: value for key, value in os.environ.items() if key != "PIPELINE_FOLDER"}

    def chosen(folder, **variables):
        command = [sys.executable, "-c", f"{first}\nprint(Path.cwd())"]
        done = subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True)
        return Path(done.stdout.strip())

    assert chosen(ROOT / "notebooks") == ROOT  # an editor
    assert chosen(tmp_path) == tmp_path  # papermill's own command
    assert chosen(ROOT / "notebooks", PIPELINE_FOLDER=str(tmp_path)) == tmp_path  # the commands
