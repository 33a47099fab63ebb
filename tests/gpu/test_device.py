"""Memory and streams on a real GPU."""

import pytest

from pipeline.core import device

pytestmark = pytest.mark.gpu
GIB = 2**30


def test_a_tensor_shares_the_memory_of_its_array():
    import cupy

    array = cupy.arange(12, dtype=cupy.float16).reshape(3, 4)
    tensor = device.to_tensorflow(array)
    assert "GPU" in tensor.device
    array[0, 0] = 42
    device.synchronize()
    assert float(tensor[0, 0]) == 42


def test_a_tensor_has_what_another_stream_wrote():
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        array = cupy.zeros((4096, 4096), cupy.float32)
        for _ in range(200):
            array += 1
    assert device.to_tensorflow(array, stream).numpy().min() == 200


def test_cudf_is_the_dataframe_and_uses_the_memory_pool_of_cupy():
    import cupy

    frames, pool = device.dataframe(), cupy.cuda.MemoryAsyncPool()
    assert frames.__name__ == "cudf"
    array = cupy.zeros(GIB // 8)
    before = pool.used_bytes()
    column = frames.Series(array) + 1
    assert pool.used_bytes() >= before + array.nbytes
    del column


def test_unused_memory_of_the_pool_is_free():
    import cupy

    before = device.free_memory()
    array = cupy.empty(GIB, cupy.uint8)
    assert device.free_memory() < before - GIB // 2
    del array
    device.synchronize()
    assert device.free_memory() > before - GIB // 4
