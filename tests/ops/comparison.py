"""The custom operations compared with TensorFlow's own in float64; used by the tests for the CPU and for the GPU."""

import numpy as np

from pipeline import ops
from pipeline.core import device

# Rows shorter and longer than a vector of 16 bytes, divisible by it and not; no elements; more than two dimensions.
SHAPES = ((6, 8), (5, 7), (257, 3), (1030, 128), (0, 4), (3, 2, 5, 33), (2, 4099))
# Half a unit in the last place of float16 and bfloat16; a few units for float32, which is used for the arithmetic.
ALLOWED = {"float32": 5e-6, "float16": 6e-4, "bfloat16": 5e-3}
OPERATIONS = ("leaky_relu", "bias_gelu", "bias_gelu (tanh)")


def custom(name, x, bias):
    if name == "leaky_relu":
        return ops.leaky_relu(x, 0.01, operations="custom")
    return ops.bias_gelu(x, bias, approximate="tanh" in name, operations="custom")


def reference(name, x, bias):
    tf = device.tensorflow()
    return tf.nn.leaky_relu(x, 0.01) if name == "leaky_relu" else tf.nn.gelu(x + bias, approximate="tanh" in name)


def largest_difference(name, shape, dtype):
    """Of the values and gradients, relative to the larger of 1 and the largest value of the reference."""
    tf = device.tensorflow()
    generator = np.random.default_rng(sum(shape))
    inputs = [tf.cast(2 * generator.standard_normal(size, np.float32), dtype) for size in (shape, shape[-1:], shape)]
    results = []
    for function, tensors in ((custom, inputs), (reference, [tf.cast(tensor, tf.float64) for tensor in inputs])):
        x, bias, gradient = tensors
        with tf.GradientTape() as tape:
            tape.watch([x, bias])
            y = function(name, x, bias)
        parts = [y, *tape.gradient(y, [x, bias], gradient)]
        results.append([np.asarray(part, np.float64) for part in parts if part is not None])
    differences = [0.0]
    for result, expected in zip(*results, strict=True):
        assert result.shape == expected.shape
        if result.size:
            differences.append(np.abs(result - expected).max() / max(1.0, np.abs(expected).max()))
    return np.max(differences)  # NaN if there is one
