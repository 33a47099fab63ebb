"""The only module that detects the GPU; ``PIPELINE_DEVICE=cpu`` makes it ignore the GPU.

Other modules get the array module (`xp`), the dataframe module (`dataframe`) and TensorFlow (`tensorflow`) from here,
and move arrays between them with `to_device`, `to_numpy` and `to_tensorflow`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core import files
from pipeline.core.errors import PipelineError

NATIVE_LOG = "PIPELINE_LOG"
# Prints faulthandler's traceback without its list of extension modules, then the path of the log ($0).
_CRASH_REPORT = """trace=$(grep -v '^Extension modules')
[ -z "$trace" ] || printf '%s\n\nMessages from native code are in %s\n' "$trace" "$0" >&2"""


def _wheel_folder(*parts: str) -> Path | None:
    """A folder of NVIDIA's pip wheels (site-packages/nvidia/...), or None if they are not installed."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(root, *parts) for root in spec.submodule_search_locations] if spec else []
    return next((folder for folder in folders if folder.is_dir()), None)


@functools.cache
def prepare() -> None:
    """Set the environment variables that TensorFlow, XLA, Numba and CuPy read when they are imported.

    Variables that are already set are not changed, except that a flag is added to ``XLA_FLAGS``, and that
    ``CUDA_VISIBLE_DEVICES`` is emptied without a GPU.
    """
    os.environ.setdefault("TF_GPU_ALLOCATOR", "cuda_malloc_async")  # one pool for TensorFlow, CuPy and RMM
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if gpu_requested():
        # XLA and Numba do not find the compiler in CUDA's pip wheels.
        nvcc = _wheel_folder("cuda_nvcc")
        if nvcc is not None:
            os.environ.setdefault("CUDA_HOME", str(nvcc))
            if "xla_gpu_cuda_data_dir" not in os.environ.get("XLA_FLAGS", ""):
                flags = os.environ.get("XLA_FLAGS", "")
                os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={nvcc}".strip()
        # CuPy and cuDF find these libraries by name once they are loaded.
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
    """Whether the environment allows a GPU: ``PIPELINE_DEVICE`` is not ``cpu`` and this process sees a GPU.

    Raises:
        PipelineError: ``PIPELINE_DEVICE`` is not auto, cpu or gpu, or it is gpu and there is no GPU.
    """
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
    """The number of NVIDIA GPUs this process may use (see ``CUDA_VISIBLE_DEVICES``); allocates no GPU memory."""
    return _driver_gpus() if gpu_requested() else 0


@functools.cache
def has_gpu() -> bool:
    """Whether an NVIDIA GPU and CuPy are both usable; all arrays of the pipeline are then on that GPU.

    Raises:
        PipelineError: As for `gpu_requested`, or ``PIPELINE_DEVICE=gpu`` and CuPy is not installed.
    """
    if not gpu_requested():
        return False
    prepare()
    if importlib.util.find_spec("cupy") is None:
        if os.environ.get("PIPELINE_DEVICE") == "gpu":
            raise PipelineError("CuPy is not installed; run: pip install -r requirements-gpu.txt")
        return False
    import cupy

    cupy.cuda.set_allocator(_default_pool().malloc)
    return cupy.cuda.runtime.getDeviceCount() > 0


@functools.cache
def _default_pool() -> Any:
    """CuPy's interface to the device's default memory pool, which TensorFlow, CuPy and RMM share."""
    import cupy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # CuPy calls this pool experimental
        return cupy.cuda.MemoryAsyncPool()


def xp() -> ModuleType:
    """The array module: CuPy on a GPU, otherwise NumPy."""
    if has_gpu():
        import cupy

        return cupy
    import numpy

    return numpy


@functools.cache
def dataframe() -> ModuleType:
    """The dataframe module: cuDF on a GPU if it is installed, otherwise pandas."""
    if has_gpu() and importlib.util.find_spec("cudf") is not None:
        import cupy
        import rmm
        from cuda.bindings import runtime

        # `CudaAsyncMemoryResource` would create a second pool, whose unused memory the other libraries cannot use.
        handle = runtime.cudaMemPool_t(cupy.cuda.runtime.deviceGetDefaultMemPool(cupy.cuda.runtime.getDevice()))
        rmm.mr.set_current_device_resource(rmm.mr.CudaAsyncViewMemoryResource(handle))
        import cudf

        return cudf
    import pandas

    return pandas


@functools.cache
def tensorflow() -> ModuleType:
    """TensorFlow; its start-up messages go to a file (see `native_log`), and its GPU memory grows as needed."""
    prepare()
    log = native_log()
    import absl.logging
    import tensorflow as tf

    tf.get_logger().propagate = False
    tf.get_logger().handlers = []
    absl.logging.set_verbosity(absl.logging.ERROR)
    if log is not None:
        import logging

        tf.get_logger().addHandler(logging.FileHandler(log, delay=True))
    if has_gpu():
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
    else:
        tf.config.set_visible_devices([], "GPU")
    return tf


