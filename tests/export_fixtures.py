"""A small finished run, trained for seconds on real digits, for the tests of `export`."""

import importlib.metadata
import shutil
import types

import numpy as np
import pytest

from export import saved_model, tflite
from pipeline import device, models, runs

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def digits():
    """scikit-learn's digits as RGB of 16×16, in the form of `pipeline.datasets.Dataset` as far as `export` reads it."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = np.rint(data.images * (255 / 16)).astype(np.uint8).repeat(2, 1).repeat(2, 2)[order]
    images, labels = np.repeat(images[..., None], 3, axis=-1), data.target.astype(np.int32)[order]

    def split(part):
        return types.SimpleNamespace(images=device.to_device(images[part]), labels=device.to_device(labels[part]))

    return types.SimpleNamespace(
        name="digits", class_names=NAMES, train=split(slice(0, 1200)), test=split(slice(1200, None))
    )


def write_run(folder, precision="float32", class_names=NAMES, epochs=3):
    """Train a small `cnn` on the digits and write it as a run folder; returns the `Run`."""
    device.tensorflow()
    import keras

    dataset = digits()
    images, labels = device.to_numpy(dataset.train.images), device.to_numpy(dataset.train.labels)
    mean, std = (images / 255).mean((0, 1, 2)), (images / 255).std((0, 1, 2))
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    try:
        network = models.build("cnn", (16, 16, 3), 10, stages=((16,), (32,), (128, 128)))
        model = models.deployable(network, mean.tolist(), std.tolist())
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(keras.optimizers.Adam(0.003), "sparse_categorical_crossentropy")
    model.fit(images, labels, batch_size=50, epochs=epochs, verbose=0)
    folder.mkdir(parents=True)
    model.save(folder / "model.keras")
    (folder / "config.yaml").write_text("dataset:\n  name: digits\n")
    runs.ModelCard(
        name=folder.name,
        model="cnn",
        dataset="digits",
        class_names=list(class_names),
        input_shape=(16, 16, 3),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        precision=precision,
        parameters=model.count_params(),
        data_digest="0" * 64,
        versions={"tensorflow": importlib.metadata.version("tensorflow")},
    ).write(folder / "model_card.json")
    return runs.Run(folder)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """A run with nothing exported. Do not write into it: copy it."""
    return write_run(tmp_path_factory.mktemp("trained") / "runs" / "small")


@pytest.fixture(scope="session")
def exported_run(trained_run, tmp_path_factory):
    """A copy of `trained_run` with its SavedModel and TFLite files."""
    run = runs.Run(tmp_path_factory.mktemp("exported") / "runs" / "small")
    shutil.copytree(trained_run.path, run.path)
    saved_model.save(run)
    tflite.export(run, digits())
    return run


@pytest.fixture(scope="session")
def digit_images():
    """The digits' test split on the host: uint8 [597, 16, 16, 3] and int32 [597]."""
    dataset = digits()
    return device.to_numpy(dataset.test.images), device.to_numpy(dataset.test.labels)
