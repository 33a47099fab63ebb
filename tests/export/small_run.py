"""A small run, trained for seconds on real digits, and its exported files: fixtures for the tests of `export`."""

import functools
import importlib.metadata
import json
import shutil

import pytest

from export import saved_model, tflite
from pipeline import models, runs
from pipeline.core import config, device
from pipeline.data.load import load_dataset

SETTINGS = {"name": "digits", "image_size": 16, "channels": 3, "progress": False}


@functools.cache
def digits():
    """scikit-learn's digits, as 16×16 RGB images."""
    return load_dataset(**SETTINGS)


def write_run(folder, precision="float32", epochs=3):
    """Train a small `cnn` on the digits and write it as a run folder; returns the `Run`."""
    device.tensorflow()
    import keras

    dataset = digits()
    images, labels = device.to_numpy(dataset.train.images), device.to_numpy(dataset.train.labels)
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    try:
        network = models.build("cnn", (16, 16, 3), 10, stages=((16,), (32,), (128, 128)))
        model = models.deployable(network, dataset.mean, dataset.std)
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(keras.optimizers.Adam(0.003), "sparse_categorical_crossentropy")
    model.fit(images, labels, batch_size=50, epochs=epochs, verbose=0)
    folder.mkdir(parents=True)
    model.save(folder / "model.keras")
    settings = config.compose([f"name={folder.name}", *(f"dataset.{key}={value}" for key, value in SETTINGS.items())])
    (folder / "config.yaml").write_text(json.dumps(settings.plain()), encoding="utf-8")  # JSON is YAML
    runs.ModelCard(
        name=folder.name,
        model="cnn",
        dataset="digits",
        class_names=dataset.class_names,
        input_shape=(16, 16, 3),
        mean=dataset.mean,
        std=dataset.std,
        precision=precision,
        parameters=model.count_params(),
        data_digest=dataset.digest,
        versions={"tensorflow": importlib.metadata.version("tensorflow")},
    ).write(folder / "model_card.json")
    return runs.Run(folder)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """A run with nothing exported. Copy it before writing into it."""
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
    """The digits' test split on the host: uint8 [N, 16, 16, 3] and int32 [N]."""
    dataset = digits()
    return device.to_numpy(dataset.test.images), device.to_numpy(dataset.test.labels)
