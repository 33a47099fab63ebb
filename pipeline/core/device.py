"""The only module that knows whether there is a GPU.

Everything else asks it for the array module (`xp`), the dataframe module (`dataframe`) and TensorFlow (`tensorflow`),
and moves arrays between them with `to_device`, `to_numpy` and `to_tensorflow`. Set ``PIPELINE_DEVICE=cpu`` to ignore
a GPU that is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import io
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core.errors import PipelineError

NATIVE_LOG = "PIPELINE_LOG"


def _wheel_folder(*parts: str) -> Path | None:
    """The folder of NVIDIA's pip wheels (site-packages/nvidia/...), or None where they are not installed."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(root).joinpath(*parts)
        if folder.is_dir():
            return folder
    return None


@functools.cache
def prepare() -> None:
    """Set what TensorFlow, XLA, Numba and CuPy read from the environment once, at their import.

    Called by every function here that imports one of them; harmless without a GPU. Variables that are set already
    are left as they are, except that XLA's flags are added to.
    """
    os.environ.setdefault("TF_GPU_ALLOCATOR", "cuda_malloc_async")  # one pool for TensorFlow, CuPy and RMM
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if gpu_requested():
        # With CUDA from pip, nobody else tells XLA and Numba where the compiler is.
        nvcc = _wheel_folder("cuda_nvcc")
        if nvcc is not None:
            os.environ.setdefault("CUDA_HOME", str(nvcc))
            if "xla_gpu_cuda_data_dir" not in os.environ.get("XLA_FLAGS", ""):
                flags = os.environ.get("XLA_FLAGS", "")
                os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={nvcc}".strip()
        # And CuPy and cuDF find the libraries by name once they are loaded.
        for package, pattern in (
            ("cuda_runtime", "libcudart.so.12"),
            ("cuda_nvrtc", "libnvrtc.so.12"),
            ("nvjitlink", "libnvJitLink.so.12"),
            ("cublas", "libcublasLt.so.12"),
            ("cublas", "libcublas.so.12"),
        ):
            folder = _wheel_folder(package, "lib")
            if folder is not None and (folder / pattern).exists():
                ctypes.CDLL(str(folder / pattern), mode=ctypes.RTLD_GLOBAL)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def gpu_requested() -> bool:
    """Whether the environment allows a GPU: ``PIPELINE_DEVICE`` is not ``cpu`` and this process sees a GPU."""
    choice = os.environ.get("PIPELINE_DEVICE", "auto")
    if choice not in ("auto", "cpu", "gpu"):
        raise PipelineError(f"PIPELINE_DEVICE is {choice!r}; set it to auto, cpu or gpu.")
    if choice == "cpu":
        return False
    found = _driver_gpus() > 0
    if choice == "gpu" and not found:
        raise PipelineError(
            "PIPELINE_DEVICE is gpu, but no NVIDIA GPU was found (no driver, or CUDA_VISIBLE_DEVICES hides it)."
        )
    return found


@functools.cache
def _driver_gpus() -> int:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def gpu_count() -> int:
    """How many NVIDIA GPUs this process may use (``CUDA_VISIBLE_DEVICES`` hides some); memory of none is touched."""
    return _driver_gpus() if gpu_requested() else 0


@functools.cache
def has_gpu() -> bool:
    """True where an NVIDIA GPU and CuPy are both usable; every array of the pipeline then lives on that GPU.

    Raises:
        PipelineError: There is a GPU but the GPU packages are missing and ``PIPELINE_DEVICE=gpu`` asks for them.
    """
    if not gpu_requested():
        return False
    prepare()
    if importlib.util.find_spec("cupy") is None:
        if os.environ.get("PIPELINE_DEVICE") == "gpu":
            raise PipelineError("CuPy is not installed; run: pip install -r requirements-gpu.txt")
        return False
    import cupy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # CuPy calls this pool experimental
        cupy.cuda.set_allocator(cupy.cuda.MemoryAsyncPool().malloc)
    return cupy.cuda.runtime.getDeviceCount() > 0


def xp() -> ModuleType:
    """The array module: CuPy on a GPU, NumPy without."""
    if has_gpu():
        import cupy

        return cupy
    import numpy

    return numpy


@functools.cache
def dataframe() -> ModuleType:
    """The dataframe module: cuDF on a GPU where it is installed, pandas without."""
    if has_gpu() and importlib.util.find_spec("cudf") is not None:
        import rmm

        rmm.mr.set_current_device_resource(rmm.mr.CudaAsyncMemoryResource())
        import cudf

        return cudf
    import pandas

    return pandas


@functools.cache
def tensorflow() -> ModuleType:
    """TensorFlow, imported with its start-up messages kept out of the terminal (see `native_log`).

    On a GPU its memory grows as needed, so that CuPy, cuDF and Numba have room beside it.
    """
    prepare()
    with_log = native_log()
    import absl.logging
    import tensorflow as tf

    tf.get_logger().propagate = False
    tf.get_logger().handlers = []
    absl.logging.set_verbosity(absl.logging.ERROR)
    if with_log is not None:
        import logging

        tf.get_logger().addHandler(logging.FileHandler(with_log, delay=True))
    if has_gpu():
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
    else:
        tf.config.set_visible_devices([], "GPU")
    return tf


