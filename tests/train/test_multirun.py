"""Several runs at once, their comparison, and the optional tracker."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline import runs
from pipeline.core import config, device
from pipeline.core.errors import PipelineError
from pipeline.data.load import load_dataset
from pipeline.evaluate import compare
from pipeline.train import callbacks, cluster, setup, train

REPOSITORY = Path(__file__).resolve().parents[2]
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
    Path("Fotos (a, b)").mkdir()  # digits ignores it; a comma in a path is no list of values
    answer = command("--multirun", "name=sweep", "augment=none,light", "seed=1,2", "data_dir=Fotos (a, b)")
    assert answer.returncode == 0, answer.stderr
    jobs = {run.path.name for run in runs.below(Path("runs/sweep"))}
    assert len(jobs) == 4
    assert jobs == {f"augment={policy},seed={seed}" for policy in ("none", "light") for seed in (1, 2)}
    assert {path.name for path in Path("runs/sweep").iterdir()} - jobs == {"comparison.csv", "comparison.png"}
    assert Path("runs/latest").resolve().parent == Path("runs/sweep").resolve()
    frame = compare.table(Path("runs/sweep"))
    assert sorted(frame["augment"]) == ["light", "light", "none", "none"]
    assert list(frame["test_accuracy"]) == sorted(frame["test_accuracy"], reverse=True)
    assert (
        frame["test_accuracy"] == [runs.find(f"sweep/{job}").metrics["test_accuracy"] for job in frame["run"]]
    ).all()
    assert Path("runs/sweep/comparison.png").stat().st_size > 5000
    table = answer.stdout[answer.stdout.rindex("\n", 0, answer.stdout.index("weights")) :]
    assert "…" not in table and all(f" {job} " in table for job in jobs)  # through a pipe no name is broken
    assert Path("runs/sweep/comparison.csv").read_text(encoding="utf-8").count("\n") == 5


def test_seeds_are_averaged(capsys):
    settings = config.compose([*SMALL, "dataset.data_dir=x"])
    card = {
        "name": "", "model": "cnn", "dataset": "digits", "class_names": ["0", "1"], "input_shape": [8, 8, 1],
        "mean": [0.5], "std": [0.5], "precision": "float32", "parameters": 10, "data_digest": "", "versions": {},
    }  # fmt: skip
    metrics = {"epochs": 1, "train_seconds": 20.0, "images_per_second": 10.0, "validation_accuracy": 0.5}
    for rate, seed, accuracy in ((0.1, 0, 0.5), (0.1, 1, 0.6), (0.1, 2, 0.7), (0.2, 0, 0.65), (0.3, 0, 0.8)):
        folder = Path("runs/sweep", f"{rate} {seed}")
        folder.mkdir(parents=True)
        (folder / "model.keras").touch()
        optimizer = settings.optimizer.model_copy(update={"learning_rate": rate})
        values = settings.model_copy(update={"seed": seed, "optimizer": optimizer}).plain()
        (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        (folder / "model_card.json").write_text(json.dumps(card), encoding="utf-8")
        (folder / "metrics.json").write_text(json.dumps({**metrics, "test_accuracy": accuracy}), encoding="utf-8")
    (row,) = compare.seeds(compare.table(Path("runs/sweep"))).to_dict("records")
    assert (row["run"], row["seeds"]) == ("0.1 2", 3)
    assert (row["mean"], row["std"]) == (pytest.approx(0.6), pytest.approx(0.1))  # of 0.5, 0.6 and 0.7
    compare.report(Path("runs/sweep"))
    printed = capsys.readouterr().out
    assert "60.00%" in printed and "10.00%" in printed and "batch size 64" in printed
    header = Path("runs/sweep/comparison.csv").read_text(encoding="utf-8").splitlines()[0]
    assert "optimizer,learning_rate,batch_size" in header and "group" not in header


def test_a_sweep_reached_through_a_link_is_found(tmp_path):
    (tmp_path / "elsewhere/sweep/seed=1").mkdir(parents=True)
    (tmp_path / "elsewhere/sweep/seed=1/model.keras").touch()
    Path("runs").mkdir()
    Path("runs/sweep").symlink_to(tmp_path / "elsewhere/sweep")
    assert [run.path for run in runs.below(Path("runs"))] == [tmp_path / "elsewhere/sweep/seed=1"]
    with pytest.raises(PipelineError, match="sweep/seed=1"):
        runs.find("nothing")


def test_failing_job_of_a_multirun_does_not_stop_the_others():
    answer = command("--multirun", "name=mixed", "seed=1", "model.stages=[[8]],[[8],[8],[8],[8],[8],[8],[8]]")
    assert answer.returncode == 1
    assert "64" in answer.stderr
    assert len(runs.below(Path("runs/mixed"))) == 1


def test_ctrl_c_ends_the_whole_sweep():
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.train", *SMALL, "--multirun", "name=long", "epochs=500", "seed=1,2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for _ in range(1200):
        if list(Path("runs/long/seed=1/checkpoints").glob("epoch-*.npz")) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, problems = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.count("--- seed=") == 1 and not Path("runs/long/seed=2").exists()
    assert problems.count("\n") == 1
    assert "resume=runs/long/seed=1" in problems


def test_a_damaged_run_is_left_out_of_the_comparison(capsys):
    for name in ("whole", "hurt"):
        train.train(
            config.compose([*SMALL, f"name={name}", *(["+augment.rotate.degrees=5"] if name == "whole" else [])])
        )
    Path("runs/hurt/config.yaml").write_text("a: [", encoding="utf-8")
    frame = compare.table(Path("runs"))
    assert list(frame["run"]) == ["whole"] and list(frame["augment"]) == ["digits*"]
    assert "hurt" in capsys.readouterr().err


def test_damaged_runs_are_left_out_of_the_comparison(capsys):
    train.train(config.compose([*SMALL, "name=whole"]))
    settings = yaml.safe_load(Path("runs/whole/config.yaml").read_text(encoding="utf-8"))
    for name, file, content in (
        ("nothing", "metrics.json", "null"),
        ("unevaluated", "metrics.json", "{}"),
        ("settings", "config.yaml", ""),
        ("card", "model_card.json", '{"class_names": 5}'),
        ("policy", "config.yaml", yaml.safe_dump({**settings, "augment": "none"})),
    ):
        shutil.copytree("runs/whole", f"runs/{name}")
        Path("runs", name, file).write_text(content, encoding="utf-8")
    capsys.readouterr()
    assert list(compare.table(Path("runs"))["run"].to_numpy()) == ["whole"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5
    words = {"nothing": "", "unevaluated": "test_accuracy", "settings": "", "card": "", "policy": "none"}
    for name, word in words.items():
        assert any(re.search(rf"\b{name}\b", line) and word in line for line in said)
    with pytest.raises(PipelineError, match="runs/whole"):
        compare.table(Path("runs/whole"))


def test_comparison_of_nothing_is_one_sentence():
    with pytest.raises(PipelineError, match="runs"):
        compare.table(Path("runs"))
    Path("runs").mkdir()
    with pytest.raises(PipelineError, match="runs"):
        compare.table(Path("runs"))


def test_an_unknown_tracker_and_a_missing_package_end_in_one_message(monkeypatch):
    with pytest.raises(PipelineError, match="mlflow"):
        config.compose(["tracker=mlflow"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PipelineError, match=r"requirements-extras.txt"):
        train.train(config.compose([*SMALL, "tracker=wandb", "name=missing"]))
    assert not Path("runs/missing").exists()


@pytest.mark.parametrize("key", [None, "a" * 40])
def test_wandb_without_a_key_or_a_server_ends_in_one_message(tmp_path, monkeypatch, key):
    wandb = pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    from pipeline.train import workers

    for name in ("API_KEY", "MODE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://localhost:{workers.free_ports(1)[0]}")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(callbacks, "WANDB_SECONDS_TO_CONNECT", 5)
    wandb.teardown()  # it reads its settings once
    with pytest.raises(PipelineError, match="WANDB_MODE=offline"):
        train.train(config.compose([*SMALL, "tracker=wandb", "name=keyless"]))
    assert not Path("runs/keyless").exists()
    wandb.teardown()


def test_wandb_keeps_an_offline_run():
    pytest.importorskip("wandb", reason="the optional package wandb (requirements-extras.txt) is not installed")
    answer = command("tracker=wandb", "name=tracked", WANDB_MODE="offline")
    assert answer.returncode == 0, answer.stderr
    (record,) = Path("runs/tracked/wandb").glob("offline-run-*/*.wandb")
    assert b"val_accuracy" in record.read_bytes()
    assert f"wandb sync {record.parent}" in answer.stdout


def test_wandb_keeps_the_jobs_of_a_sweep_apart_also_after_one_that_failed():
    pytest.importorskip("wandb", reason="the optional package wandb (requirements-extras.txt) is not installed")
    answer = command(
        "--multirun", "tracker=wandb", "name=a (b)", "optimizer.learning_rate=1e30,0.01", WANDB_MODE="offline"
    )
    assert answer.returncode == 1
    assert "precision=float32" in answer.stderr
    assert [path.name for path in Path("runs/a (b)").iterdir() if path.is_dir()] == ["optimizer.learning_rate=0.01"]
    (record,) = Path("runs/a (b)").rglob("*.wandb")
    assert record.parents[2].name == "optimizer.learning_rate=0.01"


def test_custom_operations_train_without_xla_and_are_saved_as_tensorflows_own():
    from pipeline import ops

    chosen = ["model=fashion_mlp", "model.operations=custom", "dataset.limit_per_class=40", "epochs=2", "name=custom"]
    with pytest.raises(PipelineError, match="xla=clusters"):
        setup.resolve(config.compose([*chosen, "xla=true"]))
    if not device.has_gpu():
        with pytest.raises(PipelineError, match="xla=false"):
            setup.resolve(config.compose([*chosen, "xla=clusters"]))
    settings = setup.resolve(config.compose(chosen))
    assert settings.xla == ("clusters" if device.has_gpu() else False)
    if not ops.available():
        with pytest.raises(PipelineError, match="operations=tensorflow"):
            setup.build_loop(settings, load_dataset("digits", limit_per_class=40))
        return
    run = train.train(settings)
    saved = [layer for layer in run.load_model()._flatten_layers() if getattr(layer, "has_custom_operation", False)]
    assert {layer.operations for layer in saved} == {"tensorflow"}
    assert run.metrics["history"][1]["loss"] < run.metrics["history"][0]["loss"]


def each_with(environments, arguments):
    """Start `python ARGUMENTS` on the CPU, once with each of these additions to the environment."""
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PIPELINE_DEVICE": "cpu", **environment},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )
        for environment in environments
    ]


def wait_for(epoch, processes):
    """Wait until `epoch()` finds a finished one, or one of the processes has ended."""
    for _ in range(1200):
        if epoch() or any(process.poll() is not None for process in processes):
            return
        time.sleep(0.1)
    raise AssertionError("no epoch was finished")


def two_workers_described():
    """The variables that make two processes workers of one cluster."""
    from pipeline.train import workers

    cluster = {"worker": [f"localhost:{port}" for port in workers.free_ports(2)]}
    described = [{"cluster": cluster, "task": {"type": "worker", "index": index}} for index in range(2)]
    return [{"TF_CONFIG": json.dumps(worker)} for worker in described]


def two_workers(*arguments):
    """Start two processes that TF_CONFIG makes workers of one cluster: `python ARGUMENTS` each."""
    return each_with(two_workers_described(), arguments)


def test_two_workers_hold_the_same_weights_and_wait_for_each_other():
    program = (
        "import signal, time, numpy\n"
        "from pipeline.core import config\n"
        "from pipeline.data.load import load_from_settings\n"
        "from pipeline.train import cluster, setup\n"
        "heard = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: heard.append(True))\n"
        "workers = cluster.connect('environment', 'ring')\n"
        f"settings = setup.resolve(config.compose({SMALL!r}))\n"
        "setup.seed_everything(0)\n"
        "dataset = load_from_settings(settings.dataset)\n"
        "loop = setup.build_loop(settings, dataset, workers)\n"
        "weights = loop.network.trainable_variables[0]\n"
        "weights.assign(weights * (1 + workers.index))\n"  # as if the second had begun with others
        "loop.sync_initial_state()\n"
        "logs = loop.train_epoch(dataset.train, 0)\n"
        "weights = numpy.concatenate([w.reshape(-1) for w in loop.network.get_weights()])\n"
        "print(workers.index, logs['loss'], logs['accuracy'], weights.tobytes().hex()[:4000], weights.std())\n"
        "if workers.is_chief: time.sleep(4)\n"
        "signal.raise_signal(signal.SIGTERM)\n"  # TensorFlow's server would keep it for itself
        "started = time.perf_counter()\n"
        "workers.barrier()\n"
        "print(len(heard))\n"
        "print((time.perf_counter() - started > 2) != workers.is_chief)\n"
    )
    answers = [worker.communicate(timeout=240) for worker in two_workers("-c", program)]
    assert all(output for output, _ in answers), answers
    (first, *seen), (second, *also_seen) = (output.split() for output, _ in answers)
    assert (first, second) == ("0", "1")
    assert seen == also_seen
    assert seen[-2:] == ["1", "True"]  # the second waited for the first


def test_two_workers_train_what_one_process_trains():
    """Without batch normalisation and dropout, whose statistics and draws are each worker's own."""
    program = (
        "import sys, numpy\n"
        "from pipeline.core import config\n"
        "from pipeline.data.load import load_from_settings\n"
        "from pipeline.train import cluster, setup\n"
        "workers = cluster.connect(sys.argv[1], 'ring')\n"
        "chosen = ['model=fashion_mlp', 'model.dropout=0', 'batch_size=50', 'epochs=2', 'dataset.limit_per_class=43']\n"
        "settings = setup.resolve(config.compose([*chosen, 'model.operations=tensorflow']))\n"
        "setup.seed_everything(0)\n"
        "dataset = load_from_settings(settings.dataset)\n"
        "loop = setup.build_loop(settings, dataset, workers)\n"
        "loop.sync_initial_state()\n"
        "logs = [loop.train_epoch(dataset.train, epoch) for epoch in range(2)]\n"
        "numpy.savez(f'{sys.argv[1]}-{workers.index}.npz', *loop.network.get_weights())\n"
        "print(*(log[key] for log in logs for key in ('loss', 'accuracy')))\n"
        "workers.barrier()\n"
    )
    answers = [
        [float(figure) for figure in worker.communicate(timeout=240)[0].split()]
        for worker in (*two_workers("-c", program, "environment"), *each_with([{}], ["-c", program, "none"]))
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 4
    assert answers[0] == pytest.approx(answers[2], rel=1e-5)
    pair, alone = (np.load(f"{name}.npz") for name in ("environment-0", "none-0"))
    assert len(pair.files) == 6
    for name in pair.files:
        np.testing.assert_allclose(pair[name], alone[name], atol=1e-6)


def test_two_workers_drop_other_units():
    program = (
        "import numpy\n"
        "from pipeline.core import config\n"
        "from pipeline.data.load import load_from_settings\n"
        "from pipeline.train import cluster, setup\n"
        "workers = cluster.connect('environment', 'ring')\n"
        "chosen = ['model=fashion_mlp', 'model.dropout=0.5', 'dataset.limit_per_class=40']\n"
        "settings = setup.resolve(config.compose(chosen))\n"
        "setup.seed_everything(0)\n"
        "loop = setup.build_loop(settings, load_from_settings(settings.dataset), workers)\n"
        "loop.sync_initial_state()\n"
        "dropout = next(layer for layer in loop.network.layers if 'dropout' in layer.name)\n"
        "for _ in range(2): print(*(numpy.asarray(dropout(numpy.ones((1, 64)), training=True))[0] > 0))\n"
        "workers.barrier()\n"
    )
    draws = [worker.communicate(timeout=240)[0].splitlines() for worker in two_workers("-c", program)]
    assert [len(lines) for lines in draws] == [2, 2]
    assert len({line for lines in draws for line in lines}) == 4


def test_workers_that_do_not_mean_the_same_training_are_refused():
    training = ["-m", "pipeline.train", "cluster=environment", *SMALL, "name=pair"]
    described = two_workers_described()
    others = [[*training, "precision=float32"], [*training, "precision=mixed_bfloat16", "batch_size=32"]]
    workers = [each_with([worker], other)[0] for worker, other in zip(described, others, strict=True)]
    answers = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [2, 2], answers
    for answer in answers:
        assert "batch_size, precision" in answer
        assert "Traceback" not in answer
    assert not Path("runs/pair").exists()


def test_each_row_of_facts_counts_whatever_their_mean_is(monkeypatch):
    """Three workers, of which one has the mean of the two others."""
    tf = device.tensorflow()
    rows = {}
    monkeypatch.setattr(cluster, "_sum", lambda count, own, *_: tf.constant(sum(rows.values(), own.numpy())))
    middle = cluster.Cluster(1, 3)
    for index, answer in ((0, [1, 5, 0]), (2, [3, 5, 0])):
        rows[index] = np.zeros((3, 3), np.float32)
        rows[index][index] = answer
    monkeypatch.setattr(cluster.hashlib, "sha256", lambda text: Digest(int(text)))
    for facts, different in (
        ({"epochs": "2", "seed": "5", "warmup": "0"}, {"epochs"}),
        ({"epochs": "2", "seed": "6", "warmup": "0"}, {"epochs", "seed"}),
        ({"epochs": "1", "seed": "6", "warmup": "0"}, {"seed"}),  # and worker 2 has other epochs
    ):
        with pytest.raises(PipelineError) as info:
            middle.assert_same_config(facts)
        assert {key for key in facts if key in str(info.value)} == different
    cluster.Cluster().assert_same_config({"epochs": "2"})


class Digest:
    """A digest of three bytes that are the number itself."""

    def __init__(self, number):
        self.number = number

    def digest(self):
        return self.number.to_bytes(3)


def test_two_tasks_of_slurm_on_one_node_train_together():
    """With the variables that a step of two tasks on one node has, whatever GPUs nvidia-smi knows of."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
    workers = each_with(
        [{**step, "SLURM_PROCID": str(index)} for index in range(2)],
        ["-m", "pipeline.train", "cluster=slurm", *SMALL, "name=pair"],
    )
    (printed, problems), (silent, also_silent) = (worker.communicate(timeout=240) for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0], (problems, also_silent)
    assert "test accuracy" in printed and (silent, also_silent) == ("", "")
    alone = subprocess.run(
        [sys.executable, "-m", "pipeline.train", "cluster=slurm", *SMALL, "name=pair"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "SLURM_PROCID": "0"},
    )
    assert alone.returncode == 2
    assert "SLURM_JOB_ID" in alone.stderr


def test_the_slurm_script_names_the_run_and_starts_the_training(tmp_path):
    """With an srun that prints what it is given."""
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "${@: -$TAKEN}"\n', encoding="utf-8")
    (tmp_path / "srun").chmod(0o755)
    for given, expected in (
        (["epochs=3"], ["epochs=3", "name=slurm-7"]),
        (["data_dir=/x name=y"], ["data_dir=/x name=y", "name=slurm-7"]),
        (["name=big", "epochs=3"], ["name=big", "epochs=3"]),
        (["resume=runs/big"], ["resume=runs/big"]),
    ):
        answer = subprocess.run(
            ["bash", REPOSITORY / "scripts" / "slurm.sh", *given],
            capture_output=True,
            text=True,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "TAKEN": str(2 + len(expected))},
        )
        program, name, *arguments = answer.stdout.splitlines()
        assert arguments == expected and name == "train", answer.stderr
        assert program.endswith('-m pipeline.train "$@" cluster=slurm')


def test_tasks_of_slurm_are_numbered_in_the_order_of_its_list(monkeypatch):
    step = {"PROCID": "2", "JOB_ID": "7", "STEP_ID": "1", "STEP_NODELIST": "gpu[9-10]", "STEP_TASKS_PER_NODE": "2,1"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    resolver = cluster._slurm_resolver()
    workers = resolver.cluster_spec().as_dict()["worker"]
    assert [worker.partition(":")[0] for worker in workers] == ["gpu9", "gpu9", "gpu10"]
    assert resolver.task_id == 2
    assert len({worker.partition(":")[2] for worker in workers[:2]}) == 2
    monkeypatch.setenv("SLURM_STEP_ID", "2")  # another step of the job, on the same nodes
    assert not set(workers) & set(cluster._slurm_resolver().cluster_spec().as_dict()["worker"])
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2")
    with pytest.raises(PipelineError, match="2"):
        cluster._slurm_resolver()
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "17,1")
    with pytest.raises(PipelineError, match="17"):
        cluster._slurm_resolver()


@pytest.mark.parametrize("count", [2, 3, 50])
def test_processes_share_the_validation_and_get_what_one_process_gets(monkeypatch, count):
    """Each process measures its own images; all must get the same numbers, or only some would stop early."""
    dataset = load_dataset("digits", limit_per_class=40)  # 40 validation images
    settings = setup.resolve(config.compose([*SMALL, "batch_size=7"]))
    loop = setup.build_loop(settings, dataset)
    alone = loop.validate(dataset.validation)
    assert set(alone) == {"loss", "accuracy", "top5"}
    sums, measured = [], []
    shards = loop._shards
    monkeypatch.setattr(
        loop, "_shards", lambda split, order, *rest: measured.append(len(order)) or shards(split, order, *rest)
    )
    monkeypatch.setattr(cluster.Cluster, "total", lambda workers, own, key: sums.append(own) or own)
    for index in range(count):
        loop.workers = cluster.Cluster(index, count)
        loop.validate(dataset.validation)
    assert len(set(measured)) == 1 and measured[0] < len(dataset.validation) + 7
    together = dict(zip(alone, np.sum(sums, axis=0) / len(dataset.validation), strict=True))
    assert together == pytest.approx(alone, rel=1e-6)


def test_two_workers_that_are_killed_go_on_together():
    training = ("-m", "pipeline.train", "cluster=environment")
    workers = two_workers(*training, *SMALL, "epochs=500", "name=pair")
    checkpoints = Path("runs/pair/checkpoints")
    wait_for(lambda: list(checkpoints.glob("epoch-00003.npz")), workers)
    for worker in workers:
        worker.kill()
        worker.wait()
    finished = max(int(path.stem.split("-")[1]) for path in checkpoints.glob("epoch-*.npz"))
    kept = Path("runs/pair/config.yaml")
    kept.write_text(
        kept.read_text(encoding="utf-8").replace("epochs: 500", f"epochs: {finished + 1}"), encoding="utf-8"
    )
    workers = two_workers(*training, "resume=runs/pair")
    (printed, problems), (silent, also_silent) = (worker.communicate(timeout=240) for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0], (problems, also_silent)
    assert f"epoch {finished + 1:>3}/{finished + 1}" in printed and "test accuracy" in printed
    assert (silent, also_silent) == ("", "")  # the first worker speaks for all
    assert len(runs.find("pair").metrics["history"]) == finished + 1


@pytest.mark.parametrize(("asked", "by"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_worker_that_is_asked_to_stop_while_another_one_dies_says_how_to_go_on(asked, by):
    """It hears the signal when TensorFlow returns, which it does with an error of its own."""
    import psutil

    pair = two_workers("-m", "pipeline.train", "cluster=environment", *SMALL, "epochs=100000", "name=pair")
    wait_for(lambda: list(Path("runs/pair/checkpoints").glob("epoch-*.npz")), pair)
    assert list(Path("runs/pair/checkpoints").glob("epoch-*.npz"))
    pair[1].send_signal(signal.SIGSTOP)
    first, used = psutil.Process(pair[0].pid), -1.0
    while sum(first.cpu_times()[:2]) - used > 0.05:  # until it waits inside a sum
        used = sum(first.cpu_times()[:2])
        time.sleep(1)
    pair[0].send_signal(asked)
    time.sleep(1)
    assert pair[0].poll() is None
    pair[1].kill()
    _, problems = pair[0].communicate(timeout=60)
    pair[1].communicate()
    assert pair[0].returncode == 130, problems
    assert by in problems and "resume=runs/pair" in problems
    assert "Traceback" not in problems


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_ends_soon_after_another_one_also_where_it_cannot_be_interrupted(killed):
    """As inside an NCCL kernel, which waits for the other GPU without an end."""
    program = (
        "import time\n"
        "from pipeline.train import cluster\n"
        "workers = cluster.connect('environment', 'ring')\n"
        "with workers.watch_peers(lambda: 'This is the hint.'):\n"
        "    workers.barrier()\n"
        "    print('joined', flush=True)\n"
        "    time.sleep(300)\n"
    )
    pair = two_workers("-c", program)
    for worker in pair:
        assert worker.stdout.readline() == "joined\n"
    time.sleep(12)  # two checks with a peer that works
    assert [worker.poll() for worker in pair] == [None, None]
    pair[killed].kill()
    started = time.monotonic()
    _, problems = pair[1 - killed].communicate(timeout=60)
    pair[killed].communicate()
    assert time.monotonic() - started < 30
    assert pair[1 - killed].returncode == cluster.LOST
    assert problems.splitlines()[-1] == f"error: {cluster.OTHER_ENDED} This is the hint."


def test_the_learning_rate_grows_with_the_number_of_processes(capsys):
    def rate(scaling, count, index=0):
        settings = config.compose([f"learning_rate_scaling={scaling}", "optimizer.learning_rate=0.1"])
        scaled = setup.scale_learning_rate(settings, cluster.Cluster(index, count))
        assert scaled.learning_rate_scaling == "none"  # a resumed run does not scale again
        return scaled.optimizer.learning_rate

    assert [rate(scaling, 4) for scaling in ("none", "sqrt", "linear", "auto")] == pytest.approx([0.1, 0.2, 0.4, 0.4])
    assert capsys.readouterr().out.count("learning rate is 0.4 with 4 processes") == 2
    assert [rate(scaling, 1) for scaling in ("none", "sqrt", "linear", "auto")] == [0.1] * 4
    assert rate("auto", 2, index=1) == 0.2
    assert capsys.readouterr().out == ""
    with pytest.raises(PipelineError, match="learning_rate_scaling"):
        config.compose(["learning_rate_scaling=cubic"])


def test_xla_cannot_compile_sums_through_host_memory(monkeypatch):
    settings = config.compose(["name=pair", "cluster=environment", "communication=ring"])
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "compute_capability", lambda: (9, 0))
    assert setup.resolve(settings).xla is False
    assert setup.resolve(settings.model_copy(update={"communication": "nccl"})).xla is True
    assert setup.resolve(settings.model_copy(update={"cluster": "none"})).xla is True
    with pytest.raises(PipelineError, match="communication=nccl"):
        setup.resolve(settings.model_copy(update={"xla": True}))


def started(*arguments):
    """`python -m pipeline.workers 2 ARGUMENTS`, and a wait for one more finished epoch of the run ``pair``."""
    before = {path.name for path in Path("runs/pair/checkpoints").glob("epoch-*.npz")}
    launcher = subprocess.Popen(
        [sys.executable, "-m", "pipeline.workers", "2", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PIPELINE_DEVICE": "cpu"},
    )
    wait_for(lambda: {path.name for path in Path("runs/pair/checkpoints").glob("epoch-*.npz")} - before, [launcher])
    return launcher


def test_workers_of_one_machine_end_together_and_go_on():
    import psutil

    launcher = started(*SMALL, "epochs=1000", "name=pair")
    psutil.Process(launcher.pid).children()[1].kill()
    _, problems = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert "pipeline.workers 2 resume=runs/pair" in problems
    assert "SIGKILL" in problems
    assert "Traceback" not in problems
    launcher = started("resume=runs/pair")
    launcher.terminate()
    _, problems = launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert "resume=runs/pair" in problems and "Traceback" not in problems
    launcher = started("resume=runs/pair")
    workers = psutil.Process(launcher.pid).children()
    launcher.kill()
    psutil.wait_procs(workers, timeout=20)
    assert not any(worker.is_running() for worker in workers)


def test_what_fails_in_one_worker_is_said(tmp_path, monkeypatch, capfd):
    """The second worker alone meets an error of its own, with the exit code that most errors have."""
    from pipeline.train import workers

    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if '\"index\": 1' in os.environ.get('TF_CONFIG', ''):\n"
        "    from pipeline.core.errors import PipelineError\n"
        "    from pipeline.data import load\n"
        "    def broken(*_):\n"
        "        raise PipelineError('The moon is full.', exit_code=1)\n"
        "    load.load_from_settings = broken\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    monkeypatch.setenv("PIPELINE_DEVICE", "cpu")
    assert workers.start(2, [*SMALL, "name=pair"]) == 1
    assert "The moon is full." in capfd.readouterr().err


def test_each_worker_of_a_machine_has_its_own_gpu(monkeypatch):
    from pipeline.train import workers

    monkeypatch.setattr(device, "gpu_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    described = workers.environments(2)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in described] == ["3", "5"]
    tasks = [json.loads(environment["TF_CONFIG"]) for environment in described]
    assert [task["task"]["index"] for task in tasks] == [0, 1]
    assert len(set(tasks[0]["cluster"]["worker"])) == 2 and tasks[0]["cluster"] == tasks[1]["cluster"]
    with pytest.raises(PipelineError, match="PIPELINE_DEVICE=cpu"):
        workers.environments(3)
    with pytest.raises(PipelineError, match="cluster="):
        workers.start(2, ["cluster=slurm"])
    with pytest.raises(PipelineError, match="batch_size"):
        workers.start(2, ["batch_size=33"])


def test_what_nccl_refuses_is_a_sentence_with_the_way_around_it(monkeypatch):
    def fit(*_):
        message = "Graph execution error:\nDetected at node 'Reduce'\nNCCL: unhandled cuda error.\n"
        raise device.tensorflow().errors.InternalError(None, None, message)

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(cluster, "connect", lambda *_: cluster.Cluster(0, 2, "nccl"))
    settings = config.compose([*SMALL, "name=pair"])
    with pytest.raises(PipelineError, match="communication=ring"):
        train.train(settings)
    monkeypatch.setattr(cluster, "connect", lambda *_: cluster.Cluster(0, 2, "ring"))
    with pytest.raises(device.tensorflow().errors.InternalError):
        train.train(settings)


def test_cluster_without_its_description_is_one_sentence(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(PipelineError, match="TF_CONFIG"):
        cluster.connect("environment", "ring")
    with pytest.raises(PipelineError, match="kubernetes"):
        config.compose(["cluster=kubernetes"])
    described = {
        "cluster": {"chief": ["localhost:1"], "worker": ["localhost:2"]},
        "task": {"type": "chief", "index": 0},
    }
    monkeypatch.setenv("TF_CONFIG", json.dumps(described))
    with pytest.raises(PipelineError, match="chief"):
        cluster.connect("environment", "ring")
    monkeypatch.setenv("TF_CONFIG", "{}")
    with pytest.raises(PipelineError, match="cluster=environment"):
        cluster.connect("environment", "ring")


def test_of_several_errors_the_one_behind_them_is_said(capfd):
    import io

    from pipeline.train import workers

    problems = [io.BytesIO(b"error: NCCL failed.\n"), io.BytesIO(b"what it said last\n")]
    with pytest.raises(PipelineError, match="SIGKILL"):
        workers._verdict([1, -9], problems)
    assert capfd.readouterr().err == "what it said last\n"
    assert workers._verdict([0, None], problems) == 0
