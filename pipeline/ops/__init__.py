"""Custom TensorFlow operations in C++ and CUDA: `leaky_relu` and `bias_gelu`, forward and backward.

    y = ops.leaky_relu(x, negative_slope=0.01)
    y = ops.bias_gelu(x, bias)               # gelu(x + bias) in one pass over the memory
    ops.available()                          # whether the custom operations run on this machine

The first use compiles them (`pipeline.ops.building`) into the cache folder. If that is not possible, one warning names
the reason, and TensorFlow's own operations are used; the results are the same. `pipeline.ops.layers` has Keras layers.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from pipeline.core import device
from pipeline.core.errors import PipelineError

CHOICES = ("auto", "custom", "tensorflow")
DTYPES = ("float32", "float16", "bfloat16")

_log = logging.getLogger(__name__)
_only_tensorflow = contextvars.ContextVar("only_tensorflow", default=False)


def available() -> bool:
    """Whether the custom operations run on this machine. The first call builds them; if that fails, it warns."""
    return _library() is not None


@functools.cache
def _library() -> ModuleType | None:
    from pipeline.ops import building

    try:
        return building.load()
    except PipelineError as error:
        _log.warning("%s TensorFlow's own operations are used instead; the results are the same.", error)
        return None


def uses_custom_operations(network: Any) -> bool:
    """Whether a Keras network runs a custom operation on this machine, so that XLA cannot compile it.

    Builds the operations if a layer of the network needs them.
    """
    return any(
        _custom(layer.operations)
        for layer in network._flatten_layers()  # also the layers inside other layers
        if getattr(layer, "has_custom_operation", False)
    )


@contextlib.contextmanager
def without_custom_operations() -> Iterator[None]:
    """Use TensorFlow's own operations inside the block, even where ``operations="custom"`` is set.

    Use it to trace a graph that is exported or compiled by XLA.
    """
    token = _only_tensorflow.set(True)
    try:
        yield
    finally:
        _only_tensorflow.reset(token)


def check_choice(operations: str) -> str:
    """Return `operations`; raise `PipelineError` if it is not one of `CHOICES`."""
    if operations not in CHOICES:
        raise PipelineError(f"operations must be one of {', '.join(CHOICES)}, got {operations!r}.")
    return operations


def _custom(operations: str, dtype: str = "float32") -> bool:
    """Whether to use the custom operation for tensors of this dtype."""
    if check_choice(operations) == "tensorflow" or _only_tensorflow.get():
        return False
    if operations == "custom" and dtype not in DTYPES:
        raise PipelineError(f"The custom operations support {', '.join(DTYPES)}, got {dtype}; set operations=auto.")
    if operations == "custom" and not available():
        raise PipelineError("The custom operations cannot be built here; set operations=auto or operations=tensorflow.")
    return dtype in DTYPES and available()


def leaky_relu(features: Any, negative_slope: float = 0.01, *, operations: str = "auto") -> Any:
    """`features` where they are positive, `negative_slope` times `features` elsewhere (Maas, Hannun and Ng, 2013).

    >>> leaky_relu([[-1.0, 0.0, 1.0], [2.0, -2.0, 0.5]], 0.01).numpy().round(6)
    array([[-0.01,  0.  ,  1.  ],
           [ 2.  , -0.02,  0.5 ]], dtype=float32)

    Args:
        features: A tensor of any shape; the custom operation supports float32, float16 and bfloat16.
        negative_slope: The slope for negative values; any number.
        operations: ``auto`` uses the custom operation if it is available and supports the dtype, ``custom`` requires
            it, ``tensorflow`` uses TensorFlow's own operation.

    Returns:
        A tensor with the shape and dtype of `features`, on the same device.

    Raises:
        PipelineError: Unknown `operations`, or ``custom`` where the custom operation is not available.
    """
    tf = device.tensorflow()
    features = tf.convert_to_tensor(features)
    if _custom(operations, features.dtype.name):
        return _library().pipeline_leaky_relu(features=features, alpha=negative_slope)
    return tf.nn.leaky_relu(features, negative_slope)


def bias_gelu(features: Any, bias: Any, *, approximate: bool = False, operations: str = "auto") -> Any:
    """``gelu(features + bias)`` with gelu(x) = x · P(X ≤ x) for a standard normal X (Hendrycks and Gimpel, 2016).

    The arithmetic is float32 for every dtype, and the result is rounded once. The gradient of the bias is summed in
    float32 on a GPU and in float64 on a CPU, in an order that depends only on the shape.

    Args:
        features: A tensor [..., D]; the custom operation supports float32, float16 and bfloat16.
        bias: A tensor [D] of the same dtype.
        approximate: Use the approximation with tanh from the same paper.
        operations: As for `leaky_relu`.

    Returns:
        A tensor with the shape and dtype of `features`, on the same device.

    Raises:
        PipelineError: The dtypes differ or are not floating-point, the shape of `bias` does not match, `operations` is
            unknown, or ``custom`` is set where the custom operation is not available.
    """
    tf = device.tensorflow()
    features = tf.convert_to_tensor(features)
    bias = tf.convert_to_tensor(bias, dtype_hint=features.dtype)
    types = features.dtype.name, bias.dtype.name
    if not features.dtype.is_floating or bias.dtype != features.dtype:
        raise PipelineError(f"bias_gelu expected features and bias of one floating-point dtype, got {types}.")
    known = features.shape.rank is not None
    if bias.shape.rank not in (1, None) or (known and not features.shape[-1:].is_compatible_with(bias.shape)):
        raise PipelineError(f"bias_gelu expected shapes [..., D] and [D], got {features.shape} and {bias.shape}.")
    if _custom(operations, features.dtype.name):
        return _library().pipeline_bias_gelu(features=features, bias=bias, approximate=approximate)
    single = tf.cast(features, tf.float32) + tf.cast(bias, tf.float32)
    return tf.cast(tf.nn.gelu(single, approximate=approximate), features.dtype)
