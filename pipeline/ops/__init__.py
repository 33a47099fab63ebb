"""Custom TensorFlow operations in C++ and CUDA: `leaky_relu` and `bias_gelu`, forward and backward.

    y = ops.leaky_relu(x, alpha=0.01)
    y = ops.bias_gelu(x, bias)               # gelu(x + bias), one pass over the memory
    ops.available()                          # whether they could be built on this machine

They are compiled on first use (`pipeline.ops.building`) and then live in the user's cache. Where that is not possible,
a warning says why, once, and TensorFlow's own operations give the same numbers. The Keras layers are in
`pipeline.ops.layers`; ``python -m pipeline.ops`` builds, checks and times.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core import device
from pipeline.core.errors import PipelineError

CHOICES = ("auto", "custom", "tensorflow")
DTYPES = ("float32", "float16", "bfloat16")

_log = logging.getLogger(__name__)
_only_tensorflow = contextvars.ContextVar("only_tensorflow", default=False)


def build() -> Path:
    """Compile the operations where they are not in the cache yet.

    Returns:
        The shared library.

    Raises:
        PipelineError: There is no compiler, or it fails; there is no room in the cache folder.
    """
    from pipeline.ops import building

    return building.build()


def available() -> bool:
    """Whether the custom operations run here; builds them on the first call, and warns once where it cannot."""
    return _library() is not None


@functools.cache
def _library() -> ModuleType | None:
    from pipeline.ops import building

    try:
        return building.load()
    except PipelineError as error:
        _log.warning("%s Until then TensorFlow's own operations are used, with the same numbers.", error)
        return None


def uses_custom_operations(network: Any) -> bool:
    """Whether a Keras network runs a custom operation on this machine, so that XLA cannot compile it.

    Builds the operations if one of the network's layers asks for them.
    """
    return any(
        _custom(layer.operations)
        for layer in network._flatten_layers()  # also those inside other layers
        if getattr(layer, "has_custom_operation", False)
    )


@contextlib.contextmanager
def without_custom_operations() -> Iterator[None]:
    """Inside the block every operation here is TensorFlow's own, whatever its caller chose.

    For a graph that is traced to be exported or to be compiled with XLA.
    """
    token = _only_tensorflow.set(True)
    try:
        yield
    finally:
        _only_tensorflow.reset(token)


def _custom(operations: str) -> bool:
    if operations not in CHOICES:
        raise PipelineError(f"operations must be one of {', '.join(CHOICES)}, got {operations!r}.")
    if operations == "tensorflow" or _only_tensorflow.get():
        return False
    if operations == "custom" and not available():
        raise PipelineError("The custom operations cannot be built here; set operations=auto or operations=tensorflow.")
    return available()


def leaky_relu(features: Any, alpha: float = 0.01, *, operations: str = "auto") -> Any:
    """`features` where they are positive, `alpha` times `features` elsewhere (Maas, Hannun and Ng, 2013).

    >>> leaky_relu([[-1.0, 0.0, 1.0], [2.0, -2.0, 0.5]], 0.01).numpy().round(6)
    array([[-0.01,  0.  ,  1.  ],
           [ 2.  , -0.02,  0.5 ]], dtype=float32)

    Args:
        features: A tensor of any shape; the custom operation takes float32, float16 and bfloat16.
        alpha: The slope below zero; any number.
        operations: ``auto`` for the custom operation where it is available and takes the type, ``custom`` to insist,
            ``tensorflow`` for TensorFlow's own.

    Returns:
        A tensor like `features`, on the same device.

    Raises:
        PipelineError: An unknown `operations`, or ``custom`` where that is not possible.
    """
    tf = device.tensorflow()
    features = tf.convert_to_tensor(features)
    if _custom(operations) and _takes(features, operations):
        return _library().pipeline_leaky_relu(features=features, alpha=alpha)
    return tf.nn.leaky_relu(features, alpha)


def bias_gelu(features: Any, bias: Any, *, approximate: bool = False, operations: str = "auto") -> Any:
    """``gelu(features + bias)`` with gelu(x) = x · P(X ≤ x) for a standard normal X (Hendrycks and Gimpel, 2016).

    Computed in float32 and rounded once, whatever the type. The gradient of the bias is summed in float32 on a GPU and
    float64 on a CPU, in an order that depends on the shape alone.

    Args:
        features: A tensor [..., D]; the custom operation takes float32, float16 and bfloat16.
        bias: A tensor [D] of the same type.
        approximate: Their form with tanh instead of the exact one.
        operations: As in `leaky_relu`.

    Returns:
        A tensor like `features`, on the same device.

    Raises:
        PipelineError: Types that are not floating-point or not alike, a `bias` that is no vector as long as the last
            dimension, an unknown `operations`, or ``custom`` where that is not possible.
    """
    tf = device.tensorflow()
    features = tf.convert_to_tensor(features)
    bias = tf.convert_to_tensor(bias, dtype_hint=features.dtype)
    if not features.dtype.is_floating or bias.dtype != features.dtype:
        raise PipelineError(
            f"bias_gelu takes features and a bias of one floating-point type, got {features.dtype.name} and "
            f"{bias.dtype.name}."
        )
    if features.shape.rank == 0 or bias.shape.rank not in (1, None):
        raise PipelineError(f"bias_gelu takes features [..., D] and a bias [D], got {features.shape} and {bias.shape}.")
    if features.shape.rank is not None and not features.shape[-1:].is_compatible_with(bias.shape):
        raise PipelineError(f"bias_gelu takes features [..., D] and a bias [D], got {features.shape} and {bias.shape}.")
    if _custom(operations) and _takes(features, operations):
        return _library().pipeline_bias_gelu(features=features, bias=bias, approximate=approximate)
    single = tf.cast(features, tf.float32) + tf.cast(bias, tf.float32)
    return tf.cast(tf.nn.gelu(single, approximate=approximate), features.dtype)


def _takes(features: Any, operations: str) -> bool:
    if features.dtype.name in DTYPES:
        return True
    if operations == "custom":
        raise PipelineError(f"The custom operations take {', '.join(DTYPES)}, got {features.dtype.name}.")
    return False
