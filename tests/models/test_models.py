"""Networks: shapes, sizes, precisions, numbers against NumPy, saving, FLOPs, and errors for wrong options."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.special import erf

from pipeline import models
from pipeline.core import cli, config, device
from pipeline.core.errors import PipelineError
from pipeline.models import __main__, cnn
from tests.conftest import REPOSITORY

tf = device.tensorflow()
import keras  # noqa: E402 - only after TensorFlow is prepared

SMALL = {
    "cnn": {"stages": [[8], [16]]},
    "resnet18": {},
    "pretrained": {"image_size": 32},
    "fashion_mlp": {"hidden": [32, 16]},
    "vit_lite": {
        "depth": 2,
        "heads": 2,
        "width": 16,
        "dropout": 0.1,
        "stochastic_depth": 0.2,
        "pooling": "class_token",
    },
}


@pytest.fixture
def precision(request):
    """A dtype policy for one test."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


def random_images(count, shape, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def trainable(network):
    return sum(math.prod(variable.shape) for variable in network.trainable_variables)


# Every network


def test_every_network_is_tried_here():
    assert sorted(SMALL) == list(models.NETWORKS)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"], indirect=True)
@pytest.mark.parametrize("name", SMALL)
def test_a_step_forward_and_backward(name, precision):
    keras.utils.set_random_seed(0)
    network = models.build(name, (8, 8, 3), 5, **SMALL[name])
    images = random_images(5, (8, 8, 3)).astype("float32" if precision == "float32" else "float16")
    labels = np.arange(5)
    with tf.GradientTape() as tape:
        logits = network(images, training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    assert logits.shape == (5, 5) and logits.dtype == tf.float32
    compute = precision.removeprefix("mixed_")
    assert {layer.compute_dtype for layer in network.layers if layer.trainable_weights} == {compute, "float32"}
    assert network.layers[-2].output.dtype == compute
    for variable, gradient in zip(
        network.trainable_variables, tape.gradient(loss, network.trainable_variables), strict=True
    ):
        assert variable.dtype == "float32" and gradient is not None, variable.path
        assert np.isfinite(gradient.numpy()).all(), variable.path
    assert np.abs(gradient.numpy()).max() > 0


@pytest.mark.parametrize("name", ["cnn", "fashion_mlp", "vit_lite"])
def test_a_few_steps_learn_a_batch_by_heart(name):
    keras.utils.set_random_seed(0)
    options = {key: value for key, value in SMALL[name].items() if "dropout" not in key and "stochastic" not in key}
    network = models.build(name, (8, 8, 1), 2, **options)
    images, labels = random_images(8, (8, 8, 1)), np.arange(8) % 2
    optimizer = keras.optimizers.Adam(5e-3)
    for _ in range(8):
        with tf.GradientTape() as tape:
            logits = network(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        optimizer.apply(tape.gradient(loss, network.trainable_variables), network.trainable_variables)
    assert float(loss) < 0.5 * math.log(2)


@pytest.mark.parametrize("name", SMALL)
def test_answers_do_not_depend_on_the_rest_of_the_batch_and_nothing_is_random(name):
    network = models.build(name, (16, 16, 3), 5, **SMALL[name])
    images = random_images(6, (16, 16, 3))
    together = network(images, training=False).numpy()
    assert np.array_equal(network(images, training=False).numpy(), together)
    apart = np.concatenate([network(image[None], training=False).numpy() for image in images])
    assert np.allclose(apart, together, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options"),
    [
        ("resnet18", (28, 28, 1), 10, {}),
        ("resnet18", (64, 64, 3), 200, {"stem": "imagenet"}),
        ("fashion_mlp", (32, 48, 3), 7, {}),
        ("vit_lite", (28, 28, 1), 10, {"depth": 1}),
        ("vit_lite", (64, 64, 3), 200, {"depth": 1, "pooling": "class_token"}),
        ("vit_lite", (32, 48, 3), 7, {"depth": 1, "patch": 8}),
    ],
)
def test_shapes(name, shape, classes, options):
    network = models.build(name, shape, classes, **options)
    assert network.input_shape == (None, *shape) and network.output_shape == (None, classes)
    assert network(random_images(2, shape)).shape == (2, classes)


@pytest.mark.parametrize("name", ["fashion_mlp", "vit_lite"])
def test_xla_compiles_the_network_with_tensorflows_operations(name):
    network = models.build(name, (8, 8, 1), 3, operations="tensorflow", **SMALL[name])
    images = random_images(4, (8, 8, 1))

    @tf.function(jit_compile=True)
    def step(images):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(network(images, training=True) ** 2)
        return tape.gradient(loss, network.trainable_variables)

    assert all(np.isfinite(gradient.numpy()).all() for gradient in step(images))


def test_saved_and_loaded_whole_by_another_process(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    for name, options in SMALL.items():
        network = models.build(name, (16, 16, 3), 5, **options)
        deployable = models.deployable(network, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
        deployable.save(tmp_path / f"{name}.keras")
        np.save(tmp_path / f"{name}.npy", deployable(images).numpy())
    program = (
        "import sys, pathlib, numpy as np\n"
        "from pipeline import models\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "images = np.load(folder / 'images.npy')\n"
        "for path in sorted(folder.glob('*.keras')):\n"
        "    answers = models.load(path)(images).numpy()\n"
        "    print(path.stem, np.abs(answers - np.load(path.with_suffix('.npy'))).max())\n"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    differences = dict(line.split() for line in answer.stdout.splitlines())
    assert sorted(differences) == list(models.NETWORKS)
    assert all(float(difference) < 1e-6 for difference in differences.values())


@pytest.mark.parametrize("name", ["fashion_mlp", "vit_lite", "resnet18", "pretrained"])
def test_tflite_gives_the_same_probabilities(name):
    from export import tflite

    network = models.build(name, (8, 8, 3), 5, **SMALL[name])
    deployable = models.deployable(network, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
    images = np.random.default_rng(2).integers(0, 256, (3, 8, 8, 3), np.uint8)
    interpreter = tf.lite.Interpreter(model_content=tflite.convert(deployable, "float32"))
    pixels, probabilities = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.resize_tensor_input(pixels["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(pixels["index"], images)
    interpreter.invoke()
    assert np.allclose(interpreter.get_tensor(probabilities["index"]), deployable(images).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("resnet18", {"stem": "small"}, "'small'"),
        ("resnet18", {"depth": 50}, "depth"),
        ("fashion_mlp", {"hidden": []}, "hidden"),
        ("fashion_mlp", {"hidden": [64, 0.5]}, "hidden.1"),
        ("fashion_mlp", {"hidden": 64}, "hidden"),
        ("fashion_mlp", {"operations": "fast"}, "'fast'"),
        ("fashion_mlp", {"dropout": 1.0}, "dropout"),
        ("cnn", {"dropout": "half"}, "'half'"),
        ("cnn", {"stages": [[8]] * 6}, "16×16"),
        ("vit_lite", {"patch": 5}, "16×16"),
        ("vit_lite", {"patch": 0}, "patch"),
        ("vit_lite", {"width": 64.0}, "64.0"),
        ("vit_lite", {"heads": 3}, "heads"),
        ("vit_lite", {"depth": 0}, "depth"),
        ("vit_lite", {"mlp_ratio": 0}, "mlp_ratio"),
        ("vit_lite", {"pooling": "max"}, "'max'"),
        ("vit_lite", {"stochastic_depth": -0.1}, "stochastic_depth"),
    ],
)
def test_wrong_options_are_rejected(name, options, word):
    with pytest.raises(PipelineError) as caught:
        models.build(name, (16, 16, 3), 5, **options)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_an_error_inside_a_network_is_not_a_wrong_option(monkeypatch):
    def build(input_shape, num_classes, *, width: int = 1):
        return len(width)

    monkeypatch.setattr(cnn, "build", build)
    with pytest.raises(TypeError, match="len"):
        models.build("cnn", (16, 16, 3), 5, width=2)
    with pytest.raises(PipelineError, match="width"):
        models.build("cnn", (16, 16, 3), 5, width="2")


# init_from


@pytest.mark.parametrize("name", SMALL)
def test_init_from_copies_all_layers_but_a_head_with_other_classes(name):
    other = models.build(name, (16, 16, 3), 5, **SMALL[name])
    same = models.build(name, (16, 16, 3), 5, **SMALL[name])
    images = random_images(2, (16, 16, 3))
    assert models.init_from(same, other) == []
    assert np.array_equal(same(images), other(images))
    fewer = models.build(name, (16, 16, 3), 3, **SMALL[name])
    (head,) = models.init_from(fewer, other)
    assert head == fewer.layers[-1].name
    renamed = models.build(name, (16, 16, 3), 5, **SMALL[name])
    before = renamed.layers[-1].get_weights()
    assert models.init_from(renamed, other, head=False) == [head]
    assert all(np.array_equal(*pair) for pair in zip(before, renamed.layers[-1].get_weights(), strict=True))
    features = [keras.Model(network.input, network.layers[-2].output)(images) for network in (other, renamed)]
    assert np.array_equal(*features)


def test_init_from_rejects_another_network():
    cnn_network, mlp = (models.build(name, (16, 16, 3), 5, **SMALL[name]) for name in ("cnn", "fashion_mlp"))
    with pytest.raises(PipelineError, match="init"):
        models.init_from(cnn_network, mlp)


# resnet18


@pytest.mark.parametrize(
    ("stem", "classes", "count"),
    [("cifar", 10, 11_173_962), ("imagenet", 1000, 11_689_512)],  # torchvision's resnet18 has the latter
)
def test_resnet18_has_the_published_number_of_parameters(stem, classes, count):
    assert trainable(models.build("resnet18", (32, 32, 3), classes, stem=stem)) == count


@pytest.mark.parametrize(("stem", "sizes"), [("cifar", (32, 16, 8, 4)), ("imagenet", (8, 4, 2, 1))])
def test_resnet18_stages_halve_the_map(stem, sizes):
    network = models.build("resnet18", (32, 32, 3), 10, stem=stem)
    for stage, (size, filters) in enumerate(zip(sizes, (64, 128, 256, 512), strict=True), start=1):
        assert network.get_layer(f"stage{stage}_2_relu").output.shape == (None, size, size, filters)


@pytest.mark.parametrize("zero_gamma", [True, False])
def test_resnet18_blocks_start_as_the_identity_with_zero_gamma(zero_gamma):
    network = models.build("resnet18", (8, 8, 3), 10, zero_gamma=zero_gamma)
    ends = [network.get_layer(f"stage1_{block}_relu").output for block in (1, 2)]
    first, second = keras.Model(network.input, ends)(random_images(2, (8, 8, 3)))
    assert np.array_equal(first, second) == zero_gamma


# fashion_mlp


def test_fashion_mlp_has_the_layers_of_the_reference():
    assert trainable(models.build("fashion_mlp", (28, 28, 1), 10)) == 784 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10
    assert trainable(models.build("fashion_mlp", (28, 28, 1), 10)) == 109_386


def test_fashion_mlp_against_numpy():
    network = models.build("fashion_mlp", (6, 5, 3), 4, hidden=[7, 6], negative_slope=0.05)
    x = images = random_images(8, (6, 5, 3))
    x = x.reshape(8, -1)
    weights = network.get_weights()
    for kernel, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        x = x @ kernel + bias
        x = np.where(x > 0, x, 0.05 * x)
    assert np.allclose(network(images), x @ weights[-2] + weights[-1], atol=1e-5)


def test_fashion_mlp_accepts_the_former_name_of_negative_slope():
    network = models.build("fashion_mlp", (6, 5, 3), 4, alpha=0.3)
    assert network.get_layer("dense1_leaky_relu").negative_slope == 0.3
    options = config.compose(["model=fashion_mlp", "model.alpha=0.3"]).model.options
    assert options["negative_slope"] == 0.3 and "alpha" not in options


def test_a_run_of_an_older_version_gives_the_same_network_again():
    from omegaconf import OmegaConf

    folder = REPOSITORY / "tests/data/run-30f2b6e/finished_mlp"
    options = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml").model)
    saved = models.load(folder / "model.keras").get_layer("network")
    network = models.build(options.pop("name"), (16, 16, 1), 10, **options)
    network.set_weights(saved.get_weights())
    images = random_images(3, (16, 16, 1))
    assert np.allclose(network(images), saved(images), atol=1e-5)


# vit_lite


def vit_parameters(shape, classes, width, depth, hidden, patch, token):
    height, breadth, channels = shape
    tokens = (height // patch) * (breadth // patch) + token
    embedding = patch * patch * channels * width + width + tokens * width + token * width
    block = 2 * 2 * width + 4 * (width * width + width) + width * hidden + hidden + hidden * width + width
    return embedding + depth * block + 2 * width + width * classes + classes


@pytest.mark.parametrize("pooling", ["class_token", "mean"])
@pytest.mark.parametrize(("shape", "classes"), [((28, 28, 1), 10), ((64, 64, 3), 200)])
def test_vit_lite_has_the_parameters_of_the_formula(shape, classes, pooling):
    network = models.build("vit_lite", shape, classes, width=48, depth=3, heads=3, mlp_ratio=3, pooling=pooling)
    assert network.count_params() == vit_parameters(shape, classes, 48, 3, 144, 4, pooling == "class_token")


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("pooling", ["class_token", "mean"])
def test_vit_lite_against_numpy(pooling, approximate):
    network = models.build(
        "vit_lite", (8, 12, 3), 5, width=16, depth=2, heads=2, pooling=pooling, approximate_gelu=approximate
    )
    generator = np.random.default_rng(3)  # also for what starts at zero or one, so that it matters
    network.set_weights([generator.normal(scale=0.3, size=weight.shape) for weight in network.get_weights()])
    images = random_images(3, (8, 12, 3))
    expected = vit_forward(network, images, pooling, approximate, heads=2, depth=2)
    assert np.allclose(network(images, training=False), expected, atol=1e-4)


def vit_forward(network, images, pooling, approximate, heads, depth):
    """Dosovitskiy et al., 2021, equations 1 to 4, in NumPy."""

    def weights(name):
        return [weight.astype(np.float64) for weight in network.get_layer(name).get_weights()]

    def normalise(x, name):
        gamma, beta = weights(name)
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * gamma + beta

    def gelu(x):
        if approximate:
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + erf(x / math.sqrt(2)))

    def attention(x, name):
        query, query_bias, key, key_bias, value, value_bias, output, output_bias = weights(name)
        result = output_bias
        for head in range(heads):
            q, k, v = (
                x @ kernel[:, head] + bias[head]
                for kernel, bias in ((query, query_bias), (key, key_bias), (value, value_bias))
            )
            scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
            result = result + scores / scores.sum(-1, keepdims=True) @ v @ output[head]
        return result

    count, height, width, channels = images.shape
    kernel, bias = weights("patches_conv")
    patches = images.reshape(count, height // 4, 4, width // 4, 4, channels).transpose(0, 1, 3, 2, 4, 5)
    x = patches.reshape(count, -1, 16 * channels) @ kernel.reshape(16 * channels, -1) + bias
    if pooling == "class_token":
        (token,) = weights("class_token")
        x = np.concatenate([np.repeat(token, count, axis=0), x], axis=1)
    x = x + weights("positions")[0]
    for block in range(1, depth + 1):
        x = x + attention(normalise(x, f"block{block}_attention_norm"), f"block{block}_attention")
        hidden = normalise(x, f"block{block}_mlp_norm") @ weights(f"block{block}_mlp_expand")[0]
        hidden = gelu(hidden + weights(f"block{block}_mlp_gelu")[0])
        kernel, bias = weights(f"block{block}_mlp_project")
        x = x + hidden @ kernel + bias
    x = normalise(x, "norm")
    x = x[:, 0] if pooling == "class_token" else x.mean(axis=1)
    kernel, bias = weights("logits")
    return x @ kernel + bias


def test_stochastic_depth_skips_whole_images_more_often_the_deeper():
    network = models.build("vit_lite", (8, 8, 1), 2, width=8, depth=5, heads=1, stochastic_depth=0.4)
    names = [layer.name for layer in network.layers]
    assert not any("block1" in name and "stochastic" in name for name in names)
    ones = np.ones((4000, 4, 8), np.float32)
    for block, rate in ((2, 0.1), (3, 0.2), (4, 0.3), (5, 0.4)):
        for branch in ("attention", "mlp"):
            layer = network.get_layer(f"block{block}_{branch}_stochastic_depth")
            kept = layer(ones, training=True).numpy().reshape(4000, -1)
            assert np.array_equal(kept.min(axis=1), kept.max(axis=1))
            # Five standard deviations of the binomial distribution.
            assert abs((kept[:, 0] == 0).mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / 4000)
            assert np.allclose(kept.max(), 1 / (1 - rate))
            assert np.array_equal(layer(ones, training=False), ones)


# FLOPs


def matrix_products(name, shape, classes):
    """Multiplications and additions of convolutions, dense layers and attention, with default options."""
    height, width, channels = shape
    if name == "fashion_mlp":
        return 2 * (height * width * channels * 128 + 128 * 64 + 64 * classes)
    if name == "resnet18":
        macs = 32 * 32 * 27 * 64 + 4 * 32 * 32 * 9 * 64 * 64 + 512 * 10
        for filters, size in ((128, 16), (256, 8), (512, 4)):
            macs += size * size * filters * (9 * filters // 2 + 3 * 9 * filters + filters // 2)
        assert round(macs / 1e9, 2) == 0.56  # as published
        return 2 * macs
    tokens, width = (height // 4) * (width // 4), 128
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 2 * width
    return 2 * (tokens * 16 * channels * width + 6 * block + width * classes)


@pytest.mark.parametrize("name", ["fashion_mlp", "resnet18", "vit_lite"])
def test_flops_are_the_matrix_products_and_a_few_percent(name):
    shape = (32, 32, 3)
    counted = __main__.flops(models.build(name, shape, 10))
    assert 1 <= counted / matrix_products(name, shape, 10) < 1.03


def test_the_command_prints_a_row_for_every_network(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipeline.models", "--input-shape", "32", "32", "3"])
    __main__.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in models.NETWORKS)
    assert "11,173,962" in printed and "1,112 M" in printed


def test_the_command_rejects_an_unknown_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipeline.models", "resnet19"])
    with pytest.raises(SystemExit) as left:
        cli.run(__main__.main)
    assert left.value.code == 2
    assert "'resnet19'" in capsys.readouterr().err
