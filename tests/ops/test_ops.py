"""Custom operations: their numbers, gradients and shapes, how they are built, and the layers around them."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from benchmarks import ops_timing
from pipeline import models, ops
from pipeline.core import device
from pipeline.core.errors import PipelineError
from pipeline.ops import building
from tests.conftest import REPOSITORY
from tests.ops import comparison

tf = device.tensorflow()
DTYPES = ("float32", "float16", "bfloat16")
# A unit in the last place at 1 of each type; float32 with room for the sums of a few roundings.
PRECISION = {"float32": 5e-7, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.fixture(scope="module")
def built():
    """The operations, compiled once for all tests; skips without a compiler."""
    try:
        building.toolchain()
    except PipelineError as error:
        pytest.skip(str(error))
    assert ops.available()


def gelu(x, approximate):
    """GELU and its derivative in float64, from SciPy."""
    x = np.asarray(x, np.float64)
    if approximate:
        inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
        return 0.5 * x * (1 + np.tanh(inner)), 0.5 * (1 + np.tanh(inner)) + 0.5 * x * slope / np.cosh(inner) ** 2
    return x * special.ndtr(x), special.ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


def tensor(values, dtype):
    return tf.cast(np.asarray(values, np.float32), dtype)


def exact(tensor):
    return tensor.numpy().astype(np.float64)


def with_gradients(function, inputs, gradient):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        result = function(*inputs)
    return result, tape.gradient(result, inputs, gradient)


@pytest.mark.parametrize("operations", ["custom", "tensorflow"])
def test_worked_example(built, operations):
    result = ops.leaky_relu([[-1.0, 0.0, 1.0], [2.0, -2.0, 0.5]], 0.01, operations=operations)
    assert np.allclose(result, [[-0.01, 0.0, 1.0], [2.0, -0.02, 0.5]], atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("negative_slope", [0.01, 0.0, -0.5, 2.0])
@pytest.mark.parametrize("operations", ["custom", "tensorflow"])
def test_leaky_relu_values_and_gradient(built, dtype, negative_slope, operations):
    generator = np.random.default_rng(1)
    x = tensor(generator.normal(size=(7, 301)), dtype)
    gradient = tensor(generator.normal(size=(7, 301)), dtype)
    result, (along,) = with_gradients(
        lambda x: ops.leaky_relu(x, negative_slope=negative_slope, operations=operations), [x], gradient
    )
    slope = np.where(exact(x) > 0, 1.0, negative_slope)
    assert result.dtype == along.dtype == x.dtype
    assert np.allclose(exact(result), exact(x) * slope, rtol=PRECISION[dtype], atol=1e-7)
    assert np.allclose(exact(along), exact(gradient) * slope, rtol=PRECISION[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("operations", ["custom", "tensorflow"])
def test_bias_gelu_values_and_gradients(built, dtype, approximate, operations):
    generator = np.random.default_rng(2)
    x = tensor(3 * generator.normal(size=(5, 61, 37)), dtype)
    bias = tensor(generator.normal(size=37), dtype)
    gradient = tensor(generator.normal(size=x.shape), dtype)
    result, (along_x, along_bias) = with_gradients(
        lambda x, bias: ops.bias_gelu(x, bias, approximate=approximate, operations=operations), [x, bias], gradient
    )
    value, slope = gelu(exact(x) + exact(bias), approximate)
    assert result.dtype == along_x.dtype == along_bias.dtype == x.dtype
    assert np.allclose(exact(result), value, rtol=PRECISION[dtype], atol=2e-6)
    allowed = 6e-6 if operations == "custom" else 5e-5  # TensorFlow subtracts tanh² from 1, which costs digits
    assert np.allclose(exact(along_x), exact(gradient) * slope, rtol=PRECISION[dtype], atol=allowed)
    expected = (exact(gradient) * slope).sum(axis=(0, 1))
    assert np.allclose(exact(along_bias), expected, rtol=PRECISION[dtype], atol=10 * allowed)


@pytest.mark.parametrize("approximate", [False, True])
def test_bias_gelu_is_accurate_over_the_whole_range(built, approximate):
    x = np.linspace(-12, 12, 200_001, dtype=np.float32)
    value, slope = gelu(x, approximate)
    zero = tf.zeros(1)
    result, (along, _) = with_gradients(
        lambda x, bias: ops.bias_gelu(x, bias, approximate=approximate, operations="custom"),
        [tf.constant(x[:, None]), zero],
        tf.ones([len(x), 1]),
    )
    assert np.abs(result.numpy()[:, 0] - value).max() < 1e-6
    assert np.abs(along.numpy()[:, 0] - slope).max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(built, dtype):
    largest = {"float32": 3e38, "float16": 65504.0, "bfloat16": 3e38}[dtype]
    x = tensor([np.nan, np.inf, largest, 0.0, -0.0, -largest], dtype)
    expected = [np.nan, np.inf, float(x[2]), 0.0, 0.0, 0.0]
    for approximate in (False, True):
        result, (along, _) = with_gradients(
            lambda x, bias, form=approximate: ops.bias_gelu(x, bias, approximate=form, operations="custom"),
            [x, tf.zeros(6, x.dtype)],
            tf.ones(6, x.dtype),
        )
        assert np.array_equal(exact(result), expected, equal_nan=True)
        assert np.array_equal(exact(along)[[0, 2, 3, 4, 5]], [np.nan, 1.0, 0.5, 0.5, 0.0], equal_nan=True)
    leaky = exact(ops.leaky_relu(tensor([np.nan, np.inf, -np.inf], dtype), 0.5, operations="custom"))
    assert np.array_equal(leaky, [np.nan, np.inf, -np.inf], equal_nan=True)


def bit_patterns(dtype):
    """Every value of a 16-bit type, but for bfloat16's subnormals, which TensorFlow's threads flush to 0."""
    values = tf.bitcast(np.arange(2**16, dtype=np.uint16), dtype)
    single = tf.cast(values, tf.float32).numpy()
    return tf.boolean_mask(values, ~((np.abs(single) < 2.0**-120) & (single != 0)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversions_lose_nothing(built, dtype):
    """The identity (negative_slope = 1) over all values, float16's subnormals, infinities and NaN included."""
    x = bit_patterns(dtype)
    assert x.shape[0] > 60_000 and np.isnan(x.numpy().astype(np.float32)).any()
    result = ops.leaky_relu(x, 1.0, operations="custom")
    assert np.array_equal(result.numpy().astype(np.float32), x.numpy().astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_to_nearest_even(built, dtype):
    """A fraction of every value, as NumPy rounds it."""
    x = bit_patterns(dtype)
    x = -tf.abs(tf.boolean_mask(x, tf.math.is_finite(x)))
    result = ops.leaky_relu(x, 0.3, operations="custom").numpy()
    expected = (x.numpy().astype(np.float32) * np.float32(0.3)).astype(result.dtype)
    assert np.array_equal(result.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", comparison.OPERATIONS)
def test_agrees_with_tensorflow_in_every_shape(built, name, dtype):
    for shape in comparison.SHAPES:
        assert comparison.largest_difference(name, shape, dtype) <= comparison.ALLOWED[dtype], shape


@pytest.mark.parametrize("name", comparison.OPERATIONS)
def test_gradients_agree_with_differences_of_the_values(built, name):
    generator = np.random.default_rng(0)
    x = 2 * generator.standard_normal((4, 9), np.float32)
    x = np.where(np.abs(x) < 0.05, 0.5, x)  # leaky_relu has no derivative at 0
    arguments = [tf.constant(x), tf.constant(generator.standard_normal(9, np.float32))]
    if name == "leaky_relu":
        arguments = arguments[:1]
    theoretical, numerical = tf.test.compute_gradient(
        lambda x, bias=None: comparison.custom(name, x, bias), arguments, delta=2**-7
    )
    for a, b in zip(theoretical, numerical, strict=True):
        assert np.abs(a).max() > 0.1 and np.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)])
