"""`digits`: 1,797 handwritten digits of scikit-learn, 8×8 and grey, enlarged to 32×32; nothing to download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.core.settings import DatasetSettings
from pipeline.data.images import resize_and_center_crop
from pipeline.data.source import Contents, Source

SIZE = (32, 32)


def source(data_dir: Path | None, settings: DatasetSettings) -> Source:
    """The digits; `data_dir` is not used."""
    version = importlib.metadata.version("scikit-learn")
    return Source("scikit-learn's digits", f"scikit-learn {version}", lambda: _read(settings))


def _read(settings: DatasetSettings) -> Contents:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # values are 0 to 16
    shape = (*(settings.size or SIZE), 1)

    def images(split: str) -> Iterator[tuple[str, np.ndarray]]:
        return ((f"digits#{index}", resize_and_center_crop(image, shape)) for index, image in enumerate(pixels))

    return Contents([str(name) for name in digits.target_names], {"train": digits.target.astype(np.int32)}, images)
