"""Print the size and cost of the networks: ``python -m pipeline.models [NAME ...] --input-shape 32 32 3``."""

from __future__ import annotations

import argparse
import math
from typing import Any

from pipeline import models, ops
from pipeline.core import cli, device


def flops(network: Any) -> int:
    """Floating-point operations of the forward pass for one image; a multiplication and an addition count as two.

    The number comes from TensorFlow's profiler, which counts matrix products, convolutions, pooling and most
    element-wise operations. It omits the tf.einsum of attention, which is added here.

    Args:
        network: A `keras.Model` from `models.build`.
    """
    tf = device.tensorflow()
    with ops.without_custom_operations():
        function = tf.function(lambda images: network(images, training=False))
        graph = function.get_concrete_function(tf.TensorSpec((1, *network.input_shape[1:]))).graph
    builder = tf.compat.v1.profiler.ProfileOptionBuilder
    options = builder(builder.float_operation()).with_empty_output().build()
    total = tf.compat.v1.profiler.profile(graph, options=options).total_float_ops
    for operation in graph.get_operations():
        if operation.type == "Einsum":
            letters = operation.get_attr("equation").decode().split("->")[0].replace(",", "")
            sizes = [size for tensor in operation.inputs for size in tensor.shape]
            total += 2 * math.prod(dict(zip(letters, sizes, strict=True)).values())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.models", description="Print parameters and FLOPs of networks with default options."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(models.NETWORKS)} (default: all)")
    parser.add_argument(
        "--input-shape", type=int, nargs=3, default=(32, 32, 3), metavar=("H", "W", "C"), help="(default: 32 32 3)"
    )
    parser.add_argument("--classes", type=int, default=10, help="number of classes (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"{'network':<12} {'parameters':>12} {'trainable':>12} {'FLOPs per image':>16}")
    for name in arguments.names or models.NETWORKS:
        network = models.build(name, tuple(arguments.input_shape), arguments.classes)
        trainable = sum(math.prod(variable.shape) for variable in network.trainable_variables)
        print(f"{name:<12} {network.count_params():>12,} {trainable:>12,} {flops(network) / 1e6:>14,.4g} M")


if __name__ == "__main__":
    cli.run(main)
