"""What a network costs: parameters, floating-point operations, activation memory.

    figures = summarise(network)                       # at batch 128, in the dtypes it was built with
    print(figures.parameters, figures.flops)
    Console().print(table({"cnn": figures}))           # from rich.console

``python -m pipeline.models`` prints the table for every network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pipeline.core import device
from pipeline.core.errors import PipelineError


@dataclasses.dataclass(frozen=True)
class Summary:
    """The cost of one network.

    Attributes:
        parameters: All weights, moving averages included.
        trainable_parameters: Those that the optimizer changes.
        flops: Floating-point operations of the forward pass for one image: those of convolutions, dense layers and
            attention, a multiplication and an addition as two. Biases, normalisation, activations and pooling (below
            a hundredth of it in these networks) are not counted.
        activation_bytes: What the backward pass keeps of the forward one for a batch, before a compiler fuses
            anything: the output of every layer in its dtype, and inside attention the queries, keys, values,
            probabilities and weighted values. The input and views (Flatten, Reshape) are not counted.
        batch_size: Images in that batch.
        dtype: What the network computes in: float32, bfloat16 or float16.
    """

    parameters: int
    trainable_parameters: int
    flops: int
    activation_bytes: int
    batch_size: int
    dtype: str


def summarise(network: Any, batch_size: int = 128) -> Summary:
    """Count what `network` costs from the shapes of its layers; nothing is computed.

    Args:
        network: A functional `keras.Model`, from `models.build` or `models.deployable`.
        batch_size: Images in the batch whose activations are counted.

    Raises:
        PipelineError: The batch is empty, or a layer has a kernel whose operations are not known here.
    """
    if batch_size < 1:
        raise PipelineError(f"batch_size must be at least 1, got {batch_size}.")
    layers = _leaves(network)
    policies = [layer.compute_dtype for layer in layers if layer.trainable_weights]
    return Summary(
        parameters=network.count_params(),
        trainable_parameters=sum(math.prod(variable.shape) for variable in network.trainable_variables),
        flops=sum(_flops(layer) for layer in layers),
        activation_bytes=batch_size * sum(_activation_bytes(layer) for layer in layers),
        batch_size=batch_size,
        # The last layer is float32 in every policy, so the most frequent dtype is the policy's.
        dtype=max(policies, key=policies.count),
    )


def table(summaries: Mapping[str, Summary]) -> Any:
    """Name to summary as a `rich` table, ready to print."""
    from rich.table import Table

    result = Table()
    result.add_column("network", no_wrap=True)
    for column in ("parameters", "trainable", "FLOPs an image"):
        result.add_column(column, justify="right")
    batches = {summary.batch_size for summary in summaries.values()}
    header = f"activations at batch {batches.pop()}" if len(batches) == 1 else "activations"
    result.add_column(header, justify="right")
    result.add_column("dtype")
    for name, summary in summaries.items():
        result.add_row(
            name,
            f"{summary.parameters:,}",
            f"{summary.trainable_parameters:,}",
            f"{_three_digits(summary.flops / 1e6)} M",
            f"{_three_digits(summary.activation_bytes / 2**20)} MiB",
            summary.dtype,
        )
    return result


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _leaves(model: Any) -> list[Any]:
    """The layers of a model and of the models inside it, in order, without the inputs."""
    keras = _keras()
    leaves = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            leaves += _leaves(layer)
        elif not isinstance(layer, keras.layers.InputLayer):
            leaves.append(layer)
    return leaves


def _flops(layer: Any) -> int:
    """Operations of a layer's matrix products for one image; 0 for a layer without any."""
    keras = _keras()
    if isinstance(layer, keras.layers.MultiHeadAttention):
        queries, keys, values = _attention(layer)
        heads, key_size, value_size = layer.num_heads, layer.key_dim, layer.value_dim
        outputs = layer.output.shape[-1]
        projections = (
            queries[0] * queries[1] * key_size
            + keys[0] * keys[1] * key_size
            + values[0] * values[1] * value_size
            + queries[0] * value_size * outputs
        )
        return 2 * heads * (projections + queries[0] * keys[0] * (key_size + value_size))
    if isinstance(layer, keras.layers.EinsumDense):
        terms, output = layer.equation.split("->")
        kernel = terms.split(",")[1]
        summed = [size for letter, size in zip(kernel, layer.kernel.shape, strict=True) if letter not in output]
        return 2 * math.prod(layer.output.shape[1:]) * math.prod(summed)
    if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D | keras.layers.Dense):
        # Every weight of the kernel is used once at each position of the output.
        positions = math.prod(layer.output.shape[1:]) // layer.output.shape[-1]
        return 2 * positions * math.prod(layer.kernel.shape)
    if getattr(layer, "kernel", None) is not None:
        raise PipelineError(f"The operations of the layer {layer.name} ({type(layer).__name__}) cannot be counted.")
    return 0


def _activation_bytes(layer: Any) -> int:
    """Bytes that a layer keeps for the backward pass of one image."""
    keras = _keras()
    if isinstance(layer, keras.layers.Flatten | keras.layers.Reshape):
        return 0
    values = math.prod(layer.output.shape[1:])
    if isinstance(layer, keras.layers.MultiHeadAttention):
        (length, _), (others, _), _ = _attention(layer)
        # Queries and keys, values and weighted values, and the probabilities.
        values += layer.num_heads * (
            (length + others) * layer.key_dim + (others + length) * layer.value_dim + length * others
        )
    return values * (4 if layer.output.dtype == "float32" else 2)


def _attention(layer: Any) -> list[tuple[int, int]]:
    """(tokens, length of a token) of an attention's queries, keys and values."""
    shapes = [tuple(tensor.shape[1:]) for tensor in layer.input]
    query, value = shapes[:2]
    return [query, shapes[2] if len(shapes) > 2 else value, value]


def _keras() -> Any:
    device.tensorflow()
    import keras

    return keras
