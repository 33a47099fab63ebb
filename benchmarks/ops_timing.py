"""Time the custom operations next to TensorFlow's own, XLA's fusion, and a copy of the same number of bytes.

    rows = ops_timing.measure((65536, 1024), "float16")
    print(ops_timing.table(rows))

A graph calls an operation many times, each time on the previous result, so that TensorFlow cannot skip a call and no
Python code runs between the launches. On a GPU several graph calls are queued before the clock is read, so that the
host's time to start a graph (0.5 ms) overlaps with the GPU's work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.timing import median_seconds
from pipeline import ops
from pipeline.core import device

VARIANTS = ("custom", "tensorflow", "xla")


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation in one direction.

    Attributes:
        operation: Its name.
        direction: ``forward`` or ``backward``.
        dtype: Dtype of the tensors.
        elements: Number of elements in each tensor.
        bytes: Bytes that must be read and written.
        seconds: Seconds by variant: ``custom`` (None if the custom operation is not available), ``tensorflow``
            (TensorFlow's own operations) and ``xla`` (TensorFlow's own operations, compiled by XLA).
        floor: Seconds for a copy of the same number of bytes, measured in the same run.
    """

    operation: str
    direction: str
    dtype: str
    elements: int
    bytes: int
    seconds: dict[str, float | None]
    floor: float

    @property
    def fraction_of_copy(self) -> float | None:
        """The custom operation's bandwidth relative to a copy; can exceed 1 if the data fits in a cache."""
        return None if self.seconds["custom"] is None else self.floor / self.seconds["custom"]


def measure(shape: tuple[int, int], dtype: str = "float32") -> list[Row]:
    """Time every operation, forward and backward.

    Args:
        shape: (rows, columns) of the features.
        dtype: One of `ops.DTYPES`.

    Returns:
        One row per operation and direction.
    """
    tf = device.tensorflow()
    generator = np.random.default_rng(0)
    features, gradients, bias = (
        tf.cast(generator.standard_normal(size, np.float32), dtype) for size in (shape, shape, shape[1:])
    )
    tensor_bytes = features.dtype.size * shape[0] * shape[1]
    seconds_per_byte = copy_seconds(tensor_bytes) / (2 * tensor_bytes)
    rows = []
    for name, (custom, own) in _operations(tf).items():
        for direction, start, tensors in (("forward", features, 2), ("backward", gradients, 3)):
            seconds: dict[str, float | None] = {"custom": None}
            for variant, call in zip(VARIANTS, (custom, own, own), strict=True):
                if variant != "custom" or ops.available():
                    seconds[variant] = _seconds(tf, call, direction, variant == "xla", start, features, bias)
            moved = tensors * tensor_bytes
            rows.append(Row(name, direction, dtype, shape[0] * shape[1], moved, seconds, moved * seconds_per_byte))
    return rows


def _operations(tf: Any) -> dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]]:
    """Name to (custom operation, its TensorFlow equivalent), each a function of features and bias."""
    return {
        "leaky_relu": (
            lambda x, b: ops.leaky_relu(x, 0.9, operations="custom"),
            lambda x, b: tf.nn.leaky_relu(x, 0.9),
        ),
        "bias_gelu": (
            lambda x, b: ops.bias_gelu(x, b, operations="custom"),
            lambda x, b: tf.nn.gelu(tf.nn.bias_add(x, b)),
        ),
        "bias_gelu (tanh)": (
            lambda x, b: ops.bias_gelu(x, b, approximate=True, operations="custom"),
            lambda x, b: tf.nn.gelu(tf.nn.bias_add(x, b), approximate=True),
        ),
    }


def _seconds(tf: Any, call: Any, direction: str, xla: bool, start: Any, features: Any, bias: Any) -> float:
    """Seconds of one run of an operation.

    A step maps a tensor (the features, or the gradient of the output) and sums to the next ones. The sums accumulate
    the gradient of the bias, so that TensorFlow computes it.
    """
    calls, repetitions = _calls_and_repetitions()

    def forward(tensor: Any, sums: Any, x: Any, b: Any) -> Any:
        return call(tensor, b), sums

    def backward(tensor: Any, sums: Any, x: Any, b: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, b])
            y = call(x, b)
        along_x, along_b = tape.gradient(y, [x, b], tensor)
        return along_x, sums if along_b is None else sums + along_b

    step = forward if direction == "forward" else backward
    if xla:
        step = tf.function(step, jit_compile=True)

    @tf.function
    def chain(tensor: Any, sums: Any) -> Any:
        for _ in range(repetitions):
            tensor, sums = step(tensor, sums, features, bias)
        return tensor, sums

    sums = tf.zeros_like(bias)

    def once() -> None:
        for _ in range(calls):
            chain(start, sums)
        device.synchronize()

    return median_seconds(once) / (calls * repetitions)


def _calls_and_repetitions() -> tuple[int, int]:
    """How often a graph is called before waiting for it, and how often it runs the operation."""
    return (8, 32) if device.has_gpu() else (1, 4)


def copy_seconds(size: int) -> float:
    """Seconds to copy `size` bytes from one array to another: on the GPU, or with all CPU cores."""
    xp = device.xp()
    source, target = xp.ones(size, xp.uint8), xp.zeros(size, xp.uint8)
    if device.has_gpu():
        copies = math.prod(_calls_and_repetitions())

        def once() -> None:
            for _ in range(copies):
                target[...] = source
            device.synchronize()

        return median_seconds(once) / copies
    threads = device.usable_cores()
    parts = [slice(index * size // threads, (index + 1) * size // threads) for index in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return median_seconds(lambda: list(pool.map(lambda part: np.copyto(target[part], source[part]), parts)))


def table(rows: list[Row]) -> str:
    """The rows as text, times in µs; the last columns compare the custom operation with the others."""
    times = (
        f"{'custom':>9} {'TensorFlow':>11} {'XLA':>9} {'copy':>9} {'of copy':>8} {'vs TensorFlow':>14} {'vs XLA':>7}"
    )
    lines = [f"{'operation':<17} {'':<8} {'dtype':<8} {times}"]
    for row in rows:
        custom, own, xla = (row.seconds[variant] for variant in VARIANTS)
        line = f"{row.operation:<17} {row.direction:<8} {row.dtype:<8} {_micro(custom):>9} {_micro(own):>11} "
        line += f"{_micro(xla):>9} {_micro(row.floor):>9}"
        if custom is not None:
            line += f" {row.fraction_of_copy:>8.0%} {own / custom:>13.1f}× {xla / custom:>6.1f}×"
        lines.append(line)
    return "\n".join(lines)


def _micro(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:,.1f}"
