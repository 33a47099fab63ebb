"""Makes a small finished run, trained for seconds on real digits, for the tests of `export`."""

import functools
import importlib.metadata
import json

from pipeline import models, runs
from pipeline.core import device
from pipeline.data.load import load_dataset

SETTINGS = {"name": "digits", "image_size": 16, "channels": 3, "progress": False}


@functools.cache
def digits():
    """scikit-learn's digits, as RGB of 16×16."""
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
    (folder / "config.yaml").write_text(json.dumps({"dataset": SETTINGS}), encoding="utf-8")  # JSON is YAML
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
