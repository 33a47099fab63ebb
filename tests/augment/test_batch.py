"""mixup and CutMix compared with NumPy loops after the papers' code, and with the distributions they draw from."""

import numpy as np
import pytest
from scipy import stats

from pipeline import augment
from pipeline.core import device
from pipeline.core.errors import PipelineError


def batch(count=6, height=12, width=16, classes=5):
    generator = np.random.default_rng(0)
    images = generator.normal(size=(count, height, width, 3)).astype(np.float32)
    return images, np.eye(classes, dtype=np.float32)[generator.integers(0, classes, count)]


def mixed(function, images, labels, alpha=1.0, step=0, seed=3, epoch=5):
    arrays = (device.to_device(array) for array in (images, labels))
    return [device.to_numpy(array) for array in function(*arrays, alpha, seed=seed, epoch=epoch, step=step)]


def rectangle(images, result):
    """Top, bottom, left and right of the pixels that changed."""
    changed = (result != images).any(axis=(0, 3))
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


@pytest.mark.parametrize("step", range(4))
def test_mixup_blends_each_image_with_the_next(step):
    images, labels = batch()
    result, soft = mixed(augment.mixup, images, labels, step=step)
    fraction = (result[0, 0, 0, 0] - images[1, 0, 0, 0]) / (images[0, 0, 0, 0] - images[1, 0, 0, 0])
    assert 0 <= fraction <= 1
    for i in range(6):
        following = (i + 1) % 6
        np.testing.assert_allclose(result[i], fraction * images[i] + (1 - fraction) * images[following], atol=1e-5)
        np.testing.assert_allclose(soft[i], fraction * labels[i] + (1 - fraction) * labels[following], atol=1e-5)


def test_cutmix_replaces_a_rectangle_by_that_of_the_next_image():
    images, labels = batch()
    seen = 0
    for step in range(20):
        result, soft = mixed(augment.cutmix, images, labels, step=step)
        if (result == images).all():
            np.testing.assert_array_equal(soft, labels)
            continue
        seen += 1
        top, bottom, left, right = rectangle(images, result)
        area = (bottom - top) * (right - left) / (12 * 16)
        for i in range(6):
            expected = images[i].copy()
            expected[top:bottom, left:right] = images[(i + 1) % 6, top:bottom, left:right]
            np.testing.assert_array_equal(result[i], expected)
            np.testing.assert_allclose(soft[i], (1 - area) * labels[i] + area * labels[(i + 1) % 6], atol=1e-6)
    assert seen > 10


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_fraction_of_mixup_is_beta_distributed(alpha):
    images, labels = np.zeros((2, 1, 1, 1), np.float32), np.eye(2, dtype=np.float32)
    fractions = [mixed(augment.mixup, images, labels, alpha, step)[1][0, 0] for step in range(2000)]
    assert stats.kstest(fractions, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_the_rectangle_of_cutmix_is_drawn_as_in_the_paper():
    """The share of its image that an image keeps, compared with rand_bbox of the paper's code."""
    generator = np.random.default_rng(1)
    expected = []
    for _ in range(2000):
        side = np.sqrt(1 - generator.beta(1, 1))
        share = 1.0
        for size in (20, 30):
            cut, centre = int(size * side), generator.integers(size)
            share *= (np.clip(centre + cut // 2, 0, size) - np.clip(centre - cut // 2, 0, size)) / size
        expected.append(1 - share)
    images, labels = np.zeros((2, 20, 30, 1), np.float32), np.eye(2, dtype=np.float32)
    found = [mixed(augment.cutmix, images, labels, 1.0, step)[1][0, 0] for step in range(2000)]
    assert stats.ks_2samp(found, expected).pvalue > 1e-3


@pytest.mark.parametrize("function", [augment.mixup, augment.cutmix])
def test_seed_epoch_and_step_determine_the_result(function):
    images, labels = batch()
    before = images.copy(), labels.copy()
    first = mixed(function, images, labels)
    for array, same in zip(first, mixed(function, images, labels), strict=True):
        np.testing.assert_array_equal(array, same)
    for change in ({"seed": 4}, {"epoch": 6}, {"step": 1}):
        assert not np.array_equal(first[0], mixed(function, images, labels, **change)[0])
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(labels, before[1])


def test_float16_images_stay_float16():
    images, labels = batch()
    for function in (augment.mixup, augment.cutmix):
        half, soft = mixed(function, images.astype(np.float16), labels)
        assert (half.dtype, soft.dtype) == (np.float16, np.float32)
        np.testing.assert_allclose(half, mixed(function, images, labels)[0], atol=5e-3)


def test_a_policy_selects_the_batch_operations():
    images, labels = (device.to_device(array) for array in batch())
    arguments = {"seed": 3, "epoch": 5}
    none = augment.mix(images, labels, augment.load_policy("photos"), step=0, **arguments)
    assert none[0] is images
    assert none[1] is labels
    for name in ("mixup", "cutmix"):
        found = augment.mix(images, labels, augment.load_policy({name: 0.4}), step=0, **arguments)
        expected = getattr(augment, name)(images, labels, 0.4, step=0, **arguments)
        np.testing.assert_array_equal(device.to_numpy(found[0]), device.to_numpy(expected[0]))
    both, count = augment.load_policy({"mixup": 1.0, "cutmix": 1.0}), 0
    for step in range(200):
        found = augment.mix(images, labels, both, step=step, **arguments)
        expected = augment.mixup(images, labels, 1.0, step=step, **arguments)
        count += bool((found[0] == expected[0]).all())
    assert 70 < count < 130


def test_class_numbers_as_labels_raise():
    images, _ = batch()
    with pytest.raises(PipelineError, match="one-hot"):
        augment.mixup(images, np.arange(6), 1.0, seed=0, epoch=0, step=0)
