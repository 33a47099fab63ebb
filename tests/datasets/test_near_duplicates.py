"""Near-duplicates of drawn scenes are found, and different images are not."""

import io
import logging
import time

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pipeline.core import device
from pipeline.data import near_duplicates
from pipeline.data.load import load_dataset

RNG = np.random.default_rng(3)


def scenes(count, height=64, width=64):
    """uint8 [count, height, width, 3]: smooth random colours."""
    noise = RNG.normal(size=(count, height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (0, height / 20, width / 20, 0))
    return np.clip(128 + 50 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def jpeg(images, quality):
    decoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        decoded.append(np.array(Image.open(buffer)))
    return np.stack(decoded)


def enlarged(images, part):
    height, width = images.shape[1:3]
    box = (width * part, height * part, width * (1 - part), height * (1 - part))
    return np.stack([np.array(Image.fromarray(image).resize((width, height), box=box)) for image in images])


VARIANTS = {
    "equal": lambda images: images,
    "brighter": lambda images: np.clip(images * 1.15 + 12, 0, 255).astype(np.uint8),
    "jpeg": lambda images: jpeg(images, 50),
    "shifted": lambda images: np.pad(images, ((0, 0), (2, 0), (2, 0), (0, 0)), mode="edge")[:, :64, :64],
    "noisy": lambda images: np.clip(images + RNG.normal(0, 8, images.shape), 0, 255).astype(np.uint8),
    "enlarged": lambda images: enlarged(images, 0.03),
}


def find(images, others):
    found, partners = near_duplicates.find(device.to_device(images), device.to_device(others))
    return device.to_numpy(found), device.to_numpy(partners)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_scene_are_found_and_new_scenes_are_not(name):
    train, new = scenes(400), scenes(100)
    known = np.arange(0, 400, 4)
    found, partners = find(np.concatenate([new, VARIANTS[name](train[known])]), train)
    assert (found >= 100).all()
    assert np.array_equal(partners, known[found - 100])
    assert len(found) >= 90


@pytest.mark.parametrize("shape", [(8, 8), (33, 47), (224, 160)])
def test_any_size_and_grey(shape):
    images = scenes(30, *shape)[..., :1]
    assert find(images[10:12], images)[1].tolist() == [10, 11]


def test_no_images_and_plain_images():
    images = scenes(4)
    plain = np.full_like(images, 255)
    for first, second in ((images[:0], images), (images, images[:0]), (plain, plain), (plain, images)):
        assert find(first, second)[0].tolist() == []


def test_many_similar_images_take_linear_time():
    train = np.repeat(scenes(1, 32, 32), 10_000, axis=0)
    start = time.perf_counter()
    found, _ = find(train[:2000], train)
    assert len(found) == 2000
    assert time.perf_counter() - start < 20


def test_few_false_alarms(real_data):
    digits = load_dataset("digits", progress=False)
    photos = load_dataset("image_folder", real_data / "photos10", channels=3, progress=False)
    for dataset, limit in ((digits, 0.05), (photos, 0)):
        found, _ = near_duplicates.find(dataset.test.images, dataset.train.images)
        assert len(found) <= limit * len(dataset.test)


def test_loading_own_images_warns(tmp_path, caplog):
    train, new = scenes(12), scenes(4)
    test = np.concatenate([new, VARIANTS["brighter"](train[:2])])
    for split, images in (("train", train), ("test", test)):
        for number, image in enumerate(images):
            folder = tmp_path / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{split}{number}.png")
    with caplog.at_level(logging.WARNING):
        load_dataset("image_folder", tmp_path, validation_fraction=0)
    (record,) = caplog.records
    message = record.getMessage()
    assert "2 of 6 test images" in message
    assert "test4.png" in message and "train0.png" in message
