"""How fast are the custom operations? Each beside TensorFlow's own, XLA's fusion, and a copy of the same bytes.

    rows = timing.measure((65536, 1024), "float16")
    print(timing.table(rows))

Each operation is called many times in one graph, each call on the result of the one before, so that none can be left
out and the launches follow each other without Python between them. On a GPU several calls of the graph are queued
before the clock is read: what starting one costs the processor (0.5 ms, several times an operation) passes while the
GPU works.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline import ops
from pipeline.core import device

WAYS = ("custom", "tensorflow", "xla")


AS_FAST = 1.1  # within a tenth


QUEUED = 8  # calls of a graph on a GPU before it is waited for


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation in one direction.

    Attributes:
        operation: Its name.
        direction: ``forward`` or ``backward``.
        dtype: The tensors' type.
        elements: How many in each tensor.
        bytes: What has to be read and written at least.
        seconds: By way: ``custom`` (None where it is not available), ``tensorflow`` for its own operations one after
            the other, ``xla`` for the same compiled.
        floor: Seconds in which a copy moves that many bytes, measured in the same run.
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
        """How much of a copy's bandwidth the custom operation reaches; above 1 where the data stays in a cache."""
        return None if self.seconds["custom"] is None else self.floor / self.seconds["custom"]

    @property
    def verdict(self) -> str:
        """What the custom operation is worth here, in words."""
        own, unfused, xla = (self.seconds[way] for way in WAYS)
        if own is None:
            return "not built"
        return f"{_comparison('TensorFlow', unfused / own)}; {_comparison('XLA', xla / own)}"


def _comparison(rival: str, ratio: float) -> str:
    if ratio > AS_FAST:
        return f"{ratio:.1f}× as fast as {rival}"
    return f"{rival} does as well" if ratio * AS_FAST >= 1 else f"{rival} is {1 / ratio:.1f}× as fast"


def measure(shape: tuple[int, int], dtype: str = "float32", repetitions: int | None = None) -> list[Row]:
    """Time every operation, forward and backward.

    Args:
        shape: (rows, columns) of the features.
        dtype: One of `ops.DTYPES`.
        repetitions: Calls in one graph; 32 on a GPU, 4 without, by default.

    Returns:
        One row for each operation and direction.
    """
    tf = device.tensorflow()
    repetitions = repetitions or (32 if device.has_gpu() else 4)
    generator = np.random.default_rng(0)
    features = tf.cast(generator.standard_normal(shape, np.float32), dtype)
    gradients = tf.cast(generator.standard_normal(shape, np.float32), dtype)
    bias = tf.cast(generator.standard_normal(shape[1:], np.float32), dtype)
    tensor_bytes = features.dtype.size * shape[0] * shape[1]
    seconds_a_byte = copy_seconds(tensor_bytes, repetitions) / (2 * tensor_bytes)
    rows = []
    for name, call in _operations(tf).items():
        for direction, tensors in (("forward", 2), ("backward", 3)):
            seconds = {}
            for way in WAYS:
                if way == "custom" and not ops.available():
                    seconds[way] = None
                    continue
                step = _step(tf, call, way, direction, features, bias)
                seconds[way] = _chain(tf, step, features if direction == "forward" else gradients, bias, repetitions)
            moved = tensors * tensor_bytes
            rows.append(Row(name, direction, dtype, shape[0] * shape[1], moved, seconds, moved * seconds_a_byte))
    return rows


def _operations(tf: Any) -> dict[str, Callable[[Any, Any, bool], Any]]:
    """By name: features, bias and whether the custom operation is meant, to activations.

    TensorFlow's side is what most people write, in the tensors' own type.
    """

    def leaky_relu(x: Any, b: Any, custom: bool) -> Any:
        return ops.leaky_relu(x, 0.9, operations="custom") if custom else tf.nn.leaky_relu(x, 0.9)

    def bias_gelu(approximate: bool) -> Callable[[Any, Any, bool], Any]:
        return lambda x, b, custom: (
            ops.bias_gelu(x, b, approximate=approximate, operations="custom")
            if custom
            else tf.nn.gelu(tf.nn.bias_add(x, b), approximate=approximate)
        )

    return {"leaky_relu": leaky_relu, "bias_gelu": bias_gelu(False), "bias_gelu (tanh)": bias_gelu(True)}


def _step(tf: Any, call: Any, way: str, direction: str, features: Any, bias: Any) -> Callable[[Any, Any], Any]:
    """A function of (tensor, sums) to the same, which does the work once: the tensor is the features, or the gradients
    that come from above; the sums collect the bias's gradient, so that it cannot be left out."""
    custom = way == "custom"

    def forward(tensor: Any, sums: Any, x: Any, b: Any) -> Any:
        return call(tensor, b, custom), sums

    def backward(tensor: Any, sums: Any, x: Any, b: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, b])
            y = call(x, b, custom)
        along_x, along_b = tape.gradient(y, [x, b], tensor)
        return along_x, sums if along_b is None else sums + along_b

    function = forward if direction == "forward" else backward
    if way == "xla":
        function = tf.function(function, jit_compile=True)
    return lambda tensor, sums: function(tensor, sums, features, bias)


def _chain(tf: Any, step: Callable[[Any, Any], Any], start: Any, bias: Any, repetitions: int) -> float:
    """Seconds of one step: the median of five times, of calls of a graph that does `repetitions` of them."""

    @tf.function
    def chain(tensor: Any, sums: Any) -> Any:
        for _ in range(repetitions):
            tensor, sums = step(tensor, sums)
        return tensor, sums

    calls = QUEUED if device.has_gpu() else 1
    sums = tf.zeros_like(bias)

    def once() -> None:
        for _ in range(calls):
            chain(start, sums)
        device.synchronize()

    return _median_seconds(once) / (calls * repetitions)


def copy_seconds(size: int, repetitions: int) -> float:
    """Seconds in which `size` bytes are copied from one array to another: within the GPU, or by all cores."""
    xp = device.xp()
    source, target = xp.ones(size, xp.uint8), xp.zeros(size, xp.uint8)
    if device.has_gpu():

        def once() -> None:
            for _ in range(QUEUED * repetitions):
                target[...] = source
            device.synchronize()

        return _median_seconds(once) / (QUEUED * repetitions)
    threads = device.usable_cores()
    parts = [(index * size // threads, (index + 1) * size // threads) for index in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return _median_seconds(
            lambda: list(pool.map(lambda part: np.copyto(target[slice(*part)], source[slice(*part)]), parts))
        )


def _median_seconds(once: Callable[[], Any], runs: int = 5) -> float:
    once()  # traces, compiles, warms the caches
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def table(rows: list[Row]) -> str:
    """The rows as text, times in µs."""
    lines = [
        f"{'operation':<17} {'':<8} {'type':<8} {'ours':>9} {'TensorFlow':>11} {'XLA':>9} {'copy':>9} {'of copy':>8}  "
    ]
    for row in rows:
        own, unfused, xla = (row.seconds[way] for way in WAYS)
        times = [_microseconds(seconds) for seconds in (own, unfused, xla, row.floor)]
        fraction = "" if own is None else f"{row.fraction_of_copy:.0%}"
        lines.append(
            f"{row.operation:<17} {row.direction:<8} {row.dtype:<8} {times[0]:>9} {times[1]:>11} {times[2]:>9} "
            f"{times[3]:>9} {fraction:>8}  {row.verdict}"
        )
    return "\n".join(lines)


def _microseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:,.1f}"
