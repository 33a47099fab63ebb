"""Small runs of the benchmarks, and their result files."""

import importlib.util
import json
import sys

import pytest

import benchmarks.experiments
import benchmarks.operations
import benchmarks.workers
from benchmarks import results
from pipeline import ops
from pipeline.core import device
from pipeline.core.errors import PipelineError

SMALL = ["model.stages=[[8],[16]]", "dataset.limit_per_class=40"]


@pytest.fixture(autouse=True)
def figures_of(tmp_path, monkeypatch):
    """Runs a benchmark with a temporary results folder; returns its figures."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()
        (path,) = tmp_path.glob("*.json")
        return json.loads(path.read_text(encoding="utf-8"))["figures"]

    return run


def test_experiments_save_and_draw_the_history(figures_of, tmp_path, capsys):
    figures = figures_of(benchmarks.experiments, "highperf_cnn", "--set", "dataset=digits", "epochs=2", *SMALL)
    assert [sorted(logs) for logs in figures["history"]] == 2 * [
        ["accuracy", "images_per_second", "loss", "val_accuracy", "val_loss", "val_top5"]
    ]
    for logs in figures["history"]:
        assert 0 <= logs["val_accuracy"] <= logs["val_top5"] <= 1
    assert 0 <= figures["test_accuracy"] <= figures["test_top5"] <= 1
    assert figures["train_images"] > 300 and figures["classes"] == 10
    assert f"{figures['test_accuracy']:.2%}" in capsys.readouterr().out
    assert len(list(tmp_path.glob("experiment-highperf_cnn-*.png"))) == 1
    with pytest.raises(SystemExit, match="2"):
        figures_of(benchmarks.experiments, "nothing")
    assert "tiny_imagenet_vit" in capsys.readouterr().err


def test_a_benchmark_with_options_does_not_replace_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for options, suffix in (
        (["--data-dir", "x"], ""),
        (["--data-dir=x"], ""),
        (["--epochs", "1"], "-options"),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmark", *options])
        name = f"speed-{device.describe()['device']}{suffix}.json"
        assert results.save("speed", {"figure": 1}) == tmp_path / name


def test_a_result_contains_its_command_without_the_path_to_the_data(monkeypatch):
    given = ["one", "two", "--data-dir", "my data", "--set", "model.stages=[[8],[16]]"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *given])
    options = "--data-dir DATA --set 'model.stages=[[8],[16]]'"
    assert results.running("benchmarks.speed") == f"python -m benchmarks.speed one two {options}"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--data-dir=my data"])
    assert results.running("benchmarks.speed") == "python -m benchmarks.speed --data-dir=DATA"


def test_one_command_reruns_every_benchmark(monkeypatch, capfd):
    import benchmarks.__main__ as everything

    commands = []

    def call(command):
        commands.append(command[1:])
        return int("benchmarks.ops" in command)

    monkeypatch.setattr(everything.cli, "call", call)
    monkeypatch.setattr(device, "gpu_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--data-dir", "my data"])
    assert everything.main() == 1
    output = capfd.readouterr()
    assert "ops" in output.err and "tee" in output.out
    assert ["-m", "benchmarks.experiments", "hybrid_resnet18", "--data-dir", "my data"] in commands
    assert all(importlib.util.find_spec(module) for _, module, *_ in commands)
    assert len(commands) == 10  # "workers" needs two GPUs
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    with pytest.raises(SystemExit, match="2"):
        everything.main()
    assert "--data-dir" in capfd.readouterr().err


def test_workers_are_measured(figures_of, monkeypatch, tmp_path):
    monkeypatch.setenv("PIPELINE_DEVICE", "cpu")
    figures = figures_of(
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


def test_operations_are_timed_both_ways(figures_of):
    if not ops.available():
        pytest.skip("the custom operations cannot be built here")
    figures = figures_of(
        benchmarks.operations, "--networks", "fashion_mlp", "--epochs", "1", "--batch-size", "32",
        "--set", "dataset.limit_per_class=40",
    )  # fmt: skip
    ways = {run["way"]: run for run in figures["runs"]}
    assert len(ways) == (3 if device.has_gpu() else 2)
    assert all(run["images_per_second"] > 0 for run in ways.values())
    custom, own = ways["custom operation"], ways["TensorFlow's own"]
    assert custom["loss"] == pytest.approx(own["loss"], rel=0.02)  # the same training with other rounding
