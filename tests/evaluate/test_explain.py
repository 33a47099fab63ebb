"""Heat maps compared with NumPy, and the files of an explained run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest

from pipeline import models, runs
from pipeline.core import config, device
from pipeline.core.errors import PipelineError
from pipeline.evaluate import __main__ as command
from pipeline.evaluate import explain
from pipeline.evaluate.run import predict_probabilities
from pipeline.train import train

RNG = np.random.default_rng(3)


def convolutional(nested):
    """A network whose last feature map is that of a convolution, which may be inside a nested model."""
    device.tensorflow()
    import keras

    convolution = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="last")
    images = x = keras.Input((6, 8, 3))
    if nested:
        inside = keras.Input((6, 8, 3))
        backbone = keras.Model(inside, convolution(keras.layers.Conv2D(3, 1)(inside)), name="backbone")
        backbone.trainable = False
        x = backbone(keras.layers.Resizing(6, 8)(x))
    else:
        x = convolution(keras.layers.Conv2D(3, 1)(x))
    logits = keras.layers.Dense(2, name="head")(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model(images, logits, name="network")


@pytest.mark.parametrize("nested", [False, True])
def test_grad_cam_of_average_pooling_is_the_class_activation_map(nested):
    """With global average pooling, Grad-CAM equals CAM (Selvaraju et al., 2017, section 3.1; Zhou et al., 2016)."""
    import keras

    network = convolutional(nested)
    assert explain.last_feature_map(network).name == "last"
    pixels = RNG.integers(0, 256, (5, 6, 8, 3), np.uint8)
    classes = [0, 1, 1, 0, 1]
    name, maps = explain.heat_maps(
        models.deployable(network, (0.5,) * 3, (0.25,) * 3), device.to_device(pixels), classes
    )
    part = network.get_layer("backbone") if nested else keras.Model(network.inputs, network.get_layer("last").output)
    features = np.asarray(part(((pixels / 255 - 0.5) / 0.25).astype(np.float32)))
    kernel = np.asarray(network.get_layer("head").kernel)
    expected = np.maximum(np.einsum("nhwc,cn->nhw", features, kernel[:, classes]), 0)
    expected -= expected.min(axis=(1, 2), keepdims=True)
    expected /= np.maximum(expected.max(axis=(1, 2), keepdims=True), 1e-12)
    assert name == "Grad-CAM" and expected.std() > 0
    np.testing.assert_allclose(maps, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "pretrained"])
def test_the_feature_map_of_a_network_is_the_one_before_its_global_pooling(name):
    options = {"weights": None, "image_size": 64} if name == "pretrained" else {}
    network = models.build(name, (64, 64, 3), 3, **options)
    layer = explain.last_feature_map(network)
    pooling = next(layer for layer in network.layers if "global" in type(layer).__name__.lower())
    assert layer.output.shape == pooling.input.shape


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_attention_is_the_product_of_all_blocks(pooling):
    import keras

    network = models.build("vit_lite", (8, 12, 1), 3, depth=2, width=16, pooling=pooling, operations="tensorflow")
    pixels = RNG.integers(0, 256, (2, 8, 12, 1), np.uint8)
    name, maps = explain.heat_maps(models.deployable(network, (0.5,), (0.25,)), device.to_device(pixels), [0, 1])
    product = np.eye(6 + (pooling == "class_token"))
    for block in ("block1", "block2"):
        tokens = keras.Model(network.inputs, network.get_layer(f"{block}_attention_norm").output)
        tokens = tokens(((pixels / 255 - 0.5) / 0.25).astype(np.float32))
        layer = network.get_layer(f"{block}_attention")
        scores = np.asarray(layer(tokens, tokens, return_attention_scores=True)[1]).mean(axis=1)
        product = (scores + np.eye(scores.shape[-1])) / 2 @ product
    received = product[:, 0, 1:] if pooling == "class_token" else product.mean(axis=1)
    grid = received.reshape(2, 2, 3)
    assert name == "attention" and maps.shape == (2, 8, 12)
    for index in range(2):  # the corners of an enlarged map are those of the map
        assert (
            np.argsort(maps[index, [0, 0, -1, -1], [0, -1, 0, -1]]).tolist()
            == np.argsort(grid[index, [0, 0, -1, -1], [0, -1, 0, -1]]).tolist()
        )


def test_a_network_without_convolutions_and_attention_has_no_heat_map():
    network = models.build("fashion_mlp", (8, 8, 1), 3, operations="tensorflow")
    pixels = device.to_device(RNG.integers(0, 256, (2, 8, 8, 1), np.uint8))
    assert explain.heat_maps(models.deployable(network, (0.5,), (0.25,)), pixels, [0, 1]) is None


def test_the_training_images_with_the_highest_loss_are_listed():
    labels, sources = np.array([0, 1, 1]), pandas.Series(["a.png", "b.png", "c.png"])
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]], np.float32)
    table = explain.suspicious_labels(probabilities, SimpleNamespace(labels=labels, sources=sources), ["cat", "dog"])
    assert table.index.tolist() == [1, 2, 0] and table["source"].tolist() == ["b.png", "c.png", "a.png"]
    assert table.iloc[0][["label", "predicted"]].tolist() == ["dog", "cat"]
    assert table["loss"].tolist() == pytest.approx([-np.log(0.2), -np.log(0.6), -np.log(0.9)], rel=1e-5)


def test_the_command_writes_tables_and_figures_and_averages_mirror_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = train.train(config.compose(["epochs=2", "batch_size=32", "model.stages=[[8],[16]]", "name=first"]))
    before = run.metrics
    monkeypatch.setattr(sys, "argv", ["evaluate", "first"])
    command.main()
    printed = capsys.readouterr().out
    assert "most confused pairs" in printed and "highest loss" in printed and "confidence interval" in printed
    written = {path.name for path in Path("runs/first/evaluation").iterdir()}
    assert {"train_highest_loss.csv", "train_highest_loss.png", "test_explained_mistakes.png"} <= written
    assert len(pandas.read_csv("runs/first/evaluation/train_highest_loss.csv")) == 24
    monkeypatch.setattr(sys, "argv", ["evaluate", "tta=flip"])
    command.main()
    dataset, model = run.load_dataset(), run.load_model()
    images = dataset.test.images
    both = (predict_probabilities(model, images) + predict_probabilities(model, images[:, :, ::-1])) / 2
    expected = (both.argmax(axis=1) == device.to_numpy(dataset.test.labels)).mean()
    assert runs.find("first").metrics["test_flip_accuracy"] == pytest.approx(expected)
    assert runs.find("first").metrics["test_accuracy"] == before["test_accuracy"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "first", "tta=rotate"])
    with pytest.raises(PipelineError, match="rotate"):
        command.main()
