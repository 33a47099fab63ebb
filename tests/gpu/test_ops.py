"""The CUDA side of the custom operations: the same numbers as TensorFlow, for any size and alignment, and its speed."""

import numpy as np
import pytest

from benchmarks import ops_timing
from pipeline import ops
from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.ops import building
from tests.ops import comparison

pytestmark = pytest.mark.gpu
PRECISION = {"float32": 3e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.fixture(scope="module")
def tf():
    tf = device.tensorflow()
    try:
        building.toolchain()
    except PipelineError as error:
        pytest.skip(str(error))
    assert ops.available()
    return tf


def random(tf, shape, dtype, seed):
    return tf.cast(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def gradients(tf, x, bias, dy, approximate=False):
    with tf.device("/GPU:0"):
        return ops._library().pipeline_bias_gelu_grad(dy, x, bias, approximate=approximate)


def same_on_cpu(tf, tensors, approximate):
    with tf.device("/CPU:0"):
        host = [tf.identity(tensor) for tensor in tensors]
        value = ops._library().pipeline_bias_gelu(host[0], host[1], approximate=approximate)
        return value, *ops._library().pipeline_bias_gelu_grad(host[2], *host[:2], approximate=approximate)


def close(result, expected, dtype):
    a, b = (np.asarray(tensor.numpy(), np.float64) for tensor in (result, expected))
    return np.allclose(a, b, rtol=PRECISION[dtype], atol=PRECISION[dtype] * max(1.0, np.abs(b).max()))


def test_runs_on_the_gpu(tf):
    assert "GPU" in ops.leaky_relu(tf.ones([3, 5]), operations="custom").device


@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("name", comparison.OPERATIONS)
def test_agrees_with_tensorflow(tf, name, dtype):
    for shape in comparison.SHAPES:
        assert comparison.largest_difference(name, shape, dtype) <= comparison.ALLOWED[dtype], shape


@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 1), (100_003, 1), (5, 7), (4099, 96), (513, 300), (3, 100_001), (1, 2**20), (70_000, 16)]
)
def test_gpu_and_cpu_agree(tf, shape, dtype, approximate):
    """Periods of one row and of several, tiles that are not full, more rows than blocks, tails of every length."""
    x, bias, dy = (random(tf, size, dtype, seed) for seed, size in enumerate((shape, shape[-1:], shape)))
    value, along_x, along_bias = same_on_cpu(tf, (x, bias, dy), approximate)
    assert close(ops.bias_gelu(x, bias, approximate=approximate, operations="custom"), value, dtype)
    on_gpu = gradients(tf, x, bias, dy, approximate)
    assert close(on_gpu[0], along_x, dtype) and close(on_gpu[1], along_bias, dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_memory_that_is_not_aligned(tf, dtype, offset):
    """A tensor that starts between two 16-byte boundaries, as another library may hand over by DLPack."""
    import cupy

    memory = cupy.random.default_rng(offset).standard_normal(64 * 40 + offset, dtype="float32").astype(dtype)
    x = device.to_tensorflow(memory[offset:].reshape(64, 40))
    bias, dy = random(tf, 40, dtype, 1), random(tf, (64, 40), dtype, 2)
    value, along_x, along_bias = same_on_cpu(tf, (x, bias, dy), False)
    assert close(ops.bias_gelu(x, bias, operations="custom"), value, dtype)
    on_gpu = gradients(tf, x, bias, dy)
    assert close(on_gpu[0], along_x, dtype) and close(on_gpu[1], along_bias, dtype)
    leaky = ops.leaky_relu(x, 0.25, operations="custom").numpy().astype(np.float32)
    expected = np.where(x.numpy() > 0, x.numpy(), 0.25 * x.numpy().astype(np.float32))
    assert np.allclose(leaky, expected, rtol=PRECISION[dtype])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_empty_tensors(tf, shape):
    x, bias = tf.zeros(shape), tf.ones(shape[-1])
    assert ops.bias_gelu(x, bias, operations="custom").shape == shape
    along_x, along_bias = gradients(tf, x, bias, x)
    assert along_x.shape == shape and np.array_equal(along_bias, np.zeros(shape[-1]))
    assert ops.leaky_relu(x, operations="custom").shape == shape


def test_the_bias_gradient_is_the_same_every_time_and_accurate(tf):
    x, bias, dy = (random(tf, size, "float32", seed) for seed, size in enumerate(((300_000, 40), 40, (300_000, 40))))
    dy += 1.0
    first = gradients(tf, x, bias, dy)[1].numpy()
    for _ in range(5):
        assert np.array_equal(gradients(tf, x, bias, dy)[1], first)
    from scipy import special

    value = (x + bias).numpy().astype(np.float64)
    slope = special.ndtr(value) + value * np.exp(-value * value / 2) / np.sqrt(2 * np.pi)
    expected = (slope * dy.numpy()).sum(axis=0)
    assert np.abs(first - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_a_network_trains_in_a_graph_loop_without_xla(tf, precision):
    import keras

    from pipeline.ops import layers

    keras.utils.set_random_seed(0)
    policy = keras.DTypePolicy(precision)
    network = keras.Sequential(
        [
            keras.Input((32,)),
            keras.layers.Dense(64, use_bias=False, dtype=policy),
            layers.BiasGELU(operations="custom", dtype=policy),
            keras.layers.Dense(64, dtype=policy),
            layers.LeakyReLU(operations="custom", dtype=policy),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    assert ops.uses_custom_operations(network)
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(network.trainable_variables)
    x = random(tf, (256, 32), "float32", 0)
    target = x[:, :1] * x[:, 1:2]

    @tf.function
    def train(steps):
        loss = tf.constant(0.0)
        for _ in tf.range(steps):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((network(x, training=True) - target) ** 2)
            optimizer.apply(tape.gradient(loss, network.trainable_variables), network.trainable_variables)
        return loss

    before = float(train(1))
    assert float(train(200)) < 0.2 * before


def test_xla_takes_tensorflows_operations(tf):
    x, bias = random(tf, (8, 16), "float32", 0), random(tf, 16, "float32", 1)
    with ops.without_custom_operations():
        compiled = tf.function(lambda x: ops.bias_gelu(ops.leaky_relu(x), bias), jit_compile=True)(x)
    assert np.allclose(compiled, ops.bias_gelu(ops.leaky_relu(x), bias), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_at_least_70_percent_of_a_copys_bandwidth(tf, dtype):
    """64 Mi elements, as in `python -m benchmarks.ops`; the best of three runs, as other work slows the card."""
    best: dict[str, float] = {}
    for _ in range(3):
        for row in ops_timing.measure((65536, 1024), dtype):
            key = f"{row.operation} {row.direction}"
            best[key] = max(best.get(key, 0), row.fraction_of_copy)
        if min(best.values()) >= 0.7:
            break
    assert len(best) == 6
    assert {key: fraction for key, fraction in best.items() if fraction < 0.7} == {}
