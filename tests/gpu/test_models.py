"""Every network on a real GPU: as exact as on the CPU, and learning in each precision, with XLA and without."""

import numpy as np
import pytest

from pipeline import models
from pipeline.core import config, device
from pipeline.data.load import load_dataset
from pipeline.train import setup

pytestmark = pytest.mark.gpu

VIT = ["model.patch=8", "model.depth=2", "model.width=48", "model.heads=3"]
NETWORKS = {"resnet18": ["model.stem=imagenet"], "fashion_mlp": [], "vit_lite": VIT}
OWN_OPERATION = ("fashion_mlp", "vit_lite")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def learned(overrides: list[str], epochs: int = 6) -> float:
    """Validation accuracy on digits after a few epochs of the training loop."""
    dataset = load_dataset("digits")
    setup.seed_everything(0)
    recipe = ["augment=none", "optimizer=adam", "optimizer.learning_rate=3e-3", "batch_size=32", f"epochs={epochs}"]
    loop = setup.build_loop(setup.resolve(config.compose([*recipe, *overrides])), dataset)
    for epoch in range(epochs):
        logs = loop.train_epoch(dataset.train, epoch)
        assert np.isfinite(logs["loss"])
    return loop.evaluate(dataset.validation)["accuracy"]


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_learns_with_xla_in_every_precision(name, precision):
    operations = ["model.operations=tensorflow"] if name in OWN_OPERATION else []
    assert learned([f"model={name}", f"precision={precision}", "xla=true", *operations, *NETWORKS[name]]) > 0.8


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", OWN_OPERATION)
def test_learns_with_the_custom_operation_and_without_xla(name, precision):
    assert learned([f"model={name}", f"precision={precision}", "xla=false", *NETWORKS[name]]) > 0.8


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
@pytest.mark.parametrize("name", OWN_OPERATION)
def test_learns_with_the_custom_operation_among_xlas_clusters(name, precision):
    overrides = [f"model={name}", f"precision={precision}", "model.operations=custom", *NETWORKS[name]]
    assert setup.resolve(config.compose(overrides)).xla == "clusters"
    assert learned(overrides) > 0.8
    assert not device.tensorflow().config.optimizer.get_jit()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("fashion_mlp", {}),
        ("vit_lite", {"pooling": "class_token"}),
        ("vit_lite", {"pooling": "mean"}),
    ],
)
def test_the_cpu_gives_the_same_logits(name, options):
    tf = device.tensorflow()
    setup.seed_everything(0)
    network = models.build(name, (32, 32, 3), 10, **options)
    images = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32)
    on_gpu = network(images, training=False)
    assert "GPU" in on_gpu.device
    with tf.device("CPU:0"):
        again = models.build(name, (32, 32, 3), 10, **options)
        again.set_weights(network.get_weights())
        on_cpu = again(images, training=False)
    # Products on the GPU are in TF32, with 10 bits after the point.
    scale = np.abs(on_cpu.numpy()).max()
    assert np.abs(on_gpu.numpy() - on_cpu.numpy()).max() < 0.02 * scale