def test_empty_tensors(built, shape):
    x, bias = tf.zeros(shape), tf.zeros(shape[-1])
    result, (along_x, along_bias) = with_gradients(
        lambda x, bias: ops.bias_gelu(x, bias, operations="custom"), [x, bias], x
    )
    assert result.shape == along_x.shape == shape
    assert np.array_equal(along_bias, np.zeros(shape[-1]))
    result, (along,) = with_gradients(lambda x: ops.leaky_relu(x, operations="custom"), [x], x)
    assert result.shape == along.shape == shape


def test_a_scalar_has_a_leaky_relu(built):
    assert ops.leaky_relu(-2.0, 0.25, operations="custom").numpy() == -0.5


@pytest.mark.parametrize("shape", [(200_000, 3), (70_001, 1), (17, 9000)])
def test_the_bias_gradient_is_exact_over_many_rows(built, shape):
    generator = np.random.default_rng(3)
    x, gradient = (generator.normal(size=shape).astype(np.float32) for _ in range(2))
    gradient += 1.0  # so that the sums grow
    bias = tf.zeros(shape[1])
    _, (_, along_bias) = with_gradients(
        lambda x, bias: ops.bias_gelu(x, bias, operations="custom"), [tf.constant(x), bias], tf.constant(gradient)
    )
    expected = (gradient.astype(np.float64) * gelu(x, False)[1]).sum(axis=0)
    allowed = 1e-5 if device.has_gpu() else 3e-7  # the GPU adds in float32, the CPU in float64
    assert np.abs(along_bias - expected).max() < allowed * np.abs(expected).max()


