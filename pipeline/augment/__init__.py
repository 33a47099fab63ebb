"""Augmentation: uint8 images in, changed at random and normalised, in one launch.

    policy = augment.load_policy("standard")
    images = augment.apply(dataset.train.images, policy, dataset.mean, dataset.std, seed=0, epoch=3)

An operation's arithmetic is in `pixel`, its launch in `kernels` (CPU) and `cuda_kernel` (GPU), its ranges in `policy`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.augment.policy import OPERATIONS, Policy, load_policy, names
from pipeline.core import device
from pipeline.core.errors import PipelineError

__all__ = ["OPERATIONS", "Policy", "apply", "load_policy", "names"]


def apply(
    images: Any,
    policy: str | Mapping[str, Any] | Policy,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    seed: int,
    epoch: int,
    indices: Any = None,
    dtype: str = "float32",
    out: Any = None,
) -> Any:
    """Augment and normalise images; the policy ``none`` only normalises.

    Every draw is a hash of (seed, epoch, the image's index, pixel, operation), so it does not depend on order, batch or
    device. On a GPU the kernel is queued on CuPy's current stream and the call returns at once. A shape, output type
    or set of operations that is new to the process is compiled first, which takes some seconds.

    Args:
        images: uint8 [N, H, W, C], C is 1 or 3. CuPy on a GPU (NumPy is moved there), NumPy without. A copy is made of
            images that are not contiguous.
        policy: From `load_policy`, or what that takes.
        mean: C numbers, in units of pixel / 255.
        std: C numbers above 0, same units.
        seed: From 0 to 2**32 - 1.
        epoch: Likewise.
        indices: Integers [M]: which images, in which order; all of them by default. On a GPU a CuPy array is not
            looked at before the launch: an image whose index is out of range comes out as NaN.
        dtype: "float32" or "float16".
        out: [M, H, W, C] of that dtype, contiguous, where the images live, to write into.

    Returns:
        [M, H, W, C]: (pixel / 255 - mean) / std of the augmented pixels, where the images live; `out` where given.

    Raises:
        PipelineError: An argument of the wrong type, shape or range.

    Example:
        >>> image = np.full((1, 8, 8, 1), 255, np.uint8)
        >>> float(device.to_numpy(apply(image, "none", [0.5], [0.25], seed=0, epoch=0))[0, 0, 0, 0])
        2.0
    """
    policy = load_policy(policy)
    xp = device.xp()
    if getattr(images, "dtype", None) != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        found = f"{images.dtype} {tuple(images.shape)}" if hasattr(images, "dtype") else type(images).__name__
        raise PipelineError(f"images must be uint8 [N, H, W, C] with 1 or 3 channels, got {found}.")
    count, height, width, channels = images.shape
    if height == 0 or width == 0:
        raise PipelineError(f"images must have pixels, got {tuple(images.shape)}.")
    if policy.largest_shift >= min(height, width):
        raise PipelineError(
            f"translate.pixels is {policy.largest_shift}, but the images are only {height}×{width}; "
            f"set augment.translate.pixels to at most {min(height, width) - 1}."
        )
    scale, shift = _normalisation(mean, std, channels)
    seed, epoch = _key("seed", seed), _key("epoch", epoch)
    if dtype not in ("float32", "float16"):
        raise PipelineError(f"dtype must be float32 or float16, got {dtype!r}.")
    images = xp.ascontiguousarray(device.to_device(images))
    indices = _checked_indices(indices, count)

    shape = (len(indices), height, width, channels)
    if out is None:
        out = xp.empty(shape, dtype)
    elif not isinstance(out, xp.ndarray) or out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise PipelineError(
            f"out must be a contiguous {xp.__name__} {dtype} array of shape {shape}, got "
            f"{type(out).__module__} {getattr(out, 'dtype', None)} {getattr(out, 'shape', None)}."
        )
    if len(indices) == 0:
        return out
    if device.has_gpu():
        from pipeline.augment import cuda_kernel

        cuda_kernel.launch(images, indices, policy.settings, policy.operations, seed, epoch, scale, shift, out)
    else:
        from pipeline.augment import kernels

        kernels.launch(images, indices, policy.settings, seed, epoch, scale, shift, out)
    return out


def _normalisation(
    mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale (1 / std) and shift (- mean / std) of each channel."""
    values = {}
    for name, given in (("mean", mean), ("std", std)):
        values[name] = np.asarray(device.to_numpy(given), np.float64)
        if values[name].shape != (channels,) or not np.isfinite(values[name]).all():
            raise PipelineError(f"{name} must be {channels} finite numbers, one a channel, got {given!r}.")
    if not (values["std"] > 0).all():
        raise PipelineError(
            f"std must be above 0, got {tuple(values['std'].tolist())}: a channel that never changes cannot be scaled."
        )
    return tuple((1 / values["std"]).tolist()), tuple((-values["mean"] / values["std"]).tolist())


def _key(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**32:
        raise PipelineError(f"{name} must be a whole number from 0 to 2**32 - 1, got {value!r}.")
    return number


def _checked_indices(indices: Any, count: int) -> Any:
    """`indices` as contiguous int64 where the images live; checked where that is possible without waiting for a GPU."""
    xp = device.xp()
    if indices is None:
        return xp.arange(count, dtype=np.int64)
    if not hasattr(indices, "__cuda_array_interface__"):
        indices = np.asarray(indices)
        if indices.size == 0:
            indices = indices.astype(np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise PipelineError(f"indices must be a list of whole numbers, got {indices.dtype} of shape {indices.shape}.")
    if isinstance(indices, np.ndarray) and indices.size:
        lowest, highest = int(indices.min()), int(indices.max())
        if lowest < 0 or highest >= count:
            wrong = lowest if lowest < 0 else highest
            raise PipelineError(f"indices must be from 0 to {count - 1} for {count} images, got {wrong}.")
    return xp.ascontiguousarray(xp.asarray(indices, dtype=np.int64))
