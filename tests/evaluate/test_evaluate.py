"""The metrics of an evaluation compared with numbers calculated by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.core import config, device
from pipeline.core.errors import PipelineError
from pipeline.evaluate import figures
from pipeline.evaluate.metrics import calibration_curve, classification_metrics, most_confident_mistakes
from pipeline.evaluate.run import evaluate_run, predict_probabilities
from pipeline.train import train

# Four images of three classes: correct at 0.9, correct at 0.5, wrong at 0.8, wrong at 0.6.
PROBABILITIES = np.array([[0.9, 0.05, 0.05], [0.3, 0.5, 0.2], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2]], np.float32)
LABELS = np.array([0, 1, 1, 2])
NAMES = ["a", "b", "c"]


def test_metrics_match_hand_calculated_numbers():
    measured = classification_metrics(PROBABILITIES, LABELS, NAMES)
    assert measured["accuracy"] == 0.5
    assert measured["loss"] == pytest.approx(-(np.log(0.9) + np.log(0.5) + np.log(0.1) + np.log(0.2)) / 4, rel=1e-5)
    assert measured["confusion_matrix"] == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert measured["per_class"]["a"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "images": 1}
    assert measured["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 1}


def test_calibration_error_is_the_weighted_gap():
    diagram = calibration_curve(PROBABILITIES, LABELS, bins=2)
    # Bins (0, 0.5] and (0.5, 1]: one correct at 0.5; then 0.9, 0.8 and 0.6, of which one is correct.
    np.testing.assert_allclose(diagram["confidence"], [0.5, (0.9 + 0.8 + 0.6) / 3], rtol=1e-6)
    np.testing.assert_allclose(diagram["accuracy"], [1.0, 1 / 3])
    assert diagram["error"] == pytest.approx(0.25 * 0.5 + 0.75 * abs(2.3 / 3 - 1 / 3), rel=1e-5)


def test_most_confident_mistakes_come_first():
    assert most_confident_mistakes(PROBABILITIES, LABELS).tolist() == [2, 3]
    assert most_confident_mistakes(PROBABILITIES, LABELS, count=1).tolist() == [2]


def test_figures_are_drawn_without_any_mistake():
    images = np.zeros((4, 8, 8, 1), np.uint8)
    drawn = figures.evaluation_figures(PROBABILITIES, PROBABILITIES.argmax(axis=1), images, NAMES)
    assert set(drawn) == {"confusion_matrix", "calibration", "mistakes"}


@pytest.mark.parametrize("batch_size", [1, 4, 9, 512])
def test_probabilities_do_not_depend_on_the_batches_or_on_too_little_memory(batch_size):
    tf = device.tensorflow()
    images = np.random.default_rng(0).integers(0, 256, (9, 2, 2, 1), np.uint8)
    sizes = []

    class Model:
        def __call__(self, batch, training):
            sizes.append(batch.shape[0])
            if batch.shape[0] > 4:
                raise tf.errors.ResourceExhaustedError(None, None, "no memory left")
            return tf.reshape(tf.cast(batch, tf.float32), [-1, 4]) / 255

    found = predict_probabilities(Model(), device.to_device(images), batch_size)
    np.testing.assert_allclose(found, images.reshape(9, 4) / np.float32(255), rtol=1e-6)
    assert max(sizes) == min(batch_size, 9)

    class Hungry(Model):
        def __call__(self, batch, training):
            raise tf.errors.ResourceExhaustedError(None, None, "no memory left")

    with pytest.raises(PipelineError, match="memory"):
        predict_probabilities(Hungry(), device.to_device(images), batch_size)


def test_images_added_after_the_training_are_mentioned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)

    def draw(first, last):
        for label in ("dark", "light"):
            Path("photos", label).mkdir(parents=True, exist_ok=True)
            for number in range(first, last):
                pixels = generator.integers(0, 100, (16, 16, 3), np.uint8) + (150 if label == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(Path("photos", label, f"{number}.png"))

    draw(0, 40)
    small = ["model.stages=[[8]]", "epochs=1", "dataset=image_folder", "data_dir=photos", "name=first"]
    run = train.train(config.compose(small))
    evaluate_run(run, run.load_dataset())
    assert "image_folder" not in capsys.readouterr().err
    draw(40, 50)
    evaluate_run(run, run.load_dataset())
    assert "image_folder" in capsys.readouterr().err


def test_an_empty_split_is_an_error():
    dataset = SimpleNamespace(
        name="digits", class_names=NAMES, image_shape=(8, 8, 1), digest="", test=SimpleNamespace(labels=LABELS[:0])
    )
    run = SimpleNamespace(card=SimpleNamespace(class_names=NAMES), check_dataset=lambda dataset: None)
    with pytest.raises(PipelineError, match="test split"):
        evaluate_run(run, dataset)