def test_the_bias_gradient_does_not_depend_on_the_number_of_threads(built, tmp_path):
    program = """
import sys, numpy as np
from pipeline import ops
from pipeline.core import device
tf = device.tensorflow()
tf.config.threading.set_intra_op_parallelism_threads(1)
generator = np.random.default_rng(0)
x = tf.constant(generator.normal(size=(5000, 100)).astype(np.float32))
gradients = ops._library().pipeline_bias_gelu_grad(x, x, x[0], approximate=False)
np.save(sys.argv[1], gradients[1].numpy())
"""
    command = [sys.executable, "-c", program, str(tmp_path / "one.npy")]
    subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, timeout=300)
    one = np.load(tmp_path / "one.npy")
    x = tf.constant(np.random.default_rng(0).normal(size=(5000, 100)).astype(np.float32))
    here = ops._library().pipeline_bias_gelu_grad(x, x, x[0], approximate=False)[1]
    assert one.any() and np.array_equal(one, here)


@pytest.mark.parametrize("approximate", [False, True])
def test_second_derivatives(built, approximate):
    """As a gradient penalty needs them: differences of the first gradient against the registered second."""
    generator = np.random.default_rng(4)
    x, bias, weights = (tf.constant(generator.normal(size=size).astype(np.float32)) for size in ((3, 5), (5,), (3, 5)))

    def first(x, bias):
        with tf.GradientTape() as tape:
            tape.watch([x, bias])
            total = tf.reduce_sum(weights * ops.bias_gelu(x, bias, approximate=approximate, operations="custom"))
        along_x, along_bias = tape.gradient(total, [x, bias])
        return tf.reduce_sum(along_x * weights) + tf.reduce_sum(along_bias * bias)

    theoretical, numerical = tf.test.compute_gradient(first, [x, bias], delta=2**-6)
    for a, b in zip(theoretical, numerical, strict=True):
        assert np.abs(a).max() > 0.1 and np.allclose(a, b, atol=3e-3)


def test_graphs_know_the_shapes(built):
    library = ops._library()

    @tf.function(input_signature=[tf.TensorSpec([None, None, None]), tf.TensorSpec([8])])
    def graph(x, bias):
        result = ops.bias_gelu(x, bias, operations="custom")
        assert result.shape.as_list() == [None, None, 8]
        along_x, along_bias = library.pipeline_bias_gelu_grad(result, x, bias, approximate=True)
        assert along_x.shape.as_list() == [None, None, 8] and along_bias.shape.as_list() == [8]
        assert ops.leaky_relu(result, operations="custom").shape.as_list() == [None, None, 8]
        return result

    assert graph(tf.zeros([2, 3, 8]), tf.zeros(8)).shape == (2, 3, 8)


@pytest.mark.parametrize("types", [("int32", "int32"), ("complex64", "complex64"), ("float16", "float32")])
def test_wrong_types_are_rejected(built, types):
    tf = device.tensorflow()
    for operations in ("custom", "tensorflow"):
        with pytest.raises(PipelineError, match=types[0]):
            ops.bias_gelu(tf.ones((2, 3), types[0]), tf.ones(3, types[1]), operations=operations)


