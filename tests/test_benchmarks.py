"""The benchmarks run from start to end, small, and keep what they say they keep."""

import json
import sys

import pytest

import benchmarks.experiments
import benchmarks.operations
import benchmarks.transcripts
import benchmarks.workers
from benchmarks import results
from pipeline import ops
from pipeline.core import device
from pipeline.core.errors import PipelineError

SMALL = ["model.stages=[[8],[16]]", "dataset.limit_per_class=40"]


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """A folder of its own for the results, and the command line."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()
        (path,) = tmp_path.glob("*.json")
        return json.loads(path.read_text(encoding="utf-8"))["figures"]

    return run


def test_experiments_keep_the_history_and_draw_it(kept, tmp_path, capsys):
    figures = kept(benchmarks.experiments, "highperf_cnn", "--set", "dataset=digits", "epochs=2", *SMALL)
    assert [sorted(logs) for logs in figures["history"]] == 2 * [
        ["accuracy", "images_per_second", "loss", "val_accuracy", "val_loss", "val_top5"]
    ]
    for logs in figures["history"]:
        assert 0 <= logs["val_accuracy"] <= logs["val_top5"] <= 1
    assert 0 <= figures["test_accuracy"] <= figures["test_top5"] <= 1
    assert figures["train_images"] > 300 and figures["classes"] == 10
    assert f"{figures['test_accuracy']:.2%}" in capsys.readouterr().out
    assert len(list(tmp_path.glob("experiment-highperf_cnn-*.png"))) == 1
    with pytest.raises(PipelineError, match="tiny_imagenet_vit"):
        kept(benchmarks.experiments, "nothing")


def test_a_quick_look_replaces_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for options, suffix in (
        (["--data-dir", "x"], ""),
        (["--data-dir=x", "--workers", "4"], ""),
        (["--epochs", "1"], "-options"),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmark", *options])
        name = f"speed-{device.describe()['device']}{suffix}.json"
        assert results.save("speed", {"figure": 1}) == tmp_path / name


def test_a_result_names_its_command_and_no_path_to_the_data(monkeypatch):
    given = ["one", "two", "--data-dir", "my data", "--set", "model.stages=[[8],[16]]"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *given])
    options = "--data-dir DATA --set 'model.stages=[[8],[16]]'"
    assert results.running("benchmarks.speed") == f"python -m benchmarks.speed one two {options}"
    assert results.running("benchmarks.speed", without={"one"}) == f"python -m benchmarks.speed two {options}"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--data-dir", "my data", "one", "two"])
    assert results.running("benchmarks.speed", {"one"}) == "python -m benchmarks.speed --data-dir DATA two"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--data-dir=my data"])
    assert results.running("benchmarks.speed") == "python -m benchmarks.speed --data-dir=DATA"


def test_all_questions_are_asked_by_one_command(monkeypatch, capfd):
    import benchmarks.__main__ as everything

    asked = []

    def call(command):
        asked.append(command[1:])
        return int("benchmarks.ops" in command)

    monkeypatch.setattr(everything.cli, "call", call)
    monkeypatch.setattr(device, "gpu_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--data-dir", "my data"])
    assert everything.main() == 1
    assert "ops" in capfd.readouterr().err
    assert ["-m", "benchmarks.experiments", "hybrid_resnet18", "--data-dir", "my data"] in asked
    assert len(asked) == len(everything.QUESTIONS) - 1 == 13  # two GPUs are asked for where there are two
    for arguments, word in (
        ([], "--data-dir"),
        (["speed"], "speed"),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        with pytest.raises(PipelineError, match=word):
            everything.main()


def test_transcripts_keep_what_a_command_printed_and_no_failure(kept, tmp_path, monkeypatch, capfd):
    if device.has_gpu():
        pytest.skip("an export with engines is tested in tests/gpu")
    script = (
        "import os, sys; print('in', os.getcwd()); print(sys.argv[1:]); sys.exit('1' in os.environ.get('FAIL', ''))"
    )
    monkeypatch.setitem(benchmarks.transcripts.COMMANDS, "pipeline", f"python - {tmp_path} DATA")

    def transcribe(words, shown, folder):
        assert words[0] == sys.executable
        return original([words[0], "-c", script, *words[2:]], shown, folder)

    original = benchmarks.transcripts.transcribe
    monkeypatch.setattr(benchmarks.transcripts, "transcribe", transcribe)
    data = str(tmp_path / "some data")
    figures = kept(benchmarks.transcripts, "pipeline", "--data-dir", data)
    assert figures["output"] == ["in .", f"['{tmp_path}', 'DATA']"]
    assert 0 <= figures["seconds"] < 60
    (path,) = tmp_path.glob("transcript-pipeline-cpu.json")
    path.unlink()
    monkeypatch.setenv("FAIL", "1")
    monkeypatch.setattr(sys, "argv", ["transcripts", "pipeline", "--data-dir", data])
    assert benchmarks.transcripts.main() == 1
    assert "pipeline" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.json"))
    for arguments, word in (
        (["speed"], "speed"),
        (["pipeline"], "--data-dir"),
        (["test_gpu"], "GPU"),
    ):
        monkeypatch.setattr(sys, "argv", ["transcripts", *arguments])
        with pytest.raises(PipelineError, match=word):
            benchmarks.transcripts.main()


def test_workers_are_measured_together_and_alone(kept, monkeypatch, tmp_path):
    monkeypatch.setenv("PIPELINE_DEVICE", "cpu")
    figures = kept(
        benchmarks.workers, "--counts", "2", "--epochs", "2", "--batch-size", "16", "--data-dir", str(tmp_path),
        "--set", "dataset=digits", "dataset.limit_per_class=40", "model=cnn", "model.stages=[[8],[16]]",
    )  # fmt: skip
    (run,) = figures["runs"]
    assert run["workers"] == 2 and run["batch_size"] == 32 and len(run["epochs"]) == 2
    assert run["images_per_second"] == run["epochs"][1] > 0
    assert 0 <= run["test_accuracy"] <= 1
    monkeypatch.setattr(sys, "argv", ["workers", "--data-dir", "x"])
    monkeypatch.setattr(device, "gpu_count", lambda: 1)
    with pytest.raises(PipelineError, match="--counts 1 2"):
        benchmarks.workers.main()


def test_operations_are_timed_both_ways(kept):
    if not ops.available():
        pytest.skip("the custom operations cannot be built here")
    figures = kept(
        benchmarks.operations, "--networks", "fashion_mlp", "--epochs", "1", "--batch-size", "32",
        "--set", "dataset.limit_per_class=40",
    )  # fmt: skip
    ways = {run["way"]: run for run in figures["runs"]}
    assert len(ways) == (3 if device.has_gpu() else 2)
    assert all(run["images_per_second"] > 0 for run in ways.values())
    custom, own = ways["custom operation"], ways["TensorFlow's own"]
    assert custom["loss"] == pytest.approx(own["loss"], rel=0.02)  # the same training, rounded elsewhere
