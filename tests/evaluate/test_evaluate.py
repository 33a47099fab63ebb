"""The metrics of an evaluation compared with numbers calculated by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.core import config, device
from pipeline.core.errors import PipelineError
from pipeline.evaluate import figures
from pipeline.evaluate.metrics import (
    calibration_curve,
    classification_metrics,
    highest_losses,
    majority_baseline,
    most_confident_mistakes,
    most_confused_pairs,
    wilson_interval,
)
from pipeline.evaluate.run import evaluate_run, predict_probabilities, summary_lines
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


def test_balanced_accuracy_and_f1_are_means_over_the_classes():
    measured = classification_metrics(PROBABILITIES, LABELS, NAMES)
    assert measured["balanced_accuracy"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert measured["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert measured["interval"] == pytest.approx([0.15, 0.85], abs=0.001)  # Wilson (1927), 2 of 4
    # A class without any image counts in neither.
    more = classification_metrics(np.pad(PROBABILITIES, ((0, 0), (0, 1))), LABELS, [*NAMES, "empty"])
    assert (more["balanced_accuracy"], more["macro_f1"]) == (measured["balanced_accuracy"], measured["macro_f1"])


@pytest.mark.parametrize(("correct", "count"), [(0, 5), (5, 5), (62, 80), (9123, 10000)])
def test_the_interval_of_an_accuracy_is_that_of_scipy(correct, count):
    from scipy.stats import binomtest

    expected = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_baseline_predicts_the_largest_class_of_the_training_split():
    assert majority_baseline(np.array([2, 1, 1]), np.array([0, 1, 2, 2])) == 0.25


def test_the_most_confused_pairs_and_the_highest_losses_come_first():
    matrix = [[5, 1, 0], [0, 2, 7], [3, 0, 1]]
    assert most_confused_pairs(matrix) == [(1, 2, 7), (2, 0, 3), (0, 1, 1)]
    assert most_confused_pairs(matrix, count=1) == [(1, 2, 7)]
    assert highest_losses(PROBABILITIES, LABELS, count=3).tolist() == [2, 3, 1]


def measured_on(correct, count, images=(40, 40), baseline=0.5):
    return {
        "test_accuracy": correct / count, "test_interval": list(wilson_interval(correct, count)),
        "test_baseline": baseline, "test_balanced_accuracy": 0.6, "test_macro_f1": 0.6,
        "test_per_class": {f"class {index}": {"images": number} for index, number in enumerate(images)},
    }  # fmt: skip


def test_the_summary_warns_about_few_images_and_results_below_the_baseline():
    good = summary_lines(measured_on(70, 80))
    assert "87.50%" in good[0] and "78.5% to 93.1%" in good[0] and "50.00%" in good[0]
    assert not any("warning" in line for line in good)
    assert "class 1: 19" in "\n".join(summary_lines(measured_on(70, 80, images=(40, 19))))
    weak = summary_lines(measured_on(45, 80))
    assert "model=pretrained" in weak[-1] and "epochs" in weak[-1] and "labels" in weak[-1]
    assert summary_lines({"test_accuracy": 0.5}) == ["test accuracy 50.00%"]  # a run of an older version


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
