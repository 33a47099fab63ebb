"""Are the custom operations right? Each is compared with TensorFlow's own in float64, in values and in gradients.

for check in checks.run():
    print(check.name, check.difference, check.allowed, check.passed)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline import ops
from pipeline.core import device

# Half a unit in the last place of float16 and bfloat16; a few of them for float32, in which all is computed.
ALLOWED = {"float32": 5e-6, "float16": 6e-4, "bfloat16": 5e-3}


# Rows shorter and longer than a vector of 16 bytes, whole and not; a tensor without elements; more than two dimensions.
SHAPES = ((6, 8), (5, 7), (257, 3), (1030, 128), (0, 4), (3, 2, 5, 33), (2, 4099))


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: What was compared.
        difference: The largest difference, relative to the larger of 1 and the reference's largest value.
        allowed: How large it may be.
    """

    name: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed  # a NaN is no pass


def run(dtypes: tuple[str, ...] = ops.DTYPES) -> list[Check]:
    """All checks; needs the custom operations to be available."""
    checks = [worked_example()]
    for dtype in dtypes:
        checks += against_tensorflow(dtype)
    return [*checks, *numeric_gradients()]


def worked_example() -> Check:
    """Leaky ReLU with alpha 0.01 on [[-1, 0, 1], [2, -2, 0.5]]."""
    result = ops.leaky_relu([[-1.0, 0.0, 1.0], [2.0, -2.0, 0.5]], 0.01, operations="custom")
    expected = [[-0.01, 0.0, 1.0], [2.0, -0.02, 0.5]]
    return Check("worked example of leaky_relu", difference(result, np.array(expected)), ALLOWED["float32"])


def against_tensorflow(dtype: str) -> Iterator[Check]:
    """Values and gradients of every operation over `SHAPES`, with TensorFlow's own in float64 on the same inputs."""
    tf = device.tensorflow()
    for name, own, reference in _operations():
        worst = {"values": 0.0, "gradient of features": 0.0, "gradient of bias": 0.0}
        for shape in SHAPES:
            inputs = _inputs(shape, dtype)
            results = _values_and_gradients(own, *inputs)
            expected = _values_and_gradients(reference, *(tf.cast(tensor, tf.float64) for tensor in inputs))
            for part, a, b in zip(worst, results, expected, strict=True):
                if a is not None:
                    worst[part] = np.maximum(worst[part], difference(a, b))  # keeps a NaN
        for part, value in worst.items():
            if part != "gradient of bias" or "bias" in name:
                yield Check(f"{name} {dtype}, {part}", float(value), ALLOWED[dtype])


def numeric_gradients() -> Iterator[Check]:
    """`tf.test.compute_gradient`: the registered gradients against differences of the values, in float32."""
    tf = device.tensorflow()
    features, bias, _ = _inputs((4, 9), "float32")
    # A difference across the kink of leaky_relu at 0 is no derivative.
    features = tf.where(tf.abs(features) < 0.05, 0.5, features)
    for name, own, _ in _operations():
        arguments = [features, bias] if "bias" in name else [features]
        theoretical, numerical = tf.test.compute_gradient(lambda x, b=bias, own=own: own(x, b), arguments, delta=2**-7)
        worst = max(difference(a, b) for a, b in zip(theoretical, numerical, strict=True))
        yield Check(f"{name} float32, compute_gradient", worst, 1e-3)


def difference(result: Any, reference: Any) -> float:
    """The largest difference, relative to the larger of 1 and the reference's largest value; 0 for empty tensors."""
    result, reference = _array(result), _array(reference)
    if result.shape != reference.shape:
        return float("inf")
    if result.size == 0:
        return 0.0
    return float(np.abs(result - reference).max() / max(1.0, np.abs(reference).max()))


def _operations() -> list[tuple[str, Any, Any]]:
    """Name, the custom operation and TensorFlow's own; both of features and bias."""
    tf = device.tensorflow()

    def both(name: str, approximate: bool) -> tuple[str, Any, Any]:
        return (
            name,
            lambda x, b: ops.bias_gelu(x, b, approximate=approximate, operations="custom"),
            lambda x, b: tf.nn.gelu(x + b, approximate=approximate),
        )

    return [
        (
            "leaky_relu",
            lambda x, b: ops.leaky_relu(x, 0.01, operations="custom"),
            lambda x, b: tf.nn.leaky_relu(x, 0.01),
        ),
        both("bias_gelu", False),
        both("bias_gelu (tanh)", True),
    ]


def _inputs(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any, Any]:
    """Features, bias and the gradient that comes from above."""
    tf = device.tensorflow()
    generator = np.random.default_rng(sum(shape))
    sizes = (shape, shape[-1:], shape)
    return tuple(tf.cast(2 * generator.standard_normal(size, np.float32), dtype) for size in sizes)


def _values_and_gradients(function: Any, features: Any, bias: Any, gradient: Any) -> tuple[Any, Any, Any]:
    tf = device.tensorflow()
    with tf.GradientTape() as tape:
        tape.watch([features, bias])
        result = function(features, bias)
    return result, *tape.gradient(result, [features, bias], gradient)


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(device.to_numpy(tensor), np.float64)