@pytest.mark.parametrize("shapes", [((2, 3), (4,)), ((2, 3), (2, 3)), ((), (1,)), ((2, 3), ())])
def test_wrong_shapes_are_rejected(built, shapes):
    for operations in ("custom", "tensorflow"):
        with pytest.raises(PipelineError, match="bias_gelu"):
            ops.bias_gelu(tf.zeros(shapes[0]), tf.zeros(shapes[1]), operations=operations)
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=r"bias|gradients|rank"):
        ops._library().pipeline_bias_gelu(tf.zeros(shapes[0]), tf.zeros(shapes[1]), approximate=False)


def test_gradients_of_another_shape_are_rejected(built):
    library = ops._library()
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"\[2,3\]"):
        library.pipeline_leaky_relu_grad(tf.zeros([2, 3]), tf.zeros([3, 2]), alpha=0.1)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"\[2,3\]"):
        library.pipeline_bias_gelu_grad(tf.zeros([1, 3]), tf.zeros([2, 3]), tf.zeros(3), approximate=False)


def test_types_the_operations_do_not_take(built):
    double = tf.constant([-1.0, 2.0], tf.float64)
    assert np.allclose(ops.leaky_relu(double, 0.5), [-0.5, 2.0])
    with pytest.raises(PipelineError, match="float64"):
        ops.leaky_relu(double, 0.5, operations="custom")
    with pytest.raises(PipelineError, match="'fast'"):
        ops.leaky_relu(double, 0.5, operations="fast")


def test_xla_takes_tensorflows_operations_only(built):
    x = tf.constant([[-1.0, 2.0]])
    bias = tf.constant([0.5, -0.5])

    def network(x):
        return ops.bias_gelu(ops.leaky_relu(x, 0.5), bias)

    with pytest.raises(tf.errors.InvalidArgumentError, match="PipelineLeakyRelu"):
        tf.function(network, jit_compile=True)(x)
    with ops.without_custom_operations():
        compiled = tf.function(network, jit_compile=True)(x)
    assert np.allclose(compiled, network(x), atol=1e-6)


# --- building -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A fast C++ compiler that logs its calls, an empty cache and no GPU; returns the log."""
    log = tmp_path / "calls"
    script = tmp_path / "fake-g++"
    script.write_text(
        f"""#!/bin/sh
if [ "$1" = --version ]; then echo "fake 1.0 $FAKE_VERSION"; exit 0; fi
echo "$@" >> {log}
if [ -n "$FAKE_ERROR" ]; then echo "In file x.cc"; echo "$FAKE_ERROR" >&2; exit 1; fi
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then sleep 0.2; echo object > "$2"; fi; shift; done
""",
        encoding="utf-8",
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    return log


def test_a_build_is_stored_until_the_compiler_or_the_sources_change(compiler, monkeypatch, tmp_path):
    first = building.build()
    assert building.build() == first and len(compiler.read_text(encoding="utf-8").splitlines()) == 3
    assert sorted(path.name for path in first.parent.iterdir()) == [".lock", "operations.sha256", "operations.so"]
    monkeypatch.setenv("FAKE_VERSION", "next")
    second = building.build()
    shutil.copytree(building.SOURCES, tmp_path / "src")
    monkeypatch.setattr(building, "SOURCES", tmp_path / "src")
    assert building.build() == second
    (tmp_path / "src" / "formulas.h").write_text("// changed", encoding="utf-8")
    assert len({first, second, building.build()}) == 3 and first.is_file()


def test_a_damaged_library_is_built_again(compiler):
    path = building.build()
    path.write_bytes(b"")
    assert building.build() == path and path.read_text(encoding="utf-8") == "object\n"


def test_processes_that_start_together_compile_once(compiler):
    command = [sys.executable, "-c", "from pipeline.ops import building; print(building.build())"]
    environment = {**os.environ, "PIPELINE_DEVICE": "cpu"}
    processes = [subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE) for _ in range(2)]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert [process.returncode for process in processes] == [0, 0]
    assert len(compiler.read_text(encoding="utf-8").splitlines()) == 3


