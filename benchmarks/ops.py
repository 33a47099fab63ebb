"""Build the custom operations, compare them with TensorFlow's own, and time them: ``python -m benchmarks.ops``"""

from __future__ import annotations

import argparse
import dataclasses
import time

import numpy as np

from benchmarks import ops_timing, results
from pipeline import ops
from pipeline.core import cli, device
from pipeline.core.errors import PipelineError
from pipeline.ops import building


def largest_difference() -> float:
    """Compare values and gradients of the custom operations with TensorFlow's own, for float32 [257, 33]."""
    tf = device.tensorflow()
    generator = np.random.default_rng(0)
    shapes = (257, 33), (33,), (257, 33)
    x, bias, gradient = (tf.constant(generator.standard_normal(shape, np.float32)) for shape in shapes)
    differences = []
    for function in (ops.leaky_relu, lambda x, **options: ops.bias_gelu(x, bias, **options)):
        pair = []
        for operations in ("custom", "tensorflow"):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x, operations=operations)
            pair.append(tf.stack([y, tape.gradient(y, x, gradient)]))
        differences.append(float(tf.reduce_max(tf.abs(pair[0] - pair[1]))))
    return float(np.max(differences))


def main() -> None:
    rows = 65536 if device.has_gpu() else 2048
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.split(":")[0])
    parser.add_argument("--rows", type=cli.positive, default=rows, help="rows of 1024 columns (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=ops.DTYPES, default=list(ops.DTYPES), help="(default: all)")
    arguments = parser.parse_args()

    started = time.perf_counter()
    print(f"built: {building.build()} ({time.perf_counter() - started:.1f} s)")
    if not ops.available():
        raise PipelineError("The custom operations do not run on this machine; see the warning above.", 1)
    difference = largest_difference()
    print(f"largest difference from TensorFlow's own operations: {difference:.1e}")
    if not difference < 1e-5:
        raise PipelineError(f"The custom operations differ from TensorFlow's by {difference:.1e}, more than 1e-5.", 1)

    shape = (arguments.rows, 1024)
    print(f"\nmicroseconds for {shape[0]} × {shape[1]} = {shape[0] * shape[1] / 2**20:g} Mi elements")
    measured = [row for dtype in arguments.dtypes for row in ops_timing.measure(shape, dtype)]
    print(ops_timing.table(measured))
    bandwidth = max(row.bytes / row.floor for row in measured)
    print(f"\na copy moves {bandwidth / 1e9:,.0f} GB/s; 'of copy' is the custom operation's share of that bandwidth")
    figures = {
        "shape": list(shape),
        "copy_bytes_per_second": bandwidth,
        "largest_difference": difference,
        "operations": [{**dataclasses.asdict(row), "fraction_of_copy": row.fraction_of_copy} for row in measured],
    }
    print(f"written to {results.save('ops', figures)}")


if __name__ == "__main__":
    cli.run(main)