@functools.cache
def native_log() -> Path | None:
    """Send what native code (TensorFlow, XLA, CUDA, TensorRT) writes to standard error to a file; returns its path.

    Python's own ``sys.stderr`` keeps going to the terminal, so progress bars and tracebacks stay visible. The file is
    ``logs/tensorflow.log`` below the working directory, or where the environment variable ``PIPELINE_LOG`` says;
    ``PIPELINE_LOG=-`` leaves everything in the terminal (the function then returns None), and so does a file that
    cannot be written.
    """
    target = os.environ.get(NATIVE_LOG, "logs/tensorflow.log")
    if target == "-":
        return None
    path = Path(target).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a full disk: whatever else has room goes on
        os.write(log, f"--- {' '.join(sys.argv)} (process {os.getpid()})\n".encode(errors="backslashreplace"))
    try:
        python_uses_stderr = sys.stderr is not None and sys.stderr.fileno() == 2
    except (AttributeError, io.UnsupportedOperation, OSError, ValueError):
        python_uses_stderr = False
    if python_uses_stderr:
        sys.stderr.flush()
        terminal = os.dup(2)
        sys.stderr = os.fdopen(terminal, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    os.dup2(log, 2)
    os.close(log)
    os.environ[NATIVE_LOG] = str(path)  # child processes write to the same file
    return path


def to_numpy(array: Any) -> Any:
    """Copy `array` (CuPy, NumPy or a TensorFlow tensor) into host memory as a NumPy array; NumPy passes through."""
    import numpy

    if isinstance(array, numpy.ndarray):
        return array
    if hasattr(array, "__cuda_array_interface__") and hasattr(array, "get"):
        return array.get()
    return numpy.asarray(array)


def to_device(array: Any) -> Any:
    """Move `array` to where the pipeline's arrays live: a CuPy array on a GPU, a NumPy array without."""
    return xp().asarray(array) if has_gpu() else to_numpy(array)


def to_tensorflow(array: Any) -> Any:
    """Hand a CuPy or NumPy array to TensorFlow: the same device memory by DLPack on a GPU, no copy over the bus.

    DLPack hands over a pointer, not an order, so the array's stream is synchronised first. The array must be
    C-contiguous, and must not be written to while the tensor is in use.

    Returns:
        A `tf.Tensor` of the array's shape and dtype.

    Raises:
        PipelineError: The array is not C-contiguous.
    """
    tf = tensorflow()
    if not array.flags.c_contiguous:
        raise PipelineError(f"to_tensorflow got a non-contiguous array of shape {array.shape}; pass a contiguous copy.")
    if not hasattr(array, "__cuda_array_interface__"):
        return tf.convert_to_tensor(array)
    import cupy

    cupy.cuda.get_current_stream().synchronize()
    if array.size == 0:
        return tf.zeros(array.shape, array.dtype.name)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def from_tensorflow(tensor: Any) -> Any:
    """The reverse of `to_tensorflow`: a CuPy array that shares a GPU tensor's memory, or a NumPy array."""
    if not has_gpu() or "GPU" not in tensor.device:
        return to_device(tensor.numpy())
    import cupy

    synchronize()  # the tensor may still be computed, on a stream of TensorFlow's own
    return cupy.from_dlpack(_DLPack(tensorflow().experimental.dlpack.to_dlpack(tensor)))


class _DLPack:
    """A DLPack capsule with the protocol's two methods, as `cupy.from_dlpack` wants it."""

    def __init__(self, capsule: Any):
        self.capsule = capsule

    def __dlpack__(self, stream: Any = None, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)  # kDLCUDA, device 0


def synchronize() -> None:
    """Wait until the GPU has finished everything queued on it; nothing without a GPU."""
    if has_gpu():
        import cupy

        cupy.cuda.runtime.deviceSynchronize()


@contextlib.contextmanager
def out_of_memory_sentence(way_out: str) -> Iterator[None]:
    """Turn any library's out-of-memory error inside the block into a `PipelineError` that ends with `way_out`."""
    try:
        yield
    except Exception as error:
        names = {kind.__name__ for kind in type(error).__mro__}
        if (
            names & {"ResourceExhaustedError", "OutOfMemoryError", "MemoryError"}
            or "out of memory" in str(error).lower()
        ):
            where = "GPU's" if has_gpu() else "machine's"
            raise PipelineError(f"The {where} memory is not enough; {way_out}.", exit_code=1) from None
        raise


def free_memory() -> int:
    """Bytes free where the pipeline's arrays live: the GPU's memory, or the machine's."""
    if has_gpu():
        import cupy

        return cupy.cuda.runtime.memGetInfo()[0]
    import psutil

    return psutil.virtual_memory().available


def compute_capability() -> tuple[int, int] | None:
    """The GPU's compute capability, for example (9, 0), or None without a GPU."""
    if not has_gpu():
        return None
    import cupy

    digits = cupy.cuda.Device(0).compute_capability
    return int(digits[:-1]), int(digits[-1])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """The machine and the versions, as every result file records them.

    Returns:
        A dictionary with ``device`` ("gpu" or "cpu"), ``gpu``, ``driver``, ``cpu``, ``cores``, ``python`` and
        ``packages`` (name to version, installed ones only).
    """
    gpu = driver = None
    if has_gpu():
        import cupy

        gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        try:
            answer = subprocess.run(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
            )
            driver = answer.stdout.split()[0] if answer.stdout else None
        except OSError:
            driver = None
    packages = {}
    for name in ("tensorflow", "keras", "numpy", "numba", "cudf-cu12", "cupy-cuda12x", "numba-cuda", "tensorrt"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": "gpu" if has_gpu() else "cpu",
        "gpu": gpu,
        "driver": driver,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": packages,
    }


def usable_cores() -> int:
    """How many threads decode at once: one for each core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
