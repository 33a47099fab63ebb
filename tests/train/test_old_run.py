"""Runs of an older version (tests/data/run-30f2b6e) can still be read, evaluated, exported and resumed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from export import tflite
from export.predict import Predictor
from pipeline import models, runs
from pipeline.core import config, device
from pipeline.evaluate.run import evaluate_run, predict_probabilities, summary_lines
from pipeline.train import train

FOLDER = Path(__file__).resolve().parents[1] / "data" / "run-30f2b6e"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
FINISHED = ["finished", "finished_mlp", "finished_vit"]


@pytest.fixture(autouse=True)
def in_a_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER, "runs")


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_predicts_and_evaluates_as_before(name):
    run = runs.find(name)
    dataset = run.load_dataset()
    probabilities = predict_probabilities(run.load_model(), dataset.test.images[:8])
    np.testing.assert_allclose(probabilities, EXPECTED[name]["probabilities"], atol=1e-3)
    (line,) = summary_lines(run.metrics)  # this version stored no interval and no baseline
    assert f"{EXPECTED[name]['test_accuracy']:.2%}" in line
    evaluate_run(run, dataset, "test")
    low, high = run.metrics["test_interval"]
    assert low < run.metrics["test_accuracy"] < high and run.metrics["test_baseline"] < 0.2
    assert run.metrics["test_accuracy"] == pytest.approx(EXPECTED[name]["test_accuracy"], abs=0.003)


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_is_exported_to_tflite(name):
    run = runs.find(name)
    dataset = run.load_dataset()
    path = tflite.export(run, dataset)["float32"]
    probabilities = Predictor.load(path).probabilities(device.to_numpy(dataset.test.images[:8]))
    np.testing.assert_allclose(probabilities, EXPECTED[name]["probabilities"], atol=1e-3)


def test_an_interrupted_run_is_resumed_as_before():
    run = train.train(config.compose(["resume=interrupted"]))
    expected = EXPECTED["interrupted"]
    assert (run.metrics["epochs"], run.metrics["best_epoch"]) == (expected["epochs"], expected["best_epoch"])
    resumed, uninterrupted = (
        models.load(path).get_weights() for path in (run.model_path, FOLDER / "finished" / "model.keras")
    )
    for found, weights in zip(resumed, uninterrupted, strict=True):
        np.testing.assert_allclose(found, weights, atol=1e-3)
    probabilities = predict_probabilities(run.load_model(), run.load_dataset().test.images[:8])
    np.testing.assert_allclose(probabilities, EXPECTED["finished"]["probabilities"], atol=1e-3)
