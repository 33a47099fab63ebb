"""Statistics and selections of a dataset, with cuDF and CuPy on a GPU, otherwise with pandas and NumPy.

statistics.counts(dataset)        # number of images of each class and split
statistics.duplicates(dataset)    # images that occur more than once, also across splits
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.data.dataset import Dataset, Split

_CHUNK_BYTES = 2**26  # pixels hashed at a time; the intermediate arrays are a few times larger
_CHUNK = 256  # images; the sum of 256 squared pixel values is exact in float32 (256 · 255² < 2^24)


def series(array: Any) -> Any:
    """Convert an array to a dataframe column; from CuPy to cuDF without a copy through host memory."""
    frames = device.dataframe()
    return frames.Series(array if frames.__name__ == "cudf" else device.to_numpy(array))


def array(column: Any) -> Any:
    """Convert a numeric dataframe column to an array: CuPy on a GPU, otherwise NumPy."""
    return device.to_device(column.values)


def table(dataset: Dataset) -> Any:
    """A table with one row per image.

    Returns:
        A dataframe with the columns ``split`` (string), ``index`` (int64, the position in the split), ``label``
        (int32), ``class_name`` and ``source`` (strings), in the order train, validation, test.
    """
    frames, xp = device.dataframe(), device.xp()
    names = frames.Series(dataset.class_names)
    parts = []
    for name, split in dataset.splits.items():
        if len(split) == 0:
            continue
        part = frames.DataFrame({"index": series(xp.arange(len(split), dtype=np.int64)), "label": series(split.labels)})
        part["split"] = name
        part["class_name"] = names.iloc[part["label"].values].reset_index(drop=True)
        part["source"] = split.sources
        parts.append(part[["split", "index", "label", "class_name", "source"]])
    return frames.concat(parts, ignore_index=True)


def counts(dataset: Dataset) -> Any:
    """Count the images of each class.

    Returns:
        A dataframe with one row per class, in the order of the labels: ``class_name``, then int64 ``train``,
        ``validation``, ``test`` and ``total``.
    """
    xp, classes = device.xp(), dataset.num_classes
    result = device.dataframe().DataFrame({"class_name": dataset.class_names})
    for name, split in dataset.splits.items():  # CuPy cannot count an empty array
        result[name] = series(xp.bincount(split.labels, minlength=classes) if len(split) else xp.zeros(classes, int))
    result["total"] = result["train"] + result["validation"] + result["test"]
    return result


def random_keys(count: int, seed: int) -> Any:
    """uint64 [count]: a hash of (seed, position), the same on every device (SplitMix64, Steele et al. 2014)."""
    xp = device.xp()
    start = (seed * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) % 2**64
    return _mix(xp.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start))


def _mix(keys: Any) -> Any:
    """SplitMix64's output function on a uint64 array, modulo 2^64."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def _shuffled_ranks(labels: Any, seed: int) -> Any:
    """A dataframe: ``index``, ``label``, ``rank`` (random position in the class, from 0), ``size`` (of the class)."""
    frames, xp = device.dataframe(), device.xp()
    frame = frames.DataFrame({"label": series(labels), "key": series(random_keys(len(labels), seed))})
    frame["index"] = series(xp.arange(len(labels), dtype=np.int64))
    frame = frame.sort_values(["label", "key"]).reset_index(drop=True)
    sizes = xp.bincount(labels).astype(np.int64)
    sorted_labels = array(frame["label"])
    frame["rank"] = series(xp.arange(len(labels), dtype=np.int64) - (xp.cumsum(sizes) - sizes)[sorted_labels])
    frame["size"] = series(sizes[sorted_labels])
    return frame


