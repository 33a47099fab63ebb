"""Gradients of the custom operations; `pipeline.ops.building.load` registers them with TensorFlow."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from pipeline.core import device


@functools.cache  # TensorFlow refuses a second registration
def register(library: ModuleType) -> None:
    """Register the first and second derivatives of the operations in `library`."""
    tf = device.tensorflow()

    @tf.RegisterGradient("PipelineLeakyRelu")
    def _(operation: Any, gradient: Any) -> Any:
        return library.pipeline_leaky_relu_grad(gradient, operation.inputs[0], alpha=operation.get_attr("alpha"))

    @tf.RegisterGradient("PipelineLeakyReluGrad")
    def _(operation: Any, gradient: Any) -> Any:
        alpha = operation.get_attr("alpha")
        return library.pipeline_leaky_relu_grad(gradient, operation.inputs[1], alpha=alpha), None

    @tf.RegisterGradient("PipelineBiasGelu")
    def _(operation: Any, gradient: Any) -> Any:
        approximate = operation.get_attr("approximate")
        return library.pipeline_bias_gelu_grad(gradient, *operation.inputs, approximate=approximate)

    @tf.RegisterGradient("PipelineBiasGeluGrad")
    def _(operation: Any, along_features: Any, along_bias: Any) -> Any:
        # Only gradient penalties need it, so TensorFlow's own operations are fast enough.
        gradient, features, bias = operation.inputs
        x = tf.cast(features, tf.float32) + tf.cast(bias, tf.float32)
        first, second = _gelu_derivatives(tf, x, operation.get_attr("approximate"))
        direction = tf.cast(along_features, tf.float32) + tf.cast(along_bias, tf.float32)
        along = direction * tf.cast(gradient, tf.float32) * second
        over_rows = tf.reduce_sum(tf.reshape(along, [-1, tf.size(bias)]), axis=0)
        return tuple(tf.cast(part, features.dtype) for part in (direction * first, along, over_rows))


def _gelu_derivatives(tf: Any, x: Any, approximate: bool) -> tuple[Any, Any]:
    """The first and second derivative of GELU at `x`, float32."""
    if not approximate:
        density = tf.exp(-0.5 * x * x) * 0.3989422804
        return 0.5 * tf.math.erfc(x * -0.7071067812) + x * density, density * (2.0 - x * x)
    linear, cubic = 1.5957691216, 0.044715  # gelu(x) = x · sigmoid(linear · (x + cubic · x³))
    sigmoid, slope = tf.sigmoid(linear * (x + cubic * x**3)), linear * (1.0 + 3.0 * cubic * x * x)
    bend = sigmoid * (1.0 - sigmoid)
    curvature = (1.0 - 2.0 * sigmoid) * slope * slope + 6.0 * linear * cubic * x
    return sigmoid + x * bend * slope, bend * (2.0 * slope + x * curvature)
