"""The settings that a folder of images gets without any other setting, and how the command line reads its arguments."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import runs
from pipeline.core import config, device
from pipeline.core.errors import PipelineError
from pipeline.data.load import load_from_settings
from pipeline.train import optimizers, plan, run_folder, setup
from pipeline.train.__main__ import work
from pipeline.train.head import fit_head
from pipeline.train.train import train
from tests.shapes import draw_shapes

REPOSITORY = Path(__file__).resolve().parents[2]


def planned(folder, *overrides):
    """The settings and the text of the plan."""
    _, settings, lines = plan.complete(["dataset=image_folder", f"data_dir={folder}", *overrides])
    return settings, "\n".join(lines)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw_shapes(tmp_path_factory.mktemp("shapes"), images_per_class=[10, 10, 10, 40])


def test_colour_photos_get_the_pretrained_network(shapes):
    settings, text = planned(shapes)
    assert settings.model.name == "pretrained" and settings.optimizer.backbone_factor < 1
    assert settings.class_weights == "balanced"  # 40 is more than 3 times 10
    for part in (
        "70 in 4 classes",
        "circle (10)",
        "star (40)",
        "64×64",
        "efficientnet_lite0",
        f"{settings.epochs} epochs",
    ):
        assert part in text, text


def test_the_users_settings_have_priority(shapes):
    settings, text = planned(shapes, "epochs=3", "optimizer=sgd", "batch_size=4", "class_weights=none")
    assert (settings.epochs, settings.optimizer.momentum, settings.batch_size) == (3, 0.9, 4)
    assert settings.class_weights == "none" and settings.optimizer.backbone_factor == 1.0
    assert "3 epochs" in text
    scratch, _ = planned(shapes, "model=cnn")
    assert scratch.model.name == "cnn" and scratch.optimizer.name == "adam"
    images = 70 - 14 - 6
    assert scratch.epochs * (images // scratch.batch_size) >= plan.MIN_STEPS


@pytest.mark.parametrize("override", ["plan=none", "experiment=highperf_cnn"])
def test_nothing_is_planned_where_the_user_has_a_recipe(shapes, override):
    overrides = ["dataset=image_folder", f"data_dir={shapes}", override]
    assert plan.complete(overrides) == (overrides, config.compose(overrides), [])
    assert plan.complete(["dataset=digits"]) == (["dataset=digits"], config.compose(["dataset=digits"]), [])


@pytest.mark.parametrize(
    ("mode", "size", "why"), [("L", (64, 64), "grey"), ("RGB", (24, 24), "small")], ids=["grey", "small"]
)
def test_grey_and_small_images_train_from_scratch(tmp_path, mode, size, why):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new(mode, size, number).save(tmp_path / name / f"{number}.png")
    settings, _ = planned(tmp_path)
    assert settings.model.name == "cnn", why


def test_photos_of_different_sizes_and_modes_get_one_size(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(10):
            mode = "L" if number == 0 else "RGB"
            Image.new(mode, (300 + number, 400), 10 * number).save(tmp_path / name / f"{number}.png")
    settings, text = planned(tmp_path)
    assert settings.dataset.image_size == 224 and settings.dataset.channels == 3
    assert "300×400 to 309×400" in text
    assert load_from_settings(settings.dataset).image_shape == (224, 224, 3)


def test_the_batch_fits_into_the_free_memory(monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda: 6 * 2**30)
    assert plan.fitting_batch(16, "pretrained", 224, 1000) == 16
    monkeypatch.setattr(device, "free_memory", lambda: 2**30)
    assert plan.fitting_batch(16, "pretrained", 224, 1000) == 4
    assert plan.fitting_batch(16, "cnn", 32, 5) == 4  # not more than there are images


def test_only_prints_the_plan(shapes, tmp_path):
    command = [sys.executable, "-m", "pipeline.train", str(shapes), "plan=only"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=100)
    assert answer.returncode == 0 and "efficientnet_lite0" in answer.stdout, answer.stderr
    assert not list(tmp_path.iterdir())


def test_words_that_are_not_settings_are_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match="write epochs=5"):
        plan.read_overrides(["5"], ["--epochs"])
    with pytest.raises(PipelineError, match="write batch_size=8"):
        plan.read_overrides([], ["--batch-size=8"])
    with pytest.raises(PipelineError, match="'data_dir=my photos'"):
        plan.read_overrides(["dataset=image_folder", "data_dir=my", "photos"], [])
    Path("photos").mkdir()
    assert plan.read_overrides(["photos", "epochs=2"], []) == ["dataset=image_folder", "data_dir=photos", "epochs=2"]


def small(*overrides):
    chosen = ["dataset=digits", "dataset.limit_per_class=40", "model.stages=[[8],[16]]", "epochs=1", "batch_size=50"]
    return setup.resolve(config.compose([*chosen, *overrides]))


def test_class_weights_are_inverse_to_the_class_sizes(shapes):
    settings, _ = planned(shapes)
    dataset = load_from_settings(settings.dataset)
    weights, labels = np.array(setup.balanced(dataset)), device.to_numpy(dataset.train.labels)
    assert weights[labels].mean() == pytest.approx(1)
    sums = np.bincount(labels, weights[labels])
    np.testing.assert_allclose(sums, sums[0])


def test_the_loss_is_weighted_by_class():
    """Weights of 0 for all classes but one: the network learns to predict this class only."""
    settings = small("epochs=4")
    dataset = load_from_settings(settings.dataset)
    loop = setup.build_loop(settings, dataset)
    only = type(loop)(
        loop.network, loop.optimizer, loop.policy, loop.mean, loop.std,
        batch_size=50, class_weights=[0.0] * 3 + [1.0] + [0.0] * 6,
    )  # fmt: skip
    for epoch in range(4):
        only.train_epoch(dataset.train, epoch)
    assert (only.evaluate(dataset.test)["predictions"] == 3).mean() > 0.9


def network_with_backbone(keras, classes=10):
    inner = keras.Sequential([keras.Input((32, 32, 1)), keras.layers.Conv2D(4, 3)], name="backbone")
    inputs = keras.Input((32, 32, 1))
    features = keras.layers.Flatten(name="features")(keras.layers.AveragePooling2D(5)(inner(inputs)))
    return keras.Model(inputs, keras.layers.Dense(classes, name="head", dtype="float32")(features), name="network")


def test_the_backbone_moves_by_a_fraction_of_the_step():
    import keras

    settings = small()
    dataset = load_from_settings(settings.dataset)
    moved = {}
    for factor in (1.0, 0.25, 0.0):
        setup.seed_everything(0)
        network = network_with_backbone(keras)
        loop = setup.build_loop(settings, dataset)
        optimizer = optimizers.build(settings.optimizer, schedule="constant", warmup=0.0, total_steps=1)
        loop = type(loop)(
            network, optimizer, loop.policy, loop.mean, loop.std, batch_size=len(dataset.train), backbone_factor=factor
        )
        before = [weights.copy() for weights in network.get_weights()]
        loop.train_epoch(dataset.train, 0)  # one step
        moved[factor] = [after - weights for after, weights in zip(network.get_weights(), before, strict=True)]
    np.testing.assert_allclose(moved[0.25][0], 0.25 * moved[1.0][0], rtol=1e-3, atol=1e-7)
    assert np.abs(moved[1.0][0]).max() > 1e-4 and not moved[0.0][0].any()
    np.testing.assert_allclose(moved[0.0][2], moved[1.0][2])  # the head moves by whole steps
    with pytest.raises(PipelineError, match="model=pretrained"):
        setup.build_loop(small("optimizer.backbone_factor=0.5"), dataset)


@pytest.mark.parametrize("classes", [["0", "1"], None], ids=["two", "all"])
def test_the_head_is_a_logistic_regression_on_the_features(classes):
    import keras

    settings = small(*(["dataset.classes=['0','1']"] if classes else []))
    dataset = load_from_settings(settings.dataset)
    loop = setup.build_loop(settings, dataset)
    network = network_with_backbone(keras, dataset.num_classes)
    loop = type(loop)(network, None, loop.policy, loop.mean, loop.std, batch_size=50)
    features = loop.features(dataset.train)
    assert features.shape == (len(dataset.train), 6 * 6 * 4)
    fit_head(loop, dataset.train)
    assert loop.evaluate(dataset.test)["accuracy"] > (0.95 if classes else 0.85)
    kernel, bias = network.get_layer("head").get_weights()
    predictions = (features @ kernel + bias).argmax(1)
    assert (predictions == loop.evaluate(dataset.train)["predictions"]).all()


def test_a_run_starts_from_the_weights_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = train(small("name=first", "epochs=3", "dataset.classes=['0','1','2']"))
    same, other = (
        setup.build_loop(settings, load_from_settings(settings.dataset)).network
        for settings in (
            small("init=runs/first", "dataset.classes=['0','1','2']"),
            small("init=runs/first", "dataset.classes=['3','4','5']"),
        )
    )
    weights = first.load_model().get_layer("network").get_weights()
    for new, old in zip(same.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_array_equal(other.get_weights()[0], weights[0])
    assert not np.array_equal(
        other.layers[-1].get_weights()[0], first.load_model().get_layer("network").layers[-1].get_weights()[0]
    )
    settings = small("init=runs/missing")
    with pytest.raises(PipelineError, match="missing"):
        setup.build_loop(settings, load_from_settings(settings.dataset))


def test_a_finished_run_is_extended(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(small("name=run", "epochs=2"))
    before = runs.find("run").metrics
    with pytest.raises(PipelineError, match="epochs=4"):
        work(config.compose(["resume=run"]), ["resume=run"])
    with pytest.raises(PipelineError, match="larger"):
        work(config.compose(["resume=run", "epochs=1"]), ["resume=run", "epochs=1"])
    work(config.compose(["resume=run", "epochs=5"]), ["resume=run", "epochs=5"])
    run = runs.find("run")
    assert run.config.epochs == 5 and len(run.metrics["history"]) == 5
    assert run.metrics["history"][:2] == before["history"]
    rates = [epoch["learning_rate"] for epoch in run.metrics["history"]]
    assert rates[1] < rates[2] > rates[3] > rates[4]  # it rises to the rate of the longer schedule
    long = train(small("name=long", "epochs=5"))
    assert rates[2:] == pytest.approx([epoch["learning_rate"] for epoch in long.metrics["history"][2:]])
    assert "95 % confidence interval" in capsys.readouterr().out


def test_with_few_validation_images_the_latest_of_equally_good_epochs_is_kept():
    accuracies = [0.5, 0.9, 0.7, 0.88, 0.8]
    assert run_folder.best_epoch(accuracies, 1000) == 2
    assert run_folder.best_epoch(accuracies, 40) == 4  # the standard error is 0.047
    assert run_folder.best_epoch([0.5, 0.5], 1000) == 2
    for end in range(2, 6):  # an epoch that was kept once is kept, or a later one
        assert run_folder.best_epoch(accuracies[:end], 40) <= run_folder.best_epoch(accuracies, 40)


@pytest.mark.parametrize("operation", ["mixup", "cutmix"])
def test_mixed_images_have_soft_labels(operation):
    settings = small(f"+augment.{operation}=1.0", "epochs=3", "label_smoothing=0")
    dataset = load_from_settings(settings.dataset)
    loop = setup.build_loop(settings, dataset)
    order = np.arange(100, dtype=np.int32)
    ((_, labels),) = loop._shards(dataset.train, order, 50, loop.policy, 0)
    ((_, hard),) = loop._shards(dataset.train, order, 50, loop.normalise_only, 0)
    labels, hard = labels.numpy(), hard.numpy()
    assert labels.shape == (2, 50, 10)
    np.testing.assert_allclose(labels.sum(-1), 1, rtol=1e-6)
    assert ((labels > 0).sum(-1) == 2).any()
    share = np.take_along_axis(labels, hard[..., None], -1)[..., 0]  # of the image's own label
    assert 0 < share.min() < 1
    losses = [loop.train_epoch(dataset.train, epoch)["loss"] for epoch in range(3)]
    assert losses[2] < losses[0]
