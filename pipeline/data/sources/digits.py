"""`digits`: scikit-learn's 1,797 handwritten digits, 8×8 and grey, enlarged to 32×32; nothing to download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.data.images import resize_and_center_crop
from pipeline.data.source import Contents, Settings, Source

SIZE = (32, 32)


def source(data_dir: Path | None, settings: Settings) -> Source:
    """The digits; `data_dir` is not used."""
    return Source(
        "scikit-learn's digits", f"scikit-learn {importlib.metadata.version('scikit-learn')}", lambda: _read(settings)
    )


def _read(settings: Settings) -> Contents:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Values go from 0 to 16.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    height, width = settings.image_size or SIZE

    def images(split: str) -> Iterator[tuple[str, np.ndarray]]:
        return (
            (f"digits#{index}", resize_and_center_crop(image, (height, width, 1))) for index, image in enumerate(pixels)
        )

    return Contents([str(name) for name in digits.target_names], {"train": digits.target.astype(np.int32)}, images)
