"""Training as a user meets it: accuracy, repeatability, interruption, damage, and what is said about mistakes."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import models, runs
from pipeline.core import config, device
from pipeline.core.errors import PipelineError
from pipeline.data.load import load_dataset, load_from_settings
from pipeline.train import callbacks, checkpoints, cluster, loop, optimizers, run_folder, setup, train
from pipeline.train.loss_scale import GradientScaler

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ["limit=40", "model.stages=[[8],[16]]", "batch_size=64", "augment=light"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def small(*overrides, limit=40):
    """Settings of a run that takes a second or two: 40 digits a class, a narrow network."""
    chosen = [override for override in SMALL if not override.startswith("limit=")]
    return setup.resolve(config.compose([*chosen, f"dataset.limit_per_class={limit}", *overrides]))


def weights(run):
    return run.load_model().get_weights()


def command(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment, timeout=300, **options
    )


def raise_in(epoch, error):
    """A Keras callback that raises an error at the start of an epoch."""
    device.tensorflow()
    import keras

    class Raise(keras.callbacks.Callback):
        def on_epoch_begin(self, number, logs=None):
            if number == epoch:
                raise error

    return Raise()


def stop_in(epoch):
    """A Keras callback that presses Ctrl-C at the start of an epoch."""
    return raise_in(epoch, KeyboardInterrupt())


def test_a_batch_larger_than_the_dataset_is_mentioned(capsys):
    train.train(small("epochs=1", "name=large", "batch_size=1000"))
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "batch_size" in line]
    assert note.startswith("note: batch_size=1000") and "360" in note
    train.train(small("epochs=1", "name=fitting", "batch_size=360"))
    assert "batch_size" not in capsys.readouterr().out


def test_a_reader_that_stops_reading_is_not_a_disk_error():
    with pytest.raises(BrokenPipeError):
        train.train(small("epochs=1", "name=pipe"), callbacks=[raise_in(0, BrokenPipeError(32, "Broken pipe"))])
    with pytest.raises(ConnectionError):
        train.train(small("epochs=1", "name=pipe"), callbacks=[raise_in(0, ConnectionError("no route"))])


def test_few_validation_images_are_mentioned_and_many_classes_have_a_top5(capsys, monkeypatch):
    monkeypatch.setattr(train, "TOP5_ABOVE_CLASSES", 9)
    run = train.train(small("epochs=1", "name=few"))
    assert "validation_fraction" in capsys.readouterr().out
    (logs,) = run.metrics["history"]
    assert logs["val_accuracy"] <= logs["val_top5"] <= 1


def test_digits_reach_95_percent_and_leave_a_complete_run_folder(capsys):
    run = train.train(config.compose(["epochs=6", "name=digits"]))
    printed = capsys.readouterr().out
    assert "note:" not in printed and "validation_fraction" not in printed
    metrics = json.loads(Path("runs/digits/metrics.json").read_text(encoding="utf-8"))
    assert metrics["test_accuracy"] >= 0.95
    assert metrics["validation_accuracy"] >= metrics["history"][-1]["accuracy"] - 0.05
    assert set(metrics["test_per_class"]) == {str(digit) for digit in range(10)}
    assert 0 < metrics["test_loss"] < 1
    assert Path("runs/latest").resolve() == run.path
    card = runs.find().card
    assert (card.dataset, card.input_shape, card.model) == ("digits", (32, 32, 1), "cnn")
    for name in ("confusion_matrix", "calibration", "mistakes"):
        assert (run.path / "evaluation" / f"test_{name}.png").stat().st_size > 1000
    with (run.path / "history.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["val_accuracy"]) == metrics["history"][-1]["val_accuracy"]


def test_model_file_takes_uint8_and_agrees_with_the_reported_accuracy():
    run = train.train(small("epochs=2", "name=m"))
    dataset = run.load_dataset()
    images, labels = device.to_numpy(dataset.test.images), device.to_numpy(dataset.test.labels)
    probabilities = run.load_model().predict(images, verbose=0)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert run.metrics["test_accuracy"] == pytest.approx((probabilities.argmax(axis=1) == labels).mean(), abs=1e-9)


def test_same_seed_gives_the_same_weights_and_another_seed_does_not():
    first, second, other = (
        weights(train.train(small("epochs=1", f"seed={seed}", f"name={name}")))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(first, other, strict=True))


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit():
    whole = train.train(small("epochs=4", "name=whole", "model.dropout=0.2"))
    with pytest.raises(PipelineError, match="resume=runs/broken") as stopped:
        train.train(small("epochs=4", "name=broken", "model.dropout=0.2"), callbacks=[stop_in(2)])
    assert stopped.value.exit_code == 130
    assert not Path("runs/broken/model.keras").exists()
    resumed = train.train(config.compose(["resume=runs/broken"]))
    assert resumed.metrics["epochs"] == 4
    histories = [
        [{key: value for key, value in logs.items() if key != "images_per_second"} for logs in run.metrics["history"]]
        for run in (whole, resumed)
    ]
    assert histories[0] == histories[1]
    assert all(np.array_equal(x, y) for x, y in zip(weights(whole), weights(resumed), strict=True))


def test_killed_process_goes_on_from_its_last_whole_epoch():
    arguments = [
        "pipeline.train", "name=killed", "epochs=60", "batch_size=64", "model.stages=[[8],[16]]",
        "dataset.limit_per_class=40",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = Path("runs/killed/checkpoints")
    deadline = time.time() + 120
    while not (folder / "epoch-00003.npz").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = max(int(path.stem[-5:]) for path in folder.glob("epoch-*.npz"))
    assert 3 <= finished < 60
    settings = setup.resolve(run_folder.resume_settings(config.compose(["resume=killed"])))
    training = setup.build_loop(settings, load_from_settings(settings.dataset))
    progress = checkpoints.resume(folder, training.variables)
    assert (progress.epoch, len(progress.history)) == (finished, finished)


@pytest.mark.parametrize("left", [0, 1000])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(left):
    with pytest.raises(PipelineError):
        train.train(small("epochs=4", "name=hurt"), callbacks=[stop_in(3)])
    folder = Path("runs/hurt/checkpoints")
    assert sorted(path.name for path in folder.glob("epoch-*")) == ["epoch-00002.npz", "epoch-00003.npz"]
    newest = folder / "epoch-00003.npz"
    newest.write_bytes(newest.read_bytes()[:left])
    assert len(train.train(config.compose(["resume=runs/hurt"])).metrics["history"]) == 4


def test_all_checkpoints_damaged_is_one_sentence(tmp_path):
    device.tensorflow()
    import keras

    variable = keras.Variable(np.zeros(3, np.float32))
    checkpoints.save_epoch(tmp_path, [variable], checkpoints.Progress(epoch=1))
    (tmp_path / "epoch-00001.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(PipelineError, match=r"epoch-00001.npz"):
        checkpoints.resume(tmp_path, [variable])
    checkpoints.save_epoch(tmp_path, [keras.Variable(np.ones(4, np.float32))], checkpoints.Progress(epoch=2))
    with pytest.raises(PipelineError, match=r"epoch-00002.npz"):
        checkpoints.load(tmp_path / "epoch-00002.npz", [variable])


def test_finished_or_missing_runs_cannot_be_resumed():
    train.train(small("epochs=1", "name=done"))
    with pytest.raises(PipelineError, match="done"):
        train.train(config.compose(["resume=runs/done"]))
    with pytest.raises(PipelineError, match="runs/nothing"):
        train.train(config.compose(["resume=runs/nothing"]))
    with pytest.raises(PipelineError, match="runs/done"):
        train.train(small("epochs=1", "name=done"))


def test_a_run_stopped_while_it_is_finished_can_be_finished(monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(PipelineError, match="resume=runs/late") as info:
        patch.setattr(train, "evaluate_run", pressed)
        train.train(small("epochs=1", "name=late"))
    assert info.value.exit_code == 130
    assert runs.find("late").card.name == "late"  # it has a model, so it has its card
    run = train.train(config.compose(["resume=runs/late"]))
    assert run.metrics["test_accuracy"] > 0 and len(run.metrics["history"]) == 1
    assert runs.find().path == run.path


def test_the_model_has_the_weights_of_the_epoch_that_is_named_best(monkeypatch):
    accuracies = iter([0.5, 0.4, 0.3])
    real = loop.Loop.evaluate
    monkeypatch.setattr(loop.Loop, "evaluate", lambda *a: {**real(*a), "accuracy": next(accuracies, 0.2)})
    with pytest.raises(PipelineError):
        train.train(small("epochs=3", "name=best"), callbacks=[stop_in(2)])
    folder = Path("runs/best/checkpoints")
    assert [path.name for path in folder.glob("best-*")] == ["best-00001.npz"]
    # A kill after an epoch's best weights and before its checkpoint leaves this; the epoch is then trained again.
    (folder / "best-00003.npz").write_bytes((folder / "best-00001.npz").read_bytes()[:100])
    run = train.train(config.compose(["resume=runs/best"]))
    assert run.metrics["best_epoch"] == 1
    assert [path.name for path in folder.glob("best-*")] == ["best-00001.npz"]


def test_a_run_goes_on_with_a_copy_of_its_data_and_keeps_where_home_was(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("HOME", str(tmp_path))
    for name, shade in (("cat", 40), ("dog", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(20):
            Image.new("RGB", (16, 16), (shade + index, shade, shade)).save(tmp_path / f"photos/{name}/{index}.png")
    settings = [*SMALL[1:], "dataset=image_folder", "data_dir=~/photos", "epochs=2", "name=home"]
    with pytest.raises(PipelineError, match="resume=runs/home"):
        train.train(config.compose(settings), callbacks=[stop_in(1)])
    assert runs.Run(Path("runs/home")).config.dataset.data_dir == str(tmp_path / "photos")
    shutil.copytree(tmp_path / "photos", tmp_path / "moved", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "photos")
    run = train.train(config.compose(["resume=runs/home", f"data_dir={tmp_path / 'moved'}"]))
    assert len(run.metrics["history"]) == 2


def test_changed_data_stops_a_resume():
    with pytest.raises(PipelineError):
        train.train(small("epochs=2", "name=altered"), callbacks=[stop_in(1)])
    path = Path("runs/altered/config.yaml")
    path.write_text(path.read_text(encoding="utf-8").replace("data_digest: ", "data_digest: x"))
    with pytest.raises(PipelineError, match="altered"):
        train.train(config.compose(["resume=runs/altered"]))


def test_two_runs_never_write_into_one_folder():
    settings = small("name=shared", "epochs=1")
    with (
        run_folder.open_run_dir(settings),
        pytest.raises(PipelineError, match="runs/shared"),
        run_folder.open_run_dir(settings),
    ):
        pass


def test_loss_that_is_no_longer_finite_says_what_to_change():
    with pytest.raises(PipelineError, match=r"optimizer.learning_rate") as error:
        train.train(
            small("optimizer.learning_rate=1e30", "optimizer.global_clipnorm=null", "warmup=0", "schedule=constant")
        )
    assert error.value.exit_code == 1


def test_full_disk_is_one_sentence_and_keeps_the_older_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk]).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    device.tensorflow()
    import keras

    class Fill(keras.callbacks.Callback):
        def on_epoch_begin(self, number, logs=None):
            if number == 1:
                with contextlib.suppress(OSError), Path("filler").open("wb", buffering=0) as filler:
                    while filler.write(bytes(1024)):
                        pass

    try:
        os.chdir(disk)
        with pytest.raises(PipelineError, match="resume=runs/full") as error:
            train.train(small("epochs=3", "name=full"), callbacks=[Fill()])
        assert error.value.exit_code == 1
        assert not list(Path("runs").rglob(".tmp-*"))
        assert not Path("runs/latest").exists()
        Path("filler").unlink()
        history = train.train(config.compose(["resume=runs/full"])).metrics["history"]
    finally:
        os.chdir(tmp_path)
        subprocess.run(["umount", "-l", disk], check=True)
    assert [logs["loss"] for logs in history] == [
        logs["loss"] for logs in train.train(small("epochs=3", "name=roomy")).metrics["history"]
    ]


def test_a_full_disk_met_by_tensorboards_files_is_one_sentence(monkeypatch):
    """TensorFlow's writers have errors of their own, which are none of the operating system's."""
    tf = device.tensorflow()

    def full(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "logs/x; No space left on device")

    monkeypatch.setattr(callbacks, "tensorboard_callback", full)
    with pytest.raises(PipelineError, match="logs/full"):
        train.train(small("name=full"))
    assert not Path("runs/full").exists()


def test_what_xla_cannot_compile_is_one_sentence():
    """On a CPU additions have a fixed order, and XLA has no max pooling that keeps one."""
    if device.has_gpu():
        pytest.skip("XLA compiles the cnn on a GPU")
    dataset = load_dataset("digits", limit_per_class=40)
    training = setup.build_loop(small("xla=true"), dataset)
    setup.seed_everything(0)
    with pytest.raises(PipelineError, match="xla=false"):
        training.train_epoch(dataset.train, 0)


def test_xla_clusters_are_asked_for_only_while_a_graph_runs():
    tf = device.tensorflow()
    dataset = load_dataset("digits", limit_per_class=40)
    training = setup.build_loop(small(), dataset)
    training.xla = "clusters"
    seen = []

    def train_steps(*_):
        seen.append(tf.config.optimizer.get_jit())
        return tf.constant(1.0), tf.constant(0.0)

    training._train_steps = train_steps
    training.train_epoch(dataset.train, 0)
    assert set(seen) == {"autoclustering"}
    assert not tf.config.optimizer.get_jit()


def test_out_of_memory_in_the_augmentation_is_the_same_sentence(monkeypatch):
    def full(*_, **__):
        raise MemoryError

    dataset = load_dataset("digits", limit_per_class=40)
    training = setup.build_loop(small(), dataset)
    monkeypatch.setattr(loop.augment, "apply", full)
    with pytest.raises(PipelineError, match="batch_size"):
        training.train_epoch(dataset.train, 0)


def test_shards_keep_their_size_whatever_memory_is_free_later(monkeypatch):
    dataset = load_dataset("digits", limit_per_class=40)
    training = setup.build_loop(small("batch_size=20"), dataset)
    free = iter([10**7, 10**5, 10**4, 10**3])
    monkeypatch.setattr(device, "free_memory", lambda: next(free))
    for epoch in range(3):
        training.train_epoch(dataset.train, epoch)
    assert training._train_steps.experimental_get_tracing_count() <= 2  # whole shards, and a shorter last one


def test_out_of_memory_says_what_to_change():
    sentence = "batch_size is 64: halve it"
    with pytest.raises(PipelineError, match="batch_size") as error, device.explain_out_of_memory(sentence):
        np.empty(2**55, np.uint8)
    assert error.value.exit_code == 1


def test_keras_callbacks_and_early_stopping_work():
    device.tensorflow()
    import keras

    seen = []
    spy = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append((epoch, sorted(logs))))
    run = train.train(small("epochs=9", "early_stopping=1", "optimizer.learning_rate=1e-9", "name=e"), callbacks=[spy])
    assert run.metrics["epochs"] < 9  # at that rate nothing gets better
    assert len(seen) == run.metrics["epochs"]
    assert seen[0][1] == ["accuracy", "images_per_second", "learning_rate", "loss", "val_accuracy", "val_loss"]


def test_tensorboard_files_hold_what_the_readme_promises():
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    run = train.train(small("epochs=2", "name=board"))
    board = EventMultiplexer(size_guidance={"tensors": 0}).AddRunsFromDirectory("logs").Reload()
    assert list(board.Runs()) == ["board"]  # one run of the training is one run in TensorBoard
    events = board.GetAccumulator("board")
    tags = set(events.Tags()["tensors"])
    assert {"augmentation", "confusion_matrix", "loss/train", "accuracy/train", "loss/validation"} <= tags
    assert {"accuracy/validation", "accuracy/test", "learning_rate", "images_per_second"} <= tags
    assert any("logits/kernel" in tag for tag in tags)
    assert events.Tags()["graph"]
    assert [event.step for event in events.Tensors("loss/train")] == [1, 2]
    accuracy = float(device.tensorflow().make_ndarray(events.Tensors("accuracy/test")[-1].tensor_proto))
    assert accuracy == pytest.approx(run.metrics["test_accuracy"])
    content = b"".join(events.PluginTagToContent("hparams").values())
    assert b"optimizer.learning_rate" in content and b"batch_size" in content and b"digest" not in content


def test_permutation_holds_every_image_once_and_changes_with_epoch_and_seed():
    orders = [loop.permutation(seed, epoch, 1000) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert np.array_equal(orders[0], orders[3])
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])


def test_epoch_is_the_same_whatever_the_size_of_its_shards(monkeypatch):
    dataset = load_dataset("digits", limit_per_class=40)
    results = []
    for steps in (1, 3, 100):
        monkeypatch.setattr(loop, "CPU_STEPS_PER_SHARD", steps)
        setup.seed_everything(0)
        training = setup.build_loop(small(), dataset)
        results.append((training.train_epoch(dataset.train, 0)["accuracy"], training.network.get_weights()))
    for accuracy, found in results[1:]:
        assert accuracy == results[0][0]
        assert all(np.array_equal(x, y) for x, y in zip(found, results[0][1], strict=True))


def test_evaluation_counts_the_last_incomplete_batch_once(monkeypatch):
    monkeypatch.setattr(loop, "FAST_EVALUATION_BATCH", 7)
    dataset = load_dataset("digits", limit_per_class=40)
    assert len(dataset.validation.labels) % 7
    training = setup.build_loop(small("batch_size=7"), dataset)
    measured = training.evaluate(dataset.validation)
    scale = (device.to_numpy(dataset.validation.images) / 255 - dataset.mean) / dataset.std
    logits = training.network.predict(scale.astype(np.float32), verbose=0)
    labels = device.to_numpy(dataset.validation.labels)
    np.testing.assert_array_equal(measured["predictions"], logits.argmax(axis=1))
    assert measured["accuracy"] == pytest.approx((logits.argmax(axis=1) == labels).mean())
    five = np.argsort(-logits, axis=1)[:, :5]
    assert measured["top5"] == pytest.approx((five == labels[:, None]).any(axis=1).mean())
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    targets = np.full_like(probabilities, 0.1 / 10)
    targets[np.arange(len(labels)), labels] += 0.9
    assert measured["loss"] == pytest.approx(-(targets * np.log(probabilities)).sum(axis=1).mean(), rel=1e-4)


@pytest.mark.parametrize(("batch_size", "evaluated"), [(8, 32), (100, 256), (600, 600)])
def test_a_small_batch_makes_the_evaluation_small_too(batch_size, evaluated, monkeypatch):
    dataset = load_dataset("digits", validation_fraction=0.45)
    training = setup.build_loop(small(f"batch_size={batch_size}"), dataset)
    sizes = []
    monkeypatch.setattr(training, "_evaluate_steps", lambda images, labels: sizes.append(images.shape[1]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.evaluate(dataset.validation)
    assert sizes == [evaluated]


def test_a_folder_in_the_place_of_latest_is_said_before_training():
    Path("runs/latest").mkdir(parents=True)
    with pytest.raises(PipelineError, match="runs/latest"):
        train.train(small("name=first"))
    assert [path.name for path in Path("runs").iterdir()] == ["latest"]


def test_logs_that_cannot_be_written_are_said_before_training():
    Path("logs").write_text("a file", encoding="utf-8")
    with pytest.raises(PipelineError, match="logs/first"):
        train.train(small("name=first"))
    assert not Path("runs/first").exists()


def test_a_damaged_best_checkpoint_stops_nothing_where_the_last_epoch_was_the_best(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "finish", lambda *_: 1 / 0)
        train.train(small("epochs=1", "name=first"))
    (best,) = Path("runs/first/checkpoints").glob("best-*.npz")
    best.write_bytes(b"damaged")
    assert train.train(config.compose(["resume=runs/first"])).metrics["epochs"] == 1


@pytest.mark.parametrize("content", ["", "null", "[]", "dataset: {}\nepochs: 3", "dataset: 5"])
def test_a_damaged_configuration_cannot_be_resumed(content):
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/config.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(PipelineError, match=r"config.yaml|batch_size"):
        train.train(config.compose(["resume=runs/first"]))


def test_weights_broken_by_the_last_step_are_no_checkpoint(monkeypatch):
    original = loop.Loop.evaluate
    monkeypatch.setattr(loop.Loop, "evaluate", lambda self, split: {**original(self, split), "loss": float("nan")})
    with pytest.raises(PipelineError, match="epoch 1"):
        train.train(small("epochs=2", "name=broken"))
    assert not Path("runs/broken").exists()


def test_a_batch_that_workers_cannot_share_evenly_is_one_sentence():
    dataset = load_dataset("digits", limit_per_class=40)
    training = setup.build_loop(small(), dataset, cluster.Cluster(0, 3))
    with pytest.raises(PipelineError, match="batch_size"):
        training.train_epoch(dataset.train, 0)


def test_the_precision_that_auto_meant_is_kept():
    assert train.train(small("epochs=1", "name=kept")).config.precision in ("float32", "mixed_float16")


def test_a_damaged_epoch_that_was_the_best_leaves_the_best_before_it(tmp_path):
    class Variable(np.ndarray):
        def assign(self, value):
            self[...] = value

    variables = [np.zeros(3).view(Variable)]
    accuracies = [0.5, 0.6, 0.4, 0.9]
    for epoch in range(1, 5):
        progress = checkpoints.Progress(epoch, [{"val_accuracy": a} for a in accuracies[:epoch]])
        progress.best_epoch = int(np.argmax(accuracies[:epoch])) + 1
        variables[0][...] = epoch
        if progress.best_epoch == epoch:
            checkpoints.save(checkpoints.best_path(tmp_path, epoch), variables, progress)
        checkpoints.save_epoch(tmp_path, variables, progress)
    assert {path.name for path in tmp_path.iterdir()} == {
        "best-00002.npz", "best-00004.npz", "epoch-00003.npz", "epoch-00004.npz",
    }  # fmt: skip
    checkpoints.epoch_path(tmp_path, 4).write_bytes(b"damaged")
    progress = checkpoints.resume(tmp_path, variables)
    assert (progress.epoch, progress.best_epoch, variables[0][0]) == (3, 2, 3)
    checkpoints.load(checkpoints.best_path(tmp_path, progress.best_epoch), variables)
    progress.epoch, progress.history = 4, [*progress.history, {"val_accuracy": 0.5}]
    checkpoints.save_epoch(tmp_path, variables, progress)
    assert not checkpoints.best_path(tmp_path, 4).exists()


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_every_precision_trains_and_keeps_float32_weights(precision):
    dataset = load_dataset("digits", limit_per_class=40)
    training = setup.build_loop(small(f"precision={precision}"), dataset)
    losses = [training.train_epoch(dataset.train, epoch)["loss"] for epoch in range(3)]
    assert losses[-1] < losses[0]
    assert {variable.dtype for variable in training.network.trainable_variables} == {"float32"}


def step(scaler, optimizer, variables, gradients):
    """One step of an optimizer; returns the gradients that it applied, as the change of the variables."""
    before = [variable.numpy() for variable in variables]
    scaler.apply(optimizer, [device.tensorflow().constant(gradient) for gradient in gradients], variables)
    return [old - variable.numpy() for old, variable in zip(before, variables, strict=True)]


def test_gradients_are_clipped_and_an_overflow_halves_the_loss_scale():
    device.tensorflow()
    import keras

    def of(precision, norm=1.0):
        optimizer = keras.optimizers.SGD(1.0, global_clipnorm=norm)
        variables = [keras.Variable(np.zeros(2, np.float32)), keras.Variable(np.zeros(1, np.float32))]
        return GradientScaler(optimizer, precision), optimizer, variables

    scaler, *rest = of("mixed_float16")
    scale = float(scaler.scale.value)
    assert float(scaler.scaled(np.float32(2.0))) == 2 * scale
    first, second = step(scaler, *rest, [[3.0 * scale, 0.0], [4.0 * scale]])  # the unscaled norm is 5
    np.testing.assert_allclose(first, [0.6, 0.0], rtol=1e-5)
    np.testing.assert_allclose(second, [0.8], rtol=1e-5)
    np.testing.assert_allclose(step(scaler, *rest, [[0.5 * scale, 0.0], [0.0]])[0], [0.5, 0.0], rtol=1e-5)
    assert float(scaler.good_steps.value) == 2
    step(scaler, *rest, [[np.inf, 1.0], [np.nan]])
    assert float(scaler.scale.value) == scale / 2 and float(scaler.good_steps.value) == 0
    scaler.good_steps.assign(scaler.GROWTH_STEPS - 1)
    step(scaler, *rest, [[1.0, 0.0], [0.0]])
    assert float(scaler.scale.value) == scale and float(scaler.good_steps.value) == 0
    scaler, *rest = of("float32", None)
    assert [change.tolist() for change in step(scaler, *rest, [[3.0, 0.0], [4.0]])] == [[3.0, 0.0], [4.0]]
    assert scaler.scaled(2.0) == 2.0 and scaler.variables == []
    scaler, *rest = of("float32")
    np.testing.assert_allclose(step(scaler, *rest, [[3.0, 0.0], [4.0]])[0], [0.6, 0.0], rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_with_overflowed_gradients_changes_nothing_but_the_loss_scale(optimizer):
    dataset = load_dataset("digits", limit_per_class=40)
    training = setup.build_loop(small("precision=mixed_float16", f"optimizer={optimizer}"), dataset)
    training.train_epoch(dataset.train, 0)  # momentum and moving statistics are no longer zero
    kept = [*training.network.variables, *training.optimizer.variables]
    before = [device.to_numpy(variable.value) for variable in kept]
    rate = training.learning_rate()
    training._scaler.scale.assign(2.0**60)
    training.train_epoch(dataset.train, 1)
    steps = training.images_an_epoch(len(dataset.train.labels)) // training.batch_size
    assert float(training._scaler.scale.value) == 2.0 ** (60 - steps)  # every step has overflowed
    for variable, value in zip(kept, before, strict=True):
        np.testing.assert_array_equal(device.to_numpy(variable.value), value, err_msg=variable.path)
    assert training.learning_rate() == rate
    training._scaler.scale.assign(2.0**10)
    training.train_epoch(dataset.train, 2)
    assert any((device.to_numpy(v.value) != old).any() for v, old in zip(kept, before, strict=True))


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_learning_rate_rises_to_its_peak_and_falls(schedule):
    graph = optimizers.schedule_class()(0.3, schedule, 0.25, 100)
    rates = [float(graph(step)) for step in range(101)]
    assert rates[0] == pytest.approx(0.3 / 25, rel=1e-5)
    assert rates[25] == pytest.approx(0.3, rel=1e-5) and np.argmax(rates) == 25
    middle = {"one_cycle": 0.3 * (1 - 25 / 75), "cosine": 0.3 * (1 + np.cos(np.pi / 3)) / 2}[schedule]
    assert rates[50] == pytest.approx(middle, rel=1e-4)
    assert rates[100] == pytest.approx(0.3 / 1000, rel=1e-3)


def test_deployable_graph_normalises_inside():
    network = models.build("cnn", (8, 8, 3), 4, stages=[[4]])
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    logits = network.predict(((images / 255 - mean) / std).astype(np.float32), verbose=0)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = models.deployable(network, mean, std).predict(images, verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("dataset=nothing", "cifar10"),
        ("model=nothing", "cnn"),
        ("augment=nothing", "strong"),
        ("experiment=nothing", "highperf_cnn"),
        ("precision=float8", "float8"),
        ("epochs=0", "epochs"),
        ("epochs=many", "many"),
        ("seed=-1", "seed"),
        ("seed=true", "seed"),
        ("early_stopping=true", "early_stopping"),
        ("warmup=false", "warmup"),
        ("optimizer.learning_rate=0", "learning_rate"),
        ("name=../out", r"\.\./out"),
        ("name=latest", "latest"),
        ("learningrate=1", "learningrate"),
        ("epoch=5", "epochs"),
        ("=", "."),
    ],
)
def test_mistakes_in_the_configuration_are_one_sentence(override, word):
    with pytest.raises(PipelineError, match=word) as error:
        config.compose([override])
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("model.dropout=2", "dropout"),
        ("dataset.validation_fraction=0", "validation_fraction"),
        ("dataset=image_folder", "."),
    ],
)
def test_mistake_found_at_the_start_leaves_the_name_free(override, word):
    with pytest.raises(PipelineError, match=word):
        train.train(config.compose([override, "name=again"]))
    assert not Path("runs/again").exists()


@pytest.mark.parametrize("override", ["augment.translate.pixels=99", "optimizer.learning_rate=1e30"])
def test_a_training_that_finishes_no_epoch_leaves_its_name_free(override):
    settings = small(override, "name=again", "optimizer.global_clipnorm=null", "warmup=0", "schedule=constant")
    with pytest.raises(PipelineError) as info:
        train.train(settings)
    assert "resume=" not in str(info.value)
    assert not Path("runs/again").exists() and not Path("logs/again").exists()
    Path("logs/again").mkdir(parents=True)
    Path("logs/again/older").touch()
    with pytest.raises(PipelineError):
        train.train(settings)
    assert Path("logs/again/older").exists()  # what was there before is nobody's to remove
    train.train(small("epochs=1", "name=again"))


@pytest.mark.parametrize(
    "setting",
    [
        {"max_rejected": "5%"}, {"limit_per_class": "ten"}, {"limit_per_class": 0}, {"validation_fraction": "abc"},
        {"test_fraction": 1}, {"seed": "abc"}, {"seed": 1.5}, {"classes": 3}, {"classes": "cat"},
    ],
)  # fmt: skip
def test_data_settings_of_a_wrong_type_are_one_sentence(setting):
    (key,) = setting
    with pytest.raises(PipelineError, match=key):
        load_dataset("digits", **setting)


def test_mistakes_in_models_are_one_sentence():
    for arguments, options, word in (
        (("lenet", (8, 8, 1), 3), {}, "lenet"),
        (("cnn", (8, 8, 1), 1), {}, r"\b1\b"),
        (("cnn", (4, 4, 1), 3), {}, "image_size"),
        (("cnn", (8, 8, 1), 3), {"widths": 3}, "widths"),
    ):
        with pytest.raises(PipelineError, match=word):
            models.build(*arguments, **options)


def test_command_prints_one_sentence_and_no_noise():
    answer = command("pipeline.train", "dataset=nothing")
    assert answer.returncode == 2
    assert "nothing" in answer.stderr and answer.stderr.count("\n") == 1
    answer = command("pipeline.train", "epochs=0")
    assert answer.returncode == 2
    assert "epochs" in answer.stderr and answer.stderr.count("\n") == 1
    answer = command("pipeline.evaluate")
    assert answer.returncode == 2
    assert "pipeline.train" in answer.stderr and answer.stderr.count("\n") == 1


def test_command_trains_then_evaluates_with_a_clean_terminal(tmp_path):
    answer = command(
        "pipeline.train", "epochs=2", "name=first", "dataset.limit_per_class=40", "model.stages=[[8],[16]]"
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    assert len([line for line in answer.stdout.splitlines() if line.startswith("epoch")]) == 2
    assert "test accuracy" in answer.stdout
    answer = command("pipeline.evaluate", "runs/latest", "--split", "validation")
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    assert "validation_accuracy" in json.loads(Path("runs/first/metrics.json").read_text(encoding="utf-8"))
    assert "precision" in answer.stdout and "accuracy" in answer.stdout
