"""Augment and normalise uint8 images in one kernel launch.

    policy = augment.load_policy("standard")
    images = augment.apply(dataset.train.images, policy, dataset.mean, dataset.std, seed=0, epoch=3)

`operations` contains the settings and the arithmetic of each operation, `kernels` (CPU) and `cuda_kernel` (GPU) the
loops, `policy` the policies and `batch` the operations that mix images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.augment.batch import cutmix, mix, mixup
from pipeline.augment.operations import OPERATIONS
from pipeline.augment.policy import Policy, load_policy, names
from pipeline.core import device
from pipeline.core.errors import PipelineError

__all__ = ["OPERATIONS", "Policy", "apply", "cutmix", "load_policy", "mix", "mixup", "names"]


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

    Every random number is a hash of (seed, epoch, image index, pixel, operation), so the result for an image does not
    depend on the order, the batch or the device. On a GPU the call queues the kernel on CuPy's current stream and
    returns immediately. The first call for a new image shape, output type or set of operations compiles the kernel,
    which takes a few seconds.

    Args:
        images: uint8 [N, H, W, C] with 1 or 3 channels: CuPy on a GPU (NumPy is copied to it), otherwise NumPy. Images
            that are not contiguous are copied.
        policy: A `Policy`, or an argument of `load_policy`.
        mean: C numbers, the mean of each channel in units of pixel / 255.
        std: C numbers above 0, the standard deviation of each channel, same units.
        seed: From 0 to 2**32 - 1.
        epoch: From 0 to 2**32 - 1.
        indices: Integers [M], the images to use, in this order; default: all images. A CuPy array is not checked,
            because that would wait for the GPU; the result for an index out of range is NaN.
        dtype: "float32" or "float16".
        out: Array for the result: [M, H, W, C] of this dtype, contiguous, on the same device as the images.

    Returns:
        [M, H, W, C], (pixel / 255 - mean) / std of the augmented images, on the device of the images; `out` if given.

    Raises:
        PipelineError: An argument has the wrong type or shape, or a value is out of range.

    Example:
        >>> image = np.full((1, 8, 8, 1), 255, np.uint8)
        >>> float(device.to_numpy(apply(image, "none", [0.5], [0.25], seed=0, epoch=0))[0, 0, 0, 0])
        2.0
    """
    policy = load_policy(policy)
    xp = device.xp()
    if getattr(images, "dtype", None) != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        found = f"{images.dtype} {tuple(images.shape)}" if hasattr(images, "dtype") else type(images).__name__
        raise PipelineError(f"Expected images as uint8 [N, H, W, C] with 1 or 3 channels, got {found}.")
    count, height, width, channels = images.shape
    if policy.max_shift >= min(height, width):
        raise PipelineError(
            f"translate.pixels is {policy.max_shift}, but the images have {height}×{width} pixels; "
            f"set augment.translate.pixels to at most {min(height, width) - 1}."
        )
    mean, std = (np.asarray(device.to_numpy(values), np.float64) for values in (mean, std))
    if mean.shape != (channels,) or std.shape != (channels,) or not (std > 0).all():
        raise PipelineError(
            f"Expected {channels} numbers for mean and {channels} numbers above 0 for std, "
            f"got {mean.tolist()} and {std.tolist()}."
        )
    if dtype not in ("float32", "float16"):
        raise PipelineError(f"Expected dtype 'float32' or 'float16', got {dtype!r}.")
    images = xp.ascontiguousarray(device.to_device(images))
    indices = _to_indices(indices, count)

    shape = (len(indices), height, width, channels)
    if out is None:
        out = xp.empty(shape, dtype)
    elif not isinstance(out, xp.ndarray) or out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise PipelineError(
            f"Expected out as a contiguous {xp.__name__} {dtype} array of shape {shape}, got "
            f"{type(out).__module__} {getattr(out, 'dtype', None)} {getattr(out, 'shape', None)}."
        )
    if len(indices) == 0:
        return out
    scale, shift = tuple((1 / std).tolist()), tuple((-mean / std).tolist())
    if device.has_gpu():
        from pipeline.augment import cuda_kernel

        cuda_kernel.launch(images, indices, policy, seed, epoch, scale, shift, out)
    else:
        from pipeline.augment import kernels

        kernels.launch(images, indices, policy, seed, epoch, scale, shift, out)
    return out


def _to_indices(indices: Any, count: int) -> Any:
    """The indices as a contiguous int64 array on the pipeline's device; only host arrays are checked."""
    xp = device.xp()
    if indices is None:
        return xp.arange(count, dtype=np.int64)
    if not hasattr(indices, "__cuda_array_interface__"):
        indices = np.asarray(indices, None if len(indices) else np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise PipelineError(f"Expected indices as a list of integers, got {indices.dtype} of shape {indices.shape}.")
    if isinstance(indices, np.ndarray) and indices.size:
        lowest, highest = int(indices.min()), int(indices.max())
        if lowest < 0 or highest >= count:
            wrong = lowest if lowest < 0 else highest
            raise PipelineError(f"Expected indices from 0 to {count - 1} for {count} images, got {wrong}.")
    return xp.ascontiguousarray(xp.asarray(indices, dtype=np.int64))
