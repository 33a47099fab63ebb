"""Pictures of what augmentation does, as arrays: for notebook 02 and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline import augment
from pipeline.augment.policy import Policy
from pipeline.core import device

DRAWS = 7
SMALLEST = 64  # pixels; smaller images are enlarged by a whole factor
MARGIN = 2


def example_policies(height: int, width: int) -> dict[str, dict[str, Any]]:
    """For each operation a policy that does only that, always, and strongly enough to be seen.

    Args:
        height, width: Of the images, in pixels.
    """
    side = min(height, width)
    parameters: dict[str, dict[str, Any]] = {
        "flip": {},
        "translate": {"pixels": side // 6},
        "rotate": {"degrees": 30},
        "brightness": {"delta": 0.3},
        "contrast": {"amount": 0.7},
        "noise": {"deviation": [0.0, 0.15]},
        "salt_and_pepper": {"rate": [0.0, 0.15]},
        "cutout": {"side": max(side // 3, 1)},
    }
    return {name: {"name": name, name: parameters[name]} for name in augment.OPERATIONS}


def draws(
    image: Any, policy: str | Mapping[str, Any] | Policy, mean: Any, std: Any, seed: int = 0, count: int = DRAWS
) -> np.ndarray:
    """One image, and what `count` different draws of a policy make of it.

    Args:
        image: uint8 [H, W, C].
        policy: What `augment.load_policy` takes.
        mean, std: Per channel, in units of pixel / 255.

    Returns:
        uint8 [1 + count, H, W, C] in host memory: the image itself, then the draws with the normalisation undone.
    """
    copies = np.repeat(device.to_numpy(image)[None], 1 + count, axis=0)
    drawn = augment.apply(copies, policy, mean, std, seed=seed, epoch=0, indices=range(1, 1 + count))
    return np.concatenate([copies[:1], _pixels(drawn, mean, std)])


def policy_grid(
    images: Any, policy: str | Mapping[str, Any] | Policy, mean: Any, std: Any, seed: int = 0
) -> np.ndarray:
    """A sheet with a row for each image: the image itself, then what the first epochs make of it.

    Args:
        images: uint8 [N, H, W, C], where they live.
        policy: What `augment.load_policy` takes.
        mean, std: Per channel, in units of pixel / 255.

    Returns:
        uint8 [h, w, 3] in host memory.
    """
    columns = [device.to_numpy(images)]
    columns += [
        _pixels(augment.apply(images, policy, mean, std, seed=seed, epoch=epoch), mean, std) for epoch in range(DRAWS)
    ]
    sheet = np.stack(columns, 1)  # [rows, columns, H, W, C]
    factor = max(1, -(-SMALLEST // min(sheet.shape[2:4])))
    sheet = sheet.repeat(factor, axis=2).repeat(factor, axis=3)
    sheet = np.broadcast_to(sheet, (*sheet.shape[:-1], 3))
    sheet = np.pad(sheet, ((0, 0), (0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255)
    rows, columns_, height, width, _ = sheet.shape
    return sheet.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns_ * width, 3)


def _pixels(values: Any, mean: Any, std: Any) -> np.ndarray:
    """Normalised values back as uint8."""
    fractions = device.to_numpy(values) * np.asarray(std) + np.asarray(mean)
    return np.rint(np.clip(fractions, 0, 1) * 255).astype(np.uint8)
