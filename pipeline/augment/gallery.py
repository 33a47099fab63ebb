"""Example images of augmentation, as arrays for notebook 02 and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline import augment
from pipeline.augment.policy import Policy
from pipeline.core import device

DRAWS = 7
MIN_SIDE = 64  # pixels; smaller images are enlarged by an integer factor
MARGIN = 2


def example_policies(height: int, width: int) -> dict[str, dict[str, Any]]:
    """One policy per operation, which always applies this operation, and no other, with a visible effect.

    Args:
        height, width: Size of the images in pixels.

    Returns:
        Arguments of `augment.load_policy`, by operation.
    """
    side = min(height, width)
    return {name: {"name": name, name: operation.example(side)} for name, operation in augment.OPERATIONS.items()}


def draws(
    image: Any, policy: str | Mapping[str, Any] | Policy, mean: Any, std: Any, seed: int = 0, count: int = DRAWS
) -> np.ndarray:
    """One image and `count` random results of a policy.

    Args:
        image: uint8 [H, W, C].
        policy: Argument of `augment.load_policy`.
        mean, std: Per channel, in units of pixel / 255.

    Returns:
        uint8 [1 + count, H, W, C] in host memory: the image, then the results with the normalisation undone.
    """
    copies = np.repeat(device.to_numpy(image)[None], 1 + count, axis=0)
    drawn = augment.apply(copies, policy, mean, std, seed=seed, epoch=0, indices=range(1, 1 + count))
    return np.concatenate([copies[:1], _pixels(drawn, mean, std)])


def policy_grid(
    images: Any, policy: str | Mapping[str, Any] | Policy, mean: Any, std: Any, seed: int = 0
) -> np.ndarray:
    """A grid with one row per image: the image, then its results in the first epochs.

    Args:
        images: uint8 [N, H, W, C], CuPy or NumPy.
        policy: Argument of `augment.load_policy`.
        mean, std: Per channel, in units of pixel / 255.

    Returns:
        uint8 [h, w, 3] in host memory.
    """
    cells = [device.to_numpy(images)]
    for epoch in range(DRAWS):
        cells.append(_pixels(augment.apply(images, policy, mean, std, seed=seed, epoch=epoch), mean, std))
    grid = np.stack(cells, 1)  # [rows, columns, H, W, C]
    factor = max(1, -(-MIN_SIDE // min(grid.shape[2:4])))
    grid = grid.repeat(factor, axis=2).repeat(factor, axis=3)
    grid = np.broadcast_to(grid, (*grid.shape[:-1], 3))
    grid = np.pad(grid, ((0, 0), (0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255)
    rows, columns, height, width, _ = grid.shape
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)


def _pixels(values: Any, mean: Any, std: Any) -> np.ndarray:
    """Convert normalised values back to uint8."""
    fractions = device.to_numpy(values) * np.asarray(std) + np.asarray(mean)
    return np.rint(np.clip(fractions, 0, 1) * 255).astype(np.uint8)
