"""The CUDA kernel under Numba's CUDA simulator, compared with the CPU kernel; needs no GPU."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, warnings
import numpy as np
from pipeline.augment import cuda_kernel, kernels
from pipeline.augment.policy import load_policy
from tests.augment.test_augment import EVERYTHING, random_images

warnings.simplefilter("ignore")  # NumPy warns about intended integer overflow
assert cuda_kernel.SIMULATED
name, dtype, height, width, channels = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
policy = load_policy(EVERYTHING if name == "everything" else name)
images = random_images(4, height, width, channels)
indices = np.array([2, 0, 3], np.int64)
arguments = 5, 9
normalisation = (4.0, 5.0, 3.0)[:channels], (-2.0, -2.5, -1.0)[:channels]
expected = np.empty((3, height, width, channels), np.float32)
kernels.launch(images, indices, policy, *arguments, *normalisation, expected)
buffer = np.full((5, height, width, channels), 9, dtype)
cuda_kernel.launch(images, indices, policy, *arguments, *normalisation, buffer[1:4])
np.testing.assert_allclose(buffer[1:4], expected, rtol=0, atol=1e-3 if dtype == "float32" else 2e-3)
assert (buffer[[0, 4]] == 9).all(), "wrote outside its rows"

# The result for an index out of range is NaN; other images are not affected.
indices = np.array([4, 1, -1], np.int64)
cuda_kernel.launch(images, indices, load_policy("none"), *arguments, *normalisation, buffer[1:4])
assert np.isnan(buffer[[1, 3]]).all() and np.isfinite(buffer[2]).all()
"""


@pytest.mark.parametrize(
    ("policy", "dtype", "shape"),
    [
        ("everything", "float16", (8, 8, 3)),  # reads and writes 64-bit words, exchanged between threads
        ("everything", "float32", (8, 8, 1)),
        ("standard", "float16", (12, 13, 1)),  # rows end inside a group of pixels; reads bytes, writes words
        ("everything", "float16", (7, 9, 3)),  # writes single values
        ("standard", "float32", (7, 9, 1)),
        ("photos", "float16", (12, 16, 3)),
        ("photos", "float32", (9, 7, 1)),
        ("none", "float16", (110, 100, 3)),  # too large for shared memory
    ],
)
def test_cuda_kernel_equals_cpu_kernel(policy, dtype, shape):
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PIPELINE_DEVICE": "cpu"}
    command = [sys.executable, "-c", SCRIPT, policy, dtype, *map(str, shape)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
