"""The presets: each composes into what its reference system is, and digits are learned in a minute."""

import gzip
import struct
import time

import numpy as np
import pytest

from pipeline import augment, models
from pipeline.core import config
from pipeline.data.load import dataset_names
from pipeline.train import optimizers, train

SHAPES = {"cifar10": (32, 32, 3), "fashion_mnist": (28, 28, 1), "tiny_imagenet": (64, 64, 3)}
PRESETS = sorted(path.stem for path in (config.FOLDER / "experiment").glob("*.yaml"))


def changed_operations(policy: str) -> set[str]:
    """The operations that change any of 64 random images, found by their effect where they can be told apart."""
    images = np.full((64, 8, 8, 3), 128, np.uint8)
    images[:, :, :4] = 64  # the left half is darker, so that a flip or a shift shows
    mean, std = (0.0,) * 3, (1.0,) * 3
    result = np.asarray(augment.apply(images, augment.load_policy(policy), mean, std, seed=1, epoch=0)) * 255
    found = set()
    if ((result < 0.5) | (result > 254.5)).any():
        found.add("salt_and_pepper")
    left, right = np.median(result[:, :, :4], axis=(1, 2, 3)), np.median(result[:, :, 4:], axis=(1, 2, 3))
    if (left > right).any():
        found.add("flip")
    if (np.abs(left - 64) > 2).any():
        found.add("brightness")
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_composes_and_its_parts_accept_it(name):
    settings = config.compose([f"experiment={name}", "data_dir=somewhere"])
    dataset, model = settings.dataset, settings.model
    assert dataset.name in dataset_names() and dataset.data_dir == "somewhere"
    network = models.build(model.name, SHAPES[dataset.name], 10, **model.options)
    assert network.output_shape == (None, 10)
    augment.load_policy(settings.augment)
    optimizer = optimizers.build(
        settings.optimizer, schedule=settings.schedule, warmup=settings.warmup, total_steps=100
    )
    assert float(optimizer.learning_rate) > 0


def test_the_command_line_goes_before_a_preset():
    settings = config.compose(["experiment=fashion_vit", "epochs=3", "model.depth=2", "augment=none"])
    assert (settings.epochs, settings.model.options["depth"], settings.augment["name"]) == (3, 2, "none")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hybrid_resnet18", ("cifar10", "resnet18", 1, 128, "one_cycle")),
        ("highperf_cnn", ("cifar10", "cnn", 5, 128, "one_cycle")),
        ("fashion_leaky_relu", ("fashion_mnist", "fashion_mlp", 10, 128, "one_cycle")),
        ("fashion_vit", ("fashion_mnist", "vit_lite", 20, 128, "cosine")),
        ("tiny_imagenet_vit", ("tiny_imagenet", "vit_lite", 30, 256, "cosine")),
    ],
)
def test_the_presets_are_the_reference_systems(name, expected):
    settings = config.compose([f"experiment={name}"])
    parts = (settings.dataset.name, settings.model.name)
    assert (*parts, settings.epochs, settings.batch_size, settings.schedule) == expected


def test_the_hybrid_policy_is_brightness_with_salt_and_pepper():
    assert changed_operations("hybrid") == {"brightness", "salt_and_pepper"}


def test_fashion_leaky_relu_trains_on_idx_files(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 200), ("t10k", 50)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = generator.integers(0, 60, (count, 28, 28), np.uint8)
        images[np.arange(count), 2 * labels] = 255  # one bright line, whose height is the class
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    monkeypatch.chdir(tmp_path)
    run = train.train(config.compose(["experiment=fashion_leaky_relu", f"data_dir={tmp_path}", "batch_size=10"]))
    assert run.metrics["test_accuracy"] > 0.9
    assert run.card.class_names[9] == "Ankle boot" and run.card.parameters == 109_386


@pytest.mark.parametrize(
    "options",
    [
        ["model=fashion_mlp", "epochs=8"],
        ["model=vit_lite", "model.patch=8", "model.depth=2", "model.width=48", "model.heads=3", "epochs=12"],
    ],
    ids=["fashion_mlp", "vit_lite"],
)
def test_digits_are_learned_within_a_minute(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    recipe = ["augment=none", "optimizer=adam", "optimizer.learning_rate=3e-3", "schedule=cosine", "batch_size=32"]
    started = time.perf_counter()
    run = train.train(config.compose([*recipe, *options]))
    assert run.metrics["test_accuracy"] >= 0.95
    assert time.perf_counter() - started < 60
