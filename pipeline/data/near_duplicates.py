"""Find images of the same scene in different splits, such as a burst of photos, which make the test accuracy too high.

found, partners = near_duplicates.find(dataset.test.images, dataset.train.images)

A difference hash of grey thumbnails selects candidates, in a time that grows linearly with the number of images. The
correlation of the thumbnails' brightness differences and the mean colours decide.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.core import device

_SIDE = 32  # of a thumbnail, in pixels
_SHIFT = 2  # pixels of a thumbnail by which images of a scene may be shifted, horizontally and vertically
_CHUNK_VALUES = 2**24  # values computed at a time
_TABLES = 16  # hash tables; more tables find more candidates
_DISTANCE = 32  # bits, of 128, in which candidates may differ
_BUCKET = 32  # candidates of an image in each table
_SIMILARITY = (0.8, 0.97)  # lowest and highest limit of the similarity
_COLOUR = 24  # highest difference of the mean colours, 0 to 255, without the brightness
_FLAT = 64  # length of the differences below which an image is noise on a plain area


def find(images: Any, others: Any) -> tuple[Any, Any]:
    """Find the images that show the same scene as one of the others.

    The similarity of two images is the correlation of the brightness differences between neighbouring areas, which does
    not depend on brightness and contrast, for the best shift of up to 6 % of the image. It must be at least 0.8, and
    more for datasets in which all images are similar, such as digits. The mean colours must be similar, too. Plain
    areas without structure are not found.

    Args:
        images: uint8 [N, H, W, C].
        others: uint8 [M, H, W, C], in the same memory.

    Returns:
        (found, partners): int64 [F] indices into `images` in ascending order, and int64 [F] the index of the most
        similar of the `others`; in the same memory.
    """
    xp = device.xp()
    nothing = xp.arange(0), xp.arange(0)
    if not len(images) or not len(others):
        return nothing
    colours, other_colours = _colours(images), _colours(others)
    images, others = _thumbnails(images), _thumbnails(others)
    pairs = _candidates(_hashes(images), _hashes(others))
    if not len(pairs):  # CuPy's unique does not accept empty arrays
        return nothing
    first, second = pairs // len(others), pairs % len(others)
    similarity = _similarity(images, others, first, second)
    same_colours = (xp.abs(colours[first] - other_colours[second]) <= _COLOUR).all(axis=1)
    similar = (similarity >= _limit(others)) & same_colours
    if not similar.any():
        return nothing
    first, second, similarity = first[similar], second[similar], similarity[similar]
    order = xp.lexsort(xp.stack([-similarity.astype(np.float64), first.astype(np.float64)]))
    found, start = xp.unique(first[order], return_index=True)
    return found, second[order][start]


def _thumbnails(images: Any) -> Any:
    """float32 [N, 32, 32]: mean grey values, 0 to 255, of the areas of a regular grid."""
    xp = device.xp()
    count, height, width, channels = images.shape
    rows, columns = xp.asarray(_areas(height)), xp.asarray(_areas(width).T)
    weights = xp.asarray(np.array([0.299, 0.587, 0.114] if channels == 3 else [1], np.float32))
    result = xp.empty((count, _SIDE, _SIDE), np.float32)
    size = max(1, _CHUNK_VALUES // (height * width * channels))
    for start in range(0, count, size):
        chunk = images[start : start + size].astype(np.float32)
        grey = (chunk.reshape(-1, channels) @ weights).reshape(chunk.shape[:3])
        result[start : start + size] = rows @ grey @ columns
    return result


def _colours(images: Any) -> Any:
    """float32 [N, C]: each channel's mean minus the mean of all channels, which brightness hardly changes."""
    xp = device.xp()
    size = max(1, _CHUNK_VALUES // images[0].size)
    parts = [images[start : start + size].mean(axis=(1, 2), dtype=np.float32) for start in range(0, len(images), size)]
    means = xp.concatenate(parts)
    return means - means.mean(axis=1, keepdims=True)


def _areas(size: int) -> np.ndarray:
    """float32 [32, size]: the weight of each pixel in the mean of each area."""
    edges = np.linspace(0, size, _SIDE + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.maximum(overlap, 0) * (_SIDE / size)).astype(np.float32)


def _hashes(thumbnails: Any) -> Any:
    """bool [N, 128]: whether the brightness rises between the areas of an 8×8 grid, to the right and downwards."""
    xp = device.xp()
    count, width = len(thumbnails), _SIDE // 8
    areas = thumbnails.reshape(count, 8, width, 8, width).mean(axis=(2, 4))
    right = xp.roll(areas, -1, axis=2) > areas
    down = xp.roll(areas, -1, axis=1) > areas
    return xp.concatenate([right.reshape(count, -1), down.reshape(count, -1)], axis=1)


def _candidates(hashes: Any, others: Any) -> Any:
    """int64 [P]: pairs, i · M + j, of hashes i and others j that agree in all bits of a table and in most bits."""
    xp = device.xp()
    generator = np.random.default_rng(0)
    count = max(8, len(others).bit_length() - 4)  # bits of the hash in a table; a bucket then contains about 16 images
    powers = xp.asarray(2 ** np.arange(count))
    pairs = []
    for _ in range(_TABLES):
        bits = generator.choice(hashes.shape[1], count, replace=False)
        keys, other_keys = ((values[:, bits] * powers).sum(axis=1) for values in (hashes, others))
        order = xp.argsort(other_keys)
        begin = xp.searchsorted(other_keys[order], keys, side="left")
        end = xp.searchsorted(other_keys[order], keys, side="right")
        for offset in range(_BUCKET):
            members = xp.flatnonzero(begin + offset < end)
            pairs.append(members * len(others) + order[begin[members] + offset])
    pairs = xp.concatenate(pairs)
    if len(pairs):
        pairs = xp.unique(pairs)
    near = xp.zeros(len(pairs), bool)
    size = _CHUNK_VALUES // hashes.shape[1]
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        differing = hashes[part // len(others)] != others[part % len(others)]
        near[start : start + size] = differing.sum(axis=1) <= _DISTANCE
    return pairs[near]


def _differences(thumbnails: Any, down: int = 0, right: int = 0) -> Any:
    """float32 [N, D]: differences of neighbouring areas of 2×2 pixels, of length 1, of the shifted thumbnails."""
    xp = device.xp()
    size = _SIDE - 2 * _SHIFT
    window = thumbnails[:, _SHIFT + down : _SHIFT + down + size, _SHIFT + right : _SHIFT + right + size]
    rows = window[:, ::2] + window[:, 1::2]
    areas = rows[:, :, ::2] + rows[:, :, 1::2]
    parts = [(areas[:, 1:] - areas[:, :-1]), (areas[:, :, 1:] - areas[:, :, :-1])]
    result = xp.concatenate([part.reshape(len(window), -1) for part in parts], axis=1)
    return result / xp.maximum(xp.linalg.norm(result, axis=1, keepdims=True), _FLAT)


def _similarity(images: Any, others: Any, first: Any, second: Any) -> Any:
    """float32 [P]: the correlation of the differences of images[first] and others[second] for the best shift."""
    xp = device.xp()
    result = xp.zeros(len(first), np.float32)
    used, position = xp.unique(first, return_inverse=True)
    used_others, other_position = xp.unique(second, return_inverse=True)
    reference = _differences(others[used_others])
    shifts = range(-_SHIFT, _SHIFT + 1)
    for down, right in ((down, right) for down in shifts for right in shifts):
        shifted = _differences(images[used], down, right)
        size = _CHUNK_VALUES // shifted.shape[1]
        for start in range(0, len(first), size):
            part = slice(start, start + size)
            products = (shifted[position[part]] * reference[other_position[part]]).sum(axis=1)
            result[part] = xp.maximum(result[part], products)
    return result


def _limit(thumbnails: Any) -> float:
    """The lowest similarity of near-duplicates, from the typical similarity of an image to the tenth most similar one.

    The tenth, because a burst contains fewer images than that.
    """
    xp = device.xp()
    sample = _differences(thumbnails[:: -(-len(thumbnails) // 4096)])
    queries = sample[:: -(-len(sample) // 256)]
    rank = min(11, len(sample))  # the most similar image is the image itself
    similar = xp.sort(queries @ sample.T, axis=1)[:, -rank]
    low, high = _SIMILARITY
    typical = float(xp.median(similar))
    return min(max(1 - (1 - typical) ** 2, low), high)
