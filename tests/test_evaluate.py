"""The figures of an evaluation against numbers worked out by hand."""

import numpy as np
import pytest

from pipeline import PipelineError, evaluate

# Four images of three classes: right at 0.9, right at 0.5, wrong at 0.8, wrong at 0.6.
PROBABILITIES = np.array([[0.9, 0.05, 0.05], [0.3, 0.5, 0.2], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2]], np.float32)
LABELS = np.array([0, 1, 1, 2])
NAMES = ["a", "b", "c"]


def test_measure_gives_hand_calculated_figures():
    measured = evaluate.measure(PROBABILITIES, LABELS, NAMES)
    assert measured["accuracy"] == 0.5
    assert measured["loss"] == pytest.approx(-(np.log(0.9) + np.log(0.5) + np.log(0.1) + np.log(0.2)) / 4, rel=1e-5)
    assert measured["confusion_matrix"] == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert measured["per_class"]["a"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "images": 1}
    assert measured["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 1}


def test_calibration_error_is_the_weighted_gap():
    diagram = evaluate.calibration(PROBABILITIES, LABELS, bins=2)
    # Bins (0, 0.5] and (0.5, 1]: one right answer at 0.5; then 0.9, 0.8 and 0.6 of which one is right.
    np.testing.assert_allclose(diagram["confidence"], [0.5, (0.9 + 0.8 + 0.6) / 3], rtol=1e-6)
    np.testing.assert_allclose(diagram["accuracy"], [1.0, 1 / 3])
    np.testing.assert_allclose(diagram["weight"], [0.25, 0.75])
    assert diagram["error"] == pytest.approx(0.25 * 0.5 + 0.75 * abs(2.3 / 3 - 1 / 3), rel=1e-5)


def test_most_confident_mistakes_come_first():
    assert evaluate.most_confident_mistakes(PROBABILITIES, LABELS).tolist() == [2, 3]
    assert evaluate.most_confident_mistakes(PROBABILITIES, LABELS, count=1).tolist() == [2]


def test_pictures_are_drawn_also_without_any_mistake():
    images = np.zeros((4, 8, 8, 1), np.uint8)
    figures = evaluate.draw(PROBABILITIES, PROBABILITIES.argmax(axis=1), images, NAMES)
    assert set(figures) == {"confusion_matrix", "calibration", "mistakes"}


def test_empty_split_is_one_sentence():
    with pytest.raises(PipelineError, match="this split is empty"):
        evaluate.measure(PROBABILITIES[:0], LABELS[:0], NAMES)
