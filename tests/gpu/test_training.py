"""The training loop on a real GPU."""

import numpy as np
import pytest

from benchmarks.train import host_to_device
from pipeline.core import config, device
from pipeline.data.load import load_dataset
from pipeline.train import setup, train

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_mixed_precision_is_chosen():
    assert device.compute_capability() >= (7, 0)
    assert setup.resolve_precision("auto").startswith("mixed")


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_every_precision_learns(precision):
    dataset = load_dataset("digits")
    setup.seed_everything(0)
    loop = setup.build_loop(setup.resolve(config.compose([f"precision={precision}", "epochs=6"])), dataset)
    assert loop.xla == (precision != "mixed_bfloat16")
    for epoch in range(6):
        logs = loop.train_epoch(dataset.train, epoch)
    assert np.isfinite(logs["loss"])
    assert loop.evaluate(dataset.validation)["accuracy"] > 0.9


@pytest.mark.parametrize("xla", ["true", "false"])
def test_a_step_with_overflowed_gradients_changes_nothing_but_the_loss_scale(xla):
    dataset = load_dataset("digits", limit_per_class=40)
    overrides = ["precision=mixed_float16", f"xla={xla}", "batch_size=64"]
    loop = setup.build_loop(setup.resolve(config.compose(overrides)), dataset)
    loop.train_epoch(dataset.train, 0)
    kept = [*loop.network.variables, *loop.optimizer.variables]
    before = [device.to_numpy(variable.value) for variable in kept]
    loop._scaler.scale.assign(2.0**60)
    loop.train_epoch(dataset.train, 1)
    for variable, value in zip(kept, before, strict=True):
        np.testing.assert_array_equal(device.to_numpy(variable.value), value, err_msg=variable.path)


def test_only_the_permutation_crosses_the_bus_in_an_epoch():
    dataset = load_dataset("digits")
    loop = setup.build_loop(setup.resolve(config.compose(["epochs=3"])), dataset)
    loop.train_epoch(dataset.train, 0)
    loop.train_epoch(dataset.train, 1)
    crossed = host_to_device(lambda: loop.train_epoch(dataset.train, 2))
    permutation = 4 * len(dataset.train.labels)
    images = dataset.train.images.nbytes
    assert crossed["bytes"] <= permutation + 4096 < images / 50


def test_xla_and_plain_graph_agree_after_an_epoch_in_float32():
    dataset = load_dataset("digits", limit_per_class=40)
    losses = []
    for xla in ("true", "false"):
        setup.seed_everything(0)
        overrides = ["precision=float32", f"xla={xla}", "optimizer.learning_rate=0.01"]
        loop = setup.build_loop(setup.resolve(config.compose(overrides)), dataset)
        losses.append(loop.train_epoch(dataset.train, 0)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_run_is_trained_measured_and_saved():
    run = train.train(config.compose(["epochs=10", "name=gpu"]))
    assert run.metrics["test_accuracy"] >= 0.95
    assert run.card.versions["device"] == "gpu"