def stratified_split(labels: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    """Divide images into two parts with the same class proportions.

    The second part receives ``round(fraction · size)`` images of each class, chosen by the seed. If a class has two or
    more images, each part receives at least one. The result is the same on every device.

    Args:
        labels: int32 [N], N may be 0.
        fraction: Fraction of the second part, 0 or more and below 1; 0 leaves it empty.
        seed: Any integer.

    Returns:
        (first, second): int64 indices in ascending order, in the same memory as `labels`.
    """
    xp = device.xp()
    if fraction == 0 or len(labels) == 0:
        return xp.arange(len(labels), dtype=np.int64), xp.arange(0, dtype=np.int64)
    frame = _shuffled_ranks(labels, seed)
    size = array(frame["size"])
    wanted = xp.floor(size * fraction + 0.5).astype(np.int64)
    wanted = xp.minimum(xp.maximum(wanted, 1), size - 1)
    index, held_out = array(frame["index"]), array(frame["rank"]) < wanted
    return xp.sort(index[~held_out]), xp.sort(index[held_out])


def limit_per_class(labels: Any, limit: int, seed: int) -> Any:
    """Choose at most `limit` images of each class by the seed; a smaller limit chooses a subset.

    Args:
        labels: int32 [N].
        limit: 1 or more.
        seed: Any integer.

    Returns:
        int64 indices in ascending order, in the same memory as `labels`.
    """
    xp = device.xp()
    if len(labels) == 0:
        return xp.arange(0, dtype=np.int64)
    frame = _shuffled_ranks(labels, seed)
    return xp.sort(array(frame["index"])[array(frame["rank"]) < limit])


def select_classes(labels: Any, class_names: Sequence[str], wanted: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """Select the images of some classes, and renumber their labels from 0 in the order of `class_names`.

    Args:
        labels: int32 [N].
        class_names: The names of all classes.
        wanted: The names of the selected classes, in any order.

    Returns:
        (indices, labels, class_names): int64 [M] indices of the selected images in ascending order, int32 [M] their
        new labels, and the selected names.

    Raises:
        PipelineError: A name is unknown.
    """
    unknown = [name for name in wanted if name not in class_names]
    if unknown:
        raise PipelineError(f"There is no class {unknown[0]!r}; choose from: {', '.join(class_names)}.")
    selected = [name for name in class_names if name in wanted]
    renumbered = [selected.index(name) if name in selected else -1 for name in class_names]
    labels = device.to_device(np.array(renumbered, np.int32))[labels]
    indices = device.xp().flatnonzero(labels >= 0)
    return indices, labels[indices], selected


def content_hashes(images: Any) -> Any:
    """uint64 [N]: a hash of each image's pixels, computed in the memory of the images.

    Args:
        images: uint8 [N, H, W, C].
    """
    xp = device.xp()
    values = int(np.prod(images.shape[1:]))
    hashes = xp.empty(len(images), np.uint64)
    positions = random_keys(-(-values // 8), seed=0)
    rows = max(1, _CHUNK_BYTES // values)
    for start in range(0, len(images), rows):
        chunk = images[start : start + rows].reshape(-1, values)
        padded = xp.zeros((len(chunk), len(positions) * 8), np.uint8)
        padded[:, :values] = chunk
        # Mix before summing: in a plain sum, opposite changes of two pixels would cancel.
        hashes[start : start + len(chunk)] = _mix(padded.view(np.uint64) ^ positions).sum(axis=1, dtype=np.uint64)
    return hashes


def duplicates(dataset: Dataset) -> Any:
    """The images whose pixels occur more than once, within a split or across splits.

    Returns:
        A dataframe with the columns of `table` and ``group`` (int64, from 0), which is the same for equal images;
        sorted by group, empty if all images differ.
    """
    xp = device.xp()
    frame = table(dataset)
    parts = [content_hashes(split.images) for split in dataset.splits.values() if len(split)]
    _, group, sizes = xp.unique(xp.concatenate(parts), return_inverse=True, return_counts=True)
    repeated = sizes > 1
    renumbered = xp.cumsum(repeated) - 1
    frame["group"] = series(renumbered[group].astype(np.int64))
    frame = frame[series(repeated[group])]
    return frame.sort_values(["group", "split", "index"]).reset_index(drop=True)


def channel_statistics(images: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in units of 0..1 (pixel / 255).

    The sums are exact, so the result is the same on every device. A constant channel gets the standard deviation 1,
    to avoid a division by zero.

    Args:
        images: uint8 [N, H, W, C], N at least 1.

    Returns:
        (mean, std), each C floats.
    """
    xp = device.xp()
    sums = xp.zeros(images.shape[1:], np.float64)
    squares = xp.zeros(images.shape[1:], np.float64)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].astype(np.float32)
        sums += chunk.sum(axis=0)
        squares += xp.square(chunk).sum(axis=0)
    pixels = len(images) * images.shape[1] * images.shape[2]
    mean = device.to_numpy(sums.sum(axis=(0, 1))) / pixels
    variance = np.maximum(device.to_numpy(squares.sum(axis=(0, 1))) / pixels - mean**2, 0)
    std = np.where(variance > 0, np.sqrt(variance), 255.0)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def class_mean_images(images: Any, labels: Any, num_classes: int) -> Any:
    """The mean image of each class.

    Args:
        images: uint8 [N, H, W, C].
        labels: int32 [N].
        num_classes: K.

    Returns:
        float32 [K, H, W, C] in units of 0..255, in the same memory as `images`; 0 for a class without images.
    """
    xp = device.xp()
    means = xp.zeros((num_classes, *images.shape[1:]), np.float32)
    for label in range(num_classes):
        members = images[labels == label]
        means[label] = members.sum(axis=0, dtype=np.float64) / max(len(members), 1)
    return means


def examples(split: Split, num_classes: int, count: int) -> Any:
    """The first images of each class, for a figure.

    Args:
        split: The split.
        num_classes: K; classes 0 to K - 1 are used.
        count: Number of images per class; a class with fewer images is filled with black ones.

    Returns:
        uint8 [K · count, H, W, C], class by class, in the same memory as the images of the split.
    """
    xp = device.xp()
    chosen = xp.zeros((num_classes, count, *split.images.shape[1:]), np.uint8)
    for label in range(num_classes):
        members = xp.flatnonzero(split.labels == label)[:count]
        chosen[label, : len(members)] = split.images[members]
    return chosen.reshape(-1, *split.images.shape[1:])
