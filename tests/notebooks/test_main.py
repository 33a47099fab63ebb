"""`python -m pipeline`: order, parameters, failures, Ctrl-C, and the report."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from pipeline import __main__
from pipeline.core.errors import PipelineError
from pipeline.notebooks import batch, chapters, report

ROOT = Path(__file__).resolve().parents[2]


def write(name, parameters, *cells):
    """Write `notebooks/NAME.ipynb` in the current folder: a heading, the parameters, one code cell each."""
    tagged = v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    content = [v4.new_markdown_cell(f"# Chapter {name}"), tagged, *map(v4.new_code_cell, cells)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    Path("notebooks").mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=content, metadata={"kernelspec": kernel}), f"notebooks/{name}.ipynb")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder in place of the repository, on a machine without Jupyter settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def printed(path):
    """What the cells of an executed notebook printed, as lines."""
    outputs = [o for cell in nbformat.read(path, 4).cells if cell.cell_type == "code" for o in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout").splitlines()


def start(*arguments, **environment):
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, as CI may be one, ignores Ctrl-C, and so would every process below it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


# --- the whole ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects what a report points at."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.anchors, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag == "a" and attributes.get("href", "").startswith("#"):
            self.anchors.append(attributes["href"][1:])
        elif tag in ("script", "img", "iframe", "source"):
            self.fetched.append(attributes.get("src") or "")
        elif tag == "link":
            self.fetched.append(attributes.get("href") or "")


def test_notebooks_run_in_order_in_this_interpreter_with_their_own_parameters(folder):
    # Written in another order, on a machine whose user has another Python as the kernel python3 and no home to write.
    write(
        "02_second",
        "name = None\nepochs = 5\nrate = 1.0",
        "print(name, epochs + 1, rate / 2)",
        "print(open('first').read())",
    )
    write("10_third", "run = 'runs/latest'\nlimit = None", "print(run, limit)")
    image_cell = "from IPython.display import Image\nimport base64\nImage(base64.b64decode(%r), format='png')"
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    write(
        "01_first",
        "data = 'digits'",
        "import sys, os\nprint(sys.executable, os.getcwd(), data)\n_ = open('first', 'w').write('was here')",
        image_cell % pixel,
    )
    write("draft", "a = 1", "raise ValueError('not a chapter')")
    other = folder / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    content = {"argv": ["/bin/false"], "display_name": "other", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(content), encoding="utf-8")

    arguments = ["--name", "mine", "-p", "epochs", "3", "-p", "rate", "2", "-p", "limit", "10", "-p", "data", "2024"]
    places = {"JUPYTER_PATH": str(folder / "jupyter"), "JUPYTER_DATA_DIR": str(folder / "jupyter"), "HOME": "/dev/null"}
    process = start(*arguments, **places)
    output, errors = process.communicate(timeout=120)

    assert process.returncode == 0, errors
    assert [line.split()[0] for line in output.splitlines()[:3]] == ["01_first", "02_second", "10_third"]
    executed = folder / "runs" / "mine" / "notebooks"
    assert printed(executed / "01_first.ipynb") == [f"{sys.executable} {folder} 2024"]
    assert printed(executed / "02_second.ipynb") == ["mine 4 1.0", "was here"]
    assert printed(executed / "10_third.ipynb") == ["runs/mine 10"]
    assert errors == ""
    assert "runs/mine/report.html" in output.splitlines()[-1]
    assert not any(
        (folder / "notebooks" / f"{n}.ipynb").read_text(encoding="utf-8").count('"text"')
        for n in ("01_first", "02_second")
    )

    page = Page((folder / "runs" / "mine" / "report.html").read_text(encoding="utf-8"))
    assert page.anchors == ["01_first", "02_second", "10_third"]
    assert set(page.anchors) <= page.ids
    assert any(source.startswith("data:image/png") for source in page.fetched)
    assert all(not source or source.startswith("data:") for source in page.fetched)
    text = (folder / "runs" / "mine" / "report.html").read_text(encoding="utf-8")
    assert text.index("Chapter 01_first") < text.index("Chapter 02_second") < text.index("was here")
    assert not re.search(r"import\([\"']https?:|@import|url\(https?:", text)


def test_a_second_call_on_a_run_keeps_the_other_chapters_in_the_report(folder, capsys):
    write("01_first", "name = None", "print('first was here')")
    write("02_second", "run = None", "print('second was here')")
    __main__.main(["--name", "mine"])
    report = folder / "runs" / "mine" / "report.html"
    (folder / "runs" / "mine" / "model.keras").touch()
    __main__.main(["--name", "mine", "--notebooks", "02_second"])
    text = report.read_text(encoding="utf-8")
    assert "first was here" in text and "second was here" in text
    with pytest.raises(PipelineError, match="runs/mien"):
        __main__.main(["--name", "mien", "--notebooks", "02_second"])
    assert not (folder / "runs" / "mien").exists()


def test_the_table_of_artifacts_and_where_they_are(capsys):
    row = {
        "size_bytes": 2048,
        "test_accuracy": 0.9876,
        "agreement": 1.0,
        "latency_ms": 1.5,
        "images_per_second": 4321.0,
    }
    write(
        "01_train",
        "name = None",
        f"""import json, pathlib
