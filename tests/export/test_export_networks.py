"""Train every network and export it to every format that works without a GPU."""

import numpy as np
import pytest

from export import artifacts, saved_model, tflite
from export.predict import Predictor
from pipeline.core import config, device
from pipeline.data.load import load_dataset
from pipeline.evaluate import exports
from pipeline.train import train

NETWORKS = {
    "fashion_mlp": ["epochs=5", "optimizer.learning_rate=3e-3"],
    "resnet18": ["model.stem=imagenet", "epochs=3", "dataset.limit_per_class=120", "optimizer.learning_rate=1e-3"],
    "vit_lite": [
        "model.patch=8", "model.depth=2", "model.width=48", "model.heads=3", "epochs=8",
        "optimizer.learning_rate=3e-3",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_every_format_agrees_with_keras(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = ["augment=none", "optimizer=adam", "schedule=cosine", "batch_size=32", f"model={name}", "name=small"]
    run = train.train(config.compose([*recipe, *NETWORKS[name]]))
    assert run.metrics["test_accuracy"] > 0.8  # agreement of an untrained model means nothing
    dataset = run.load_dataset()
    folder = saved_model.save(run)
    files = {"saved_model": folder, **tflite.export(run, dataset)}
    images = device.to_numpy(load_dataset("digits").test.images)
    keras_says = Predictor.load(run.path / "model.keras").probabilities(images).argmax(axis=1)
    for target, path in files.items():
        agreement = np.mean(Predictor.load(path).probabilities(images).argmax(axis=1) == keras_says)
        assert agreement >= (0.97 if target == "int8" else 0.99), (target, agreement)
    narrow = name == "vit_lite"  # of default width: 0.296
    assert artifacts.size(files["int8"]) < (0.5 if narrow else 0.3) * artifacts.size(files["float32"])
    accuracy = {target: exports.recorded(run)[files[target].name]["test_accuracy"] for target in ("float32", "int8")}
    assert accuracy["int8"] >= accuracy["float32"] - 0.01
    capsys.readouterr()
    exports.print_table(run)
    assert "…" not in capsys.readouterr().out
