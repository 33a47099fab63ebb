"""The CUDA kernel on a GPU compared with the CPU kernel; streams and indices on the device."""

import numpy as np
import pytest

from pipeline import augment
from pipeline.augment import kernels
from pipeline.core.errors import PipelineError
from tests.augment.test_augment import EACH, EVERYTHING, MEAN, STD, random_images

pytestmark = pytest.mark.gpu


def on_cpu(images, policy, indices, seed, epoch):
    policy = augment.load_policy(policy)
    channels = images.shape[3]
    scale = tuple(1 / s for s in STD[:channels])
    shift = tuple(-m / s for m, s in zip(MEAN[:channels], STD[:channels], strict=True))
    out = np.empty((len(indices), *images.shape[1:]), np.float32)
    if len(indices) == 0:
        return out
    kernels.launch(images, np.asarray(indices, np.int64), policy, seed, epoch, scale, shift, out)
    return out


def on_gpu(images, policy, indices, seed, epoch, dtype="float32"):
    channels = images.shape[3]
    import cupy

    result = augment.apply(
        cupy.asarray(images), policy, MEAN[:channels], STD[:channels],
        seed=seed, epoch=epoch, indices=cupy.asarray(indices), dtype=dtype,
    )  # fmt: skip
    assert isinstance(result, cupy.ndarray)
    assert result.dtype == dtype
    return result.get()


def assert_close(images, policy, dtype, seed=11, epoch=2):
    indices = np.random.default_rng(3).permutation(len(images))
    found = on_gpu(images, policy, indices, seed, epoch, dtype)
    tolerance = 1e-3 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(found, on_cpu(images, policy, indices, seed, epoch), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", EACH)
def test_each_operation(name):
    assert_close(random_images(500, 32, 32, 3), EACH[name], "float32")


@pytest.mark.parametrize("name", ["none", "light", "standard", "strong", "photos"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_policy(name, dtype):
    assert_close(random_images(3000, 32, 32, 3), name, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "shape",
    [(8, 8, 1), (8, 8, 3), (28, 28, 1), (13, 17, 3), (7, 9, 1), (12, 13, 1), (64, 64, 3), (96, 128, 3), (224, 224, 3)],
)
def test_shapes_from_8_to_224(shape, dtype):
    assert_close(random_images(37, *shape), EVERYTHING, dtype)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_small_batches(count):
    assert_close(random_images(count, 32, 32, 3), "standard", "float16")


def test_views_and_misaligned_buffers():
    import cupy

    images = random_images(20, 16, 16, 3)
    on_device = cupy.asarray(images)
    whole = augment.apply(on_device, "standard", MEAN, STD, seed=0, epoch=0)
    views = augment.apply(on_device[:, :, ::-1], "standard", MEAN, STD, seed=0, epoch=0)
    expected = augment.apply(images[:, :, ::-1].copy(), "standard", MEAN, STD, seed=0, epoch=0)
    cupy.testing.assert_array_equal(views, expected)
    raw = cupy.zeros(images.size + 1, cupy.uint8)
    raw[1:] = on_device.ravel()
    shifted = augment.apply(raw[1:].reshape(images.shape), "standard", MEAN, STD, seed=0, epoch=0)
    cupy.testing.assert_array_equal(shifted, whole)
    buffer = cupy.zeros(images.size + 1, cupy.float32)
    out = augment.apply(on_device, "standard", MEAN, STD, seed=0, epoch=0, out=buffer[1:].reshape(images.shape))
    cupy.testing.assert_allclose(out, whole, atol=1e-6)


def test_numpy_images_are_copied_to_the_gpu_and_a_numpy_out_is_an_error():
    import cupy

    images = random_images(4, 8, 8, 3)
    assert isinstance(augment.apply(images, "none", MEAN, STD, seed=0, epoch=0), cupy.ndarray)
    with pytest.raises(PipelineError, match="cupy"):
        augment.apply(images, "none", MEAN, STD, seed=0, epoch=0, out=np.empty(images.shape, np.float32))


def test_the_result_for_a_device_index_out_of_range_is_nan():
    import cupy

    images = random_images(4, 32, 32, 3)
    for dtype in ("float32", "float16"):
        result = augment.apply(
            images, "strong", MEAN, STD, seed=0, epoch=0, indices=cupy.array([1, 4, -1, 2]), dtype=dtype
        )
        finite = cupy.isfinite(result).all((1, 2, 3)).get()
        assert finite.tolist() == [True, False, False, True]


def test_the_kernel_runs_on_cupys_current_stream():
    import cupy

    images = cupy.asarray(random_images(2000, 32, 32, 3))
    expected = augment.apply(images, "standard", MEAN, STD, seed=0, epoch=0)
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        late = cupy.empty_like(images)
        workload = cupy.ones((4096, 4096), cupy.float32)
        for _ in range(20):  # keeps the stream busy: a kernel on another stream would read `late` too early
            workload = workload @ workload * 1e-4
        late[:] = images
        result = augment.apply(late, "standard", MEAN, STD, seed=0, epoch=0)
        result *= 1
    stream.synchronize()
    cupy.testing.assert_array_equal(result, expected)


def test_a_launch_returns_before_it_is_done():
    import cupy

    images = cupy.asarray(random_images(1000, 32, 32, 3))
    indices = cupy.arange(500_000) % 1000
    out = cupy.empty((500_000, 32, 32, 3), cupy.float16)
    for _ in range(2):
        augment.apply(images, "strong", MEAN, STD, seed=0, epoch=0, indices=indices, dtype="float16", out=out)
    cupy.cuda.runtime.deviceSynchronize()
    start, done = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(10):
        augment.apply(images, "strong", MEAN, STD, seed=0, epoch=0, indices=indices, dtype="float16", out=out)
    done.record()
    assert not done.done
    done.synchronize()


def test_same_seed_same_pixels():
    images = random_images(200, 32, 32, 3)
    indices = np.arange(200)
    first = on_gpu(images, "strong", indices, 5, 6, "float16")
    np.testing.assert_array_equal(first, on_gpu(images, "strong", indices, 5, 6, "float16"))
    assert not np.array_equal(first, on_gpu(images, "strong", indices, 5, 7, "float16"))