folder = pathlib.Path("runs", name)
(folder / "export").mkdir()
for file in ("model.keras", "export/model_int8.tflite"):
    (folder / file).write_text("x", encoding="utf-8")
(folder / "export" / "export.json").write_text(json.dumps({{"model_int8.tflite": {row!r}}}), encoding="utf-8")""",
    )
    __main__.main(["--name", "trained"])
    output = capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ")
    shown = next(line for line in output.splitlines() if "model_int8.tflite" in line)
    for value in ("2 KiB", "98.76%", "1.50 ms", "4,321"):
        assert value in shown
    assert "runs/trained/export" in output.splitlines()[-1]

    # The later chapters again, on the run that is there; training into it again is refused.
    write("02_use", "run = None", "print(run)")
    __main__.main(["--name", "trained", "--notebooks", "02_use"])
    assert printed("runs/trained/notebooks/02_use.ipynb") == ["runs/trained"]
    with pytest.raises(PipelineError, match="runs/trained"):
        __main__.main(["--name", "trained"])


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failing_cell_is_named_and_its_copy_kept(capsys):
    write("01_good", "a = 1", "print('fine')")
    write(
        "02_bad",
        "a = 1",
        "print('before')",
        "\n# why\nimport math\nraise ValueError('the shape is (3,)\\nand so on')",
        "print('never')",
    )
    write("03_after", "a = 1", "print('never')")
    with pytest.raises(PipelineError) as failed:
        __main__.main(["--name", "x"])
    assert failed.value.exit_code == 1
    assert "raise ValueError('the shape is (3,)\\nand so on')" in str(failed.value)
    assert printed("runs/x/notebooks/02_bad.ipynb") == ["before"]
    assert not Path("runs/x/notebooks/03_after.ipynb").exists()
    assert "01_good" in capsys.readouterr().out
    # The same name again, once the notebook is fixed: an unfinished run does not block the name.
    write("02_bad", "a = 1", "print('mended')")
    __main__.main(["--name", "x", "--notebooks", "02", "03"])
    assert printed("runs/x/notebooks/02_bad.ipynb") == ["mended"]


def test_a_killed_kernel_is_one_error():
    write("01_hungry", "a = 1", "print('before')", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(PipelineError, match="import os") as died:
        __main__.main(["--name", "x"])
    assert died.value.exit_code == 1
    assert printed("runs/x/notebooks/01_hungry.ipynb") == ["before"]


def test_ctrl_c_stops_the_kernel_and_says_so(folder):
    write(
        "01_long",
        "a = 1",
        "print('before')",
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(100)",
    )
    process = start("--name", "x")
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists() or not (folder / "pid").read_text(encoding="utf-8"):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    kernel = int((folder / "pid").read_text(encoding="utf-8"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "01_long" in errors
    assert "Traceback" not in errors
    assert printed("runs/x/notebooks/01_long.ipynb") == ["before"]
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


def test_a_second_process_on_the_same_folder_is_an_error():
    first = batch._run_folder(None, trains=True)
    assert re.fullmatch(r"notebooks-\d{8}-\d{6}", first.name)
    write("01_a", "a = 1")
    executed = first / "notebooks"
    executed.mkdir(parents=True)
    with (executed / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(PipelineError, match=first.name):
            __main__.main(["--name", first.name])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["-p", "epoch", "1"], "shuffle"),
        (["-p", "epochs", "many"], "many"),
        (["-p", "epochs", "1.5"], r"1\.5"),
        (["-p", "shuffle", "maybe"], "maybe"),
        (["--notebooks", "01", "-p", "epochs", "1"], "02_b"),
        (["--notebooks", "03_c"], "03_c"),
        (["--notebooks", "0"], r"\b0\b"),
        (["--name", "../out"], r"\.\./out"),
        (["--name", "latest"], "latest"),
        (["-p", "name", ""], "name"),
    ],
)
def test_wrong_use_is_one_error_before_anything_runs(folder, arguments, word):
    write("01_a", "dataset = 'digits'\nshuffle = True")
    write("02_b", "name = None\nepochs = 5")
    with pytest.raises(PipelineError, match=word) as wrong:
        __main__.main(arguments)
    assert wrong.value.exit_code == 2
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["-p", "epochs", "0"], "epochs"),
        (["-p", "model", "lenet"], "lenet"),
        (["-p", "seed", "-1"], "seed"),
    ],
)
def test_what_the_training_would_refuse_is_said_before_anything_runs(folder, arguments, word):
    write("01_data", "dataset = 'digits'")
    write("03_train", "dataset = 'digits'\nmodel = 'cnn'\nepochs = 5\nseed = 0\nname = None")
    with pytest.raises(PipelineError, match=word):
        __main__.main(arguments)
    assert not (folder / "runs").exists()


def test_without_notebooks_or_with_a_damaged_one_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(chapters, "CHECKOUT", folder / "site-packages")
    with pytest.raises(PipelineError, match=folder.name):
        __main__.main([])
    (folder / "notebooks").mkdir()
    (folder / "notebooks" / "01_a.ipynb").write_text("{", encoding="utf-8")
    with pytest.raises(PipelineError, match=r"notebooks/01_a.ipynb"):
        __main__.main([])


def test_the_notebooks_of_the_checkout_are_used_in_another_folder(folder):
    (folder / "notebooks").mkdir()  # a folder of that name without chapters does not hide them
    found = chapters.discover()
    assert [chapter.path.parent for chapter in found] == [ROOT / "notebooks"] * len(found) and len(found) >= 6


def test_runs_that_cannot_be_written_are_one_error(folder):
    write("01_a", "a = 1")
    (folder / "runs").write_text("a file", encoding="utf-8")
    with pytest.raises(OSError, match="runs/x"):
        __main__.main(["--name", "x"])


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("3", 1, 3),
        ("3", 1.0, 3.0),
        ("3", "digits", "3"),
        ("3", None, 3),
        ("~/data", None, "~/data"),
        ("true", False, True),
        ("0", True, False),
        ("None", 5, None),
        ("[1, 2]", [0], [1, 2]),
        ("-1", 0, -1),
    ],
)
def test_parameters_take_the_type_of_their_default(text, default, value):
    converted = chapters.convert("p", text, default)
    assert converted == value
    assert type(converted) is type(value)


def test_two_chapters_with_the_same_cell_ids_make_one_valid_report(folder):
    for name in ("01_a", "02_b"):
        notebook = v4.new_notebook(cells=[v4.new_markdown_cell("## Where [it] begins", id="same")])
        nbformat.write(notebook, folder / f"{name}.ipynb")
    report.write_report([folder / "01_a.ipynb", folder / "02_b.ipynb"], "both", folder / "report.html")
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.anchors == ["01_a", "02_b"]
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "Where it begins" in text
    assert "<ol>" not in text  # the headings of the notebooks already have numbers
