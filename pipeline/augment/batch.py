"""Batch operations, which mix pairs of images and their labels: mixup and CutMix.

    images, labels = augment.mix(images, labels, policy, seed=0, epoch=3, step=12)

Each image is mixed with the next one of the batch, the last with the first, so the batch must be in random order. The
mixing fraction and the square are drawn once for each batch, from a hash of (seed, epoch, step).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.augment.policy import Policy
from pipeline.core.errors import PipelineError


def mix(images: Any, labels: Any, policy: Policy, *, seed: int, epoch: int, step: int) -> tuple[Any, Any]:
    """Apply the batch operations of a policy; if both are on, one of them, each with probability ½.

    Args:
        images: float32 or float16 [N, H, W, C], normalised, in random order; NumPy or CuPy.
        labels: float32 [N, K], one-hot or probabilities; in the same memory as the images.
        policy: `mixup` and `cutmix` are alpha of the operations; 0 switches one off.
        seed, epoch, step: From 0 to 2**32 - 1; they determine the random numbers.

    Returns:
        New images and labels with the shapes and dtypes of the arguments, or the arguments if both operations are off.

    Raises:
        PipelineError: The labels are not [N, K].
    """
    if policy.mixup and policy.cutmix:
        chosen = mixup if _random(seed, epoch, step, 0).random() < 0.5 else cutmix
    else:
        chosen = mixup if policy.mixup else cutmix
    alpha = policy.mixup if chosen is mixup else policy.cutmix
    return chosen(images, labels, alpha, seed=seed, epoch=epoch, step=step) if alpha else (images, labels)


def mixup(images: Any, labels: Any, alpha: float, *, seed: int, epoch: int, step: int) -> tuple[Any, Any]:
    """Return λ · image + (1 − λ) · next image, and the same of the labels; λ is drawn from Beta(alpha, alpha).

    Source: Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: beyond empirical risk minimization", ICLR 2018. Arguments and
    errors as for `mix`; alpha is above 0.
    """
    _check(images, labels)
    fraction = float(_random(seed, epoch, step, 1).beta(alpha, alpha))
    return _blend(images, fraction), _blend(labels, fraction)


def cutmix(images: Any, labels: Any, alpha: float, *, seed: int, epoch: int, step: int) -> tuple[Any, Any]:
    """Replace a rectangle of each image by that of the next image, and mix the labels by area.

    The rectangle has the aspect ratio of the image and the area 1 − λ, λ drawn from Beta(alpha, alpha). Its centre is
    uniform over the image; the part outside the image does not count.

    Source: Yun et al., "CutMix: regularization strategy to train strong classifiers with localizable features", ICCV
    2019. Arguments and errors as for `mix`; alpha is above 0.
    """
    _check(images, labels)
    random = _random(seed, epoch, step, 2)
    height, width = images.shape[1:3]
    side = math.sqrt(1 - random.beta(alpha, alpha))
    spans = []
    for size in (height, width):
        half = int(size * side) // 2
        centre = int(random.integers(size))
        spans.append(slice(max(centre - half, 0), min(centre + half, size)))
    mixed = images.copy()
    mixed[:, spans[0], spans[1]] = np.roll(images[:, spans[0], spans[1]], -1, axis=0)
    area = (spans[0].stop - spans[0].start) * (spans[1].stop - spans[1].start)
    return mixed, _blend(labels, 1 - area / (height * width))


def _blend(values: Any, fraction: float) -> Any:
    return values * fraction + np.roll(values, -1, axis=0) * (1 - fraction)  # NumPy calls CuPy for CuPy arrays


def _random(seed: int, epoch: int, step: int, purpose: int) -> np.random.Generator:
    """Random numbers on the host from a counter-based generator (Philox-4x64): no state is stored between steps."""
    key = [seed << 32 | epoch, step << 32 | purpose]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


def _check(images: Any, labels: Any) -> None:
    if getattr(labels, "ndim", None) != 2 or len(labels) != len(images) or labels.dtype.kind != "f":
        raise PipelineError(
            f"Expected labels as float32 [{len(images)}, classes], got {getattr(labels, 'dtype', type(labels))} "
            f"{getattr(labels, 'shape', '')}; convert class numbers to one-hot labels."
        )