@functools.cache
def native_log() -> Path | None:
    """Redirect the standard error of native code (TensorFlow, XLA, CUDA, TensorRT) to a file.

    Python's ``sys.stderr`` stays on the terminal. If native code crashes, the terminal shows the Python traceback and
    the path of the file. The environment variable ``PIPELINE_LOG`` names the file; the default is ``tensorflow.log`` in
    the cache folder, and ``-`` turns the redirection off.

    Returns:
        The file, or None if nothing is redirected (``PIPELINE_LOG=-``, or the file cannot be written).
    """
    target = os.environ.get(NATIVE_LOG)
    if target == "-":
        return None
    try:
        path = Path(target or files.cache_folder() / "tensorflow.log").absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, f"--- {' '.join(sys.argv)} (process {os.getpid()})\n".encode(errors="backslashreplace"))
    except (OSError, PipelineError):
        return None
    with contextlib.suppress(AttributeError, OSError, ValueError):  # notebooks and tests replace sys.stderr
        if sys.stderr.fileno() == 2:
            sys.stderr.flush()
            encoding = sys.stderr.encoding
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=encoding, errors="backslashreplace")
            faulthandler.enable(_crash_report(path))
    os.dup2(log, 2)
    os.close(log)
    os.environ[NATIVE_LOG] = str(path)  # child processes write to the same file
    return path


def _crash_report(log: Path) -> Any:
    """A pipe for faulthandler to a shell that runs `_CRASH_REPORT`; a crashed process cannot run Python."""
    reporter = subprocess.Popen(
        ["sh", "-c", _CRASH_REPORT, str(log)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=sys.stderr, start_new_session=True,
    )  # fmt: skip
    return reporter.stdin


def to_numpy(array: Any) -> Any:
    """Copy a CuPy array or a TensorFlow tensor into host memory; a NumPy array is returned unchanged."""
    import numpy

    return array.get() if hasattr(array, "__cuda_array_interface__") else numpy.asarray(array)


def to_device(array: Any) -> Any:
    """Move `array` to the device: a CuPy array on a GPU, otherwise a NumPy array."""
    return xp().asarray(array) if has_gpu() else to_numpy(array)


def to_tensorflow(array: Any, stream: Any = None) -> Any:
    """Convert a NumPy or CuPy array to a tensor; on a GPU both share the same memory (DLPack).

    DLPack does not synchronise streams, so this function waits for the stream that wrote the array. The array must not
    be written to while the tensor is in use.

    Args:
        array: C-contiguous, of any shape and dtype that TensorFlow supports.
        stream: The `cupy.cuda.Stream` that wrote the array. The default is CuPy's current stream.

    Returns:
        A `tf.Tensor` of the array's shape and dtype, on the same device.
    """
    tf = tensorflow()
    if not hasattr(array, "__cuda_array_interface__"):
        return tf.convert_to_tensor(array)
    if stream is None:
        import cupy

        stream = cupy.cuda.get_current_stream()
    stream.synchronize()
    if array.size == 0:
        return tf.zeros(array.shape, array.dtype.name)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def synchronize() -> None:
    """Wait until the GPU has finished all queued work; does nothing without a GPU."""
    if has_gpu():
        import cupy

        cupy.cuda.runtime.deviceSynchronize()


@contextlib.contextmanager
def explain_out_of_memory(fix: str) -> Iterator[None]:
    """Turn the out-of-memory error of any library into a `PipelineError` whose message ends with `fix`."""
    try:
        yield
    except Exception as error:  # TensorFlow, CuPy, cuDF, Numba and NumPy have different classes for it
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"
        if not out_of_memory and "out of memory" not in str(error).lower():
            raise
        place = "GPU" if has_gpu() else "machine"
        raise PipelineError(f"The {place} does not have enough memory; {fix}.", exit_code=1) from error


def free_memory() -> int:
    """Free memory of the GPU (with the unused part of its memory pool), otherwise of the machine, in bytes."""
    if has_gpu():
        import cupy

        return cupy.cuda.runtime.memGetInfo()[0] + _default_pool().free_bytes()
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
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, IndexError):
        return subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
    return None


def describe() -> dict[str, Any]:
    """Describe the machine and the installed versions, for result files.

    Returns:
        A dictionary with ``device`` ("gpu" or "cpu"), ``gpu``, ``driver``, ``cpu``, ``cores``, ``python`` and
        ``packages`` (versions of the installed packages by name).
    """
    gpu = None
    if has_gpu():
        import cupy

        gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    packages = {}
    for name in ("tensorflow", "keras", "numpy", "numba", "cudf-cu12", "cupy-cuda12x", "numba-cuda", "tensorrt"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "device": "gpu" if has_gpu() else "cpu",
        "gpu": gpu,
        "driver": _driver_version() if gpu else None,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": packages,
    }


def usable_cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