def test_a_compiler_error_is_reported(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_ERROR", "x.cc:1:2: error: no such thing")
    with pytest.raises(PipelineError, match=r"x\.cc:1:2") as caught:
        building.build()
    assert caught.value.exit_code == 1
    assert "In file x.cc" in "".join(caught.value.__cause__.__notes__)  # the traceback shows the whole output
    assert not list((tmp_path / "cache").rglob("operations.*"))


def test_a_compiler_that_does_not_start_is_reported(monkeypatch, tmp_path):
    script = tmp_path / "compiler"
    script.write_text("#!/nowhere\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(PipelineError, match=str(script)):
        building.build()


def test_a_cache_that_cannot_be_written_is_reported(compiler, monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ops").touch()  # also root cannot create a folder here
    with pytest.raises(PipelineError, match="PIPELINE_CACHE"):
        building.build()


def test_a_library_that_does_not_load_is_reported(compiler):
    with pytest.raises(PipelineError, match=r"operations\.so"):
        building.load()


def test_without_a_compiler_tensorflow_gives_the_same_numbers(monkeypatch, tmp_path, caplog):
    generator = np.random.default_rng(5)
    x = tensor(3 * generator.normal(size=(64, 48)), "float16")
    bias = tensor(generator.normal(size=48), "float16")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    known = ops._library.__wrapped__
    monkeypatch.setattr(ops, "_library", functools.cache(known))
    fallback = [ops.leaky_relu(x, 0.01), ops.bias_gelu(x, bias), ops.bias_gelu(x, bias, approximate=True)]
    assert len(caplog.messages) == 1  # once, not at every use
    assert "g++" in caplog.messages[0]
    assert not ops.available()
    leaky = np.where(exact(x) > 0, 1.0, 0.01) * exact(x)
    biased = exact(x) + exact(bias)
    for result, expected in zip(fallback, [leaky, gelu(biased, False)[0], gelu(biased, True)[0]], strict=True):
        assert np.allclose(exact(result), expected, rtol=PRECISION["float16"], atol=1e-6)
    with pytest.raises(PipelineError, match="operations=tensorflow"):
        ops.leaky_relu(x, 0.01, operations="custom")
    with pytest.raises(PipelineError, match=r"g\+\+"):
        building.build()


def test_a_gpu_needs_nvcc(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        with pytest.raises(PipelineError, match="CUDA_HOME"):
            building.toolchain()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\n", encoding="utf-8")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setattr(device, "compute_capability", lambda: (9, 0))
    tools = building.toolchain()
    assert tools.nvcc == str(tmp_path / "bin" / "nvcc") and tools.architecture == "sm_90"
    compilations, link = building.commands(tools, tmp_path)
    assert all(command[0] == tools.nvcc and "-arch=sm_90" in command for command in (compilations[-1], link))


# --- layers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def network(built):
    import keras

    from pipeline.ops import layers

    keras.utils.set_random_seed(0)
    inputs = keras.Input((12,))
    x = keras.layers.Dense(16, use_bias=False)(inputs)
    x = layers.BiasGELU(bias_initializer="normal", name="gelu")(x)
    x = layers.LeakyReLU(negative_slope=0.2, name="leaky")(keras.layers.Dense(8)(x))
    return keras.Model(inputs, x)


@pytest.fixture
def batch():
    return np.random.default_rng(6).normal(size=(10, 12)).astype(np.float32)


def test_a_saved_network_holds_tensorflows_operations_and_the_same_numbers(network, batch, tmp_path):
    import keras

    assert ops.uses_custom_operations(network)
    network.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert not ops.uses_custom_operations(loaded)
    assert loaded.get_layer("leaky").negative_slope == 0.2 and loaded.get_layer("gelu").approximate is False
    assert np.allclose(loaded(batch), network(batch), atol=1e-6)
    loaded.export(tmp_path / "saved", verbose=False)
    graph = (tmp_path / "saved" / "saved_model.pb").read_bytes()
    assert b"Gelu" in graph or b"Erf" in graph
    assert b"PipelineBiasGelu" not in graph and b"PipelineLeakyRelu" not in graph


def test_a_saved_network_runs_in_tflite_without_extra_operations(network, batch, tmp_path):
    import keras

    network.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.export(tmp_path / "saved", verbose=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    interpreter.resize_tensor_input(0, batch.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], batch)
    interpreter.invoke()
    result = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    assert np.allclose(result, network(batch), atol=1e-4)


def test_which_networks_use_custom_operations(built, monkeypatch):
    import keras

    from pipeline.ops import layers

    def one(operations):
        return keras.Sequential([keras.Input((4,)), keras.Sequential([layers.LeakyReLU(operations=operations)])])

    assert ops.uses_custom_operations(one("auto")) and ops.uses_custom_operations(one("custom"))
    assert not ops.uses_custom_operations(one("tensorflow"))
    assert not ops.uses_custom_operations(keras.Sequential([keras.Input((4,)), keras.layers.LeakyReLU()]))
    monkeypatch.setattr(ops, "_library", lambda: None)
    assert not ops.uses_custom_operations(one("auto"))


@pytest.mark.parametrize("precision", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_training_with_either_operation_gives_the_same_weights(built, batch, precision):
    import keras

    from pipeline.ops import layers

    weights = []
    for operations in ("custom", "tensorflow"):
        keras.utils.set_random_seed(0)
        options = {"operations": operations, "dtype": keras.DTypePolicy(precision)}
        network = keras.Sequential(
            [
                keras.Input((12,)),
                keras.layers.Dense(16, use_bias=False, dtype=options["dtype"]),
                layers.BiasGELU(approximate=True, **options),
                keras.layers.Dense(8, dtype=options["dtype"]),
                layers.LeakyReLU(**options),
                keras.layers.Dense(1, dtype="float32"),
            ]
        )
        network.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
        network.fit(batch, batch[:, :1], batch_size=5, epochs=3, shuffle=False, verbose=0)
        assert network.layers[1].compute_dtype == precision.removeprefix("mixed_")
        weights.append(network.get_weights())
    for a, b in zip(*weights, strict=True):
        assert a.dtype == np.float32 and np.allclose(a, b, atol=1e-5 if precision == "float32" else 2e-2)
    assert np.abs(weights[0][1]).max() > 1e-4  # the bias of bias-GELU has learned


def test_keras_leaves_xla_out_where_a_custom_operation_is(network):
    network.compile(optimizer="sgd", loss="mse", jit_compile="auto")
    assert not network.jit_compile


def test_a_layer_rejects_unknown_operations():
    from pipeline.ops import layers

    with pytest.raises(PipelineError, match="'cuda'"):
        layers.LeakyReLU(operations="cuda")


def test_a_model_file_with_the_former_name_alpha_is_read():
    from pipeline.ops import layers

    network = models.load(REPOSITORY / "tests/data/run-30f2b6e/finished_mlp/model.keras").get_layer("network")
    layer = network.get_layer("dense1_leaky_relu")
    assert isinstance(layer, layers.LeakyReLU) and layer.negative_slope == 0.01
    assert layers.LeakyReLU.from_config({"alpha": 0.3}).negative_slope == 0.3


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_compares_times_and_writes_the_results(built, monkeypatch, tmp_path, capsys):
    from benchmarks import ops as command
    from benchmarks import results

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["ops", "--rows", "8", "--dtypes", "float32"])
    command.main()
    printed = capsys.readouterr().out
    assert "XLA" in printed and "bias_gelu (tanh)" in printed
    (path,) = tmp_path.glob("ops-*-options.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["command"] == "python -m benchmarks.ops --rows 8 --dtypes float32"
    assert written["figures"]["largest_difference"] < 1e-5
    rows = written["figures"]["operations"]
    assert len(rows) == 6 and all(row["seconds"][variant] > 0 for row in rows for variant in ops_timing.VARIANTS)
    assert {row["bytes"] for row in rows} == {2 * 4 * 8 * 1024, 3 * 4 * 8 * 1024}


def test_the_command_fails_on_a_wrong_result(built, monkeypatch):
    from benchmarks import ops as command

    right = ops.bias_gelu
    for factor in (1.01, np.nan):
        monkeypatch.setattr(
            ops, "bias_gelu", lambda *a, f=factor, **o: right(*a, **o) * (f if o["operations"] == "custom" else 1.0)
        )
        monkeypatch.setattr(sys, "argv", ["ops"])
        with pytest.raises(PipelineError, match="differ"):
            command.main()


def test_the_table_without_custom_operations_has_no_comparison():
    seconds = {"custom": None, "tensorflow": 1e-6, "xla": 2e-6}
    row = ops_timing.Row("leaky_relu", "forward", "float32", 4, 32, seconds, 1e-6)
    assert row.fraction_of_copy is None and "–" in ops_timing.table([row])
    row = ops_timing.Row("leaky_relu", "forward", "float32", 4, 32, {**seconds, "custom": 2e-6}, 1e-6)
    assert row.fraction_of_copy == 0.5 and "0.5×" in ops_timing.table([row])
