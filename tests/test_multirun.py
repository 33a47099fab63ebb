"""Several runs at once, their comparison, and the optional tracker."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import PipelineError, compare, config, runs, tracking, train

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = ["epochs=1", "batch_size=64", "model.stages=[[8],[16]]", "dataset.limit_per_class=40"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.train", *SMALL, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )


def test_multirun_makes_a_run_folder_for_each_combination_and_compares_them():
    answer = command("--multirun", "name=sweep", "augment=none,light", "seed=1,2")
    assert answer.returncode == 0, answer.stderr
    jobs = {run.path.name for run in runs.below(Path("runs/sweep"))}
    assert len(jobs) == 4
    assert all(("augment=none" in job) != ("augment=light" in job) for job in jobs)
    assert Path("runs/latest").resolve().parent == Path("runs/sweep").resolve()
    frame = compare.table(Path("runs/sweep"))
    assert sorted(frame["augment"]) == ["light", "light", "none", "none"]
    assert list(frame["test_accuracy"]) == sorted(frame["test_accuracy"], reverse=True)
    assert (
        frame["test_accuracy"] == [runs.find(f"sweep/{job}").metrics["test_accuracy"] for job in frame["run"]]
    ).all()
    assert Path("runs/sweep/comparison.png").stat().st_size > 5000
    table = answer.stdout[answer.stdout.rindex("\n", 0, answer.stdout.index("weights")) :]
    assert max(map(len, table.splitlines()[:-1])) <= 80 and "…" not in table  # through a pipe a terminal is 80 wide
    assert Path("runs/sweep/comparison.csv").read_text(encoding="utf-8").count("\n") == 5


def test_failing_job_of_a_multirun_does_not_stop_the_others():
    answer = command("--multirun", "name=mixed", "seed=1", "model.stages=[[8]],[[8],[8],[8],[8],[8],[8],[8]]")
    assert answer.returncode == 1
    assert "needs images of at least 64×64" in answer.stderr
    assert len(runs.below(Path("runs/mixed"))) == 1


def test_comparison_of_nothing_is_one_sentence():
    with pytest.raises(PipelineError, match="no folder runs"):
        compare.table(Path("runs"))
    Path("runs").mkdir()
    with pytest.raises(PipelineError, match="no finished run in runs"):
        compare.table(Path("runs"))


def test_unknown_tracker_and_missing_package_or_key_are_said_before_training(monkeypatch):
    with pytest.raises(PipelineError, match="'mlflow'; known values: none, wandb"):
        tracking.check_tracker("mlflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PipelineError, match=r"pip install -r requirements-extras.txt"):
        tracking.check_tracker("wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.delenv("NETRC", raising=False)
    with pytest.raises(PipelineError, match="has no key; run: wandb login"):
        train.train(config.compose([*SMALL, "tracker=wandb", "name=keyless"]))
    assert not Path("runs/keyless").exists()


def test_wandb_keeps_an_offline_run():
    pytest.importorskip("wandb", reason="the optional package wandb (requirements-extras.txt) is not installed")
    answer = command("tracker=wandb", "name=tracked", WANDB_MODE="offline")
    assert answer.returncode == 0, answer.stderr
    (record,) = Path("runs/tracked/wandb").glob("offline-run-*/*.wandb")
    assert b"val_accuracy" in record.read_bytes()


def test_custom_operations_train_without_xla_and_are_saved_as_tensorflows_own():
    from pipeline import datasets, ops

    settings = config.compose(
        ["model=fashion_mlp", "model.operations=custom", "dataset.limit_per_class=40", "epochs=2"]
    )
    if not ops.available():
        with pytest.raises(PipelineError, match="cannot be built here"):
            train.build_loop(settings, datasets.load("digits", limit_per_class=40))
        return
    loop = train.build_loop(settings, datasets.load("digits", limit_per_class=40))
    assert not loop.xla
    with pytest.raises(PipelineError, match="XLA cannot compile a custom operation"):
        train.compiles(True, "float32", loop.network)
    run = train.train({**settings, "name": "custom"})
    saved = [layer for layer in run.load_model()._flatten_layers() if getattr(layer, "has_custom_operation", False)]
    assert {layer.operations for layer in saved} == {"tensorflow"}
    assert run.metrics["history"][1]["loss"] < run.metrics["history"][0]["loss"]


def test_two_workers_share_each_batch_and_agree(tmp_path):
    import json
    import socket

    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            ports.append(probe.getsockname()[1])
    addresses = [f"localhost:{port}" for port in ports]
    workers = []
    for index in range(2):
        cluster = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PIPELINE_DEVICE": "cpu", "TF_CONFIG": cluster}
        command = [sys.executable, "-m", "pipeline.train", *SMALL, "epochs=2", "cluster=environment", "name=pair"]
        workers.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    answers = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], answers
    seen = [
        [line.split("  learning")[0] for line in output.splitlines() if line.startswith("epoch")]
        for output, _ in answers
    ]
    assert len(seen[0]) == 2 and seen[0] == seen[1]  # the same loss and accuracy: they hold the same weights
    assert runs.find("pair").metrics["epochs"] == 2


def test_cluster_without_its_description_is_one_sentence(monkeypatch):
    from pipeline import cluster

    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(PipelineError, match="needs the variable TF_CONFIG"):
        cluster.connect("environment")
    with pytest.raises(PipelineError, match="known values: none, slurm, environment"):
        cluster.connect("kubernetes")
