"""Compile the operations in `src/` with the system's compilers, once for each machine, and load them into TensorFlow.

The library goes to ``ops/DIGEST/`` in the cache folder; the digest covers the sources, the compilers' versions and
flags, the processor and TensorFlow's version, so whatever changes makes a new one. A lock lets one process build while
others wait, and the folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core import device, files
from pipeline.core.errors import PipelineError, first_line

SOURCES = Path(__file__).parent / "src"
LIBRARY = "operations.so"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden")
# The arithmetic is compiled for this very processor; TensorFlow's headers are not, as their layout depends on it.
ARITHMETIC_FLAGS = ("-march=native", "-fno-math-errno", "-fno-trapping-math")
if platform.machine() == "x86_64":
    ARITHMETIC_FLAGS += ("-mprefer-vector-width=512",)  # 1.35 times as fast, where the processor has AVX-512
LINK_FLAGS = ("-shared", "-Wl,-Bsymbolic", "-Wl,--exclude-libs,ALL")  # CUDA's runtime in here, not TensorFlow's
TIMEOUT = 600  # seconds for one compiler


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """The compilers of this machine.

    Attributes:
        compiler: Path of the C++ compiler.
        nvcc: Path of CUDA's compiler, None where there is no GPU.
        architecture: The GPU's, as ``sm_90``; None where there is no GPU.
    """

    compiler: str
    nvcc: str | None
    architecture: str | None

    def commands(self, folder: Path) -> list[list[str]]:
        """The compilations that are independent of each other, into `folder`."""
        tf = device.tensorflow()
        headers = [flag.replace("-I", "-isystem", 1) for flag in tf.sysconfig.get_compile_flags()]
        defines = ["-DPIPELINE_WITH_CUDA"] if self.nvcc else []
        compile_one = [self.compiler, *FLAGS]
        commands = [
            [
                *compile_one,
                *headers,
                *defines,
                "-c",
                str(SOURCES / "operations.cc"),
                "-o",
                str(folder / "operations.o"),
            ],
            [*compile_one, *ARITHMETIC_FLAGS, "-c", str(SOURCES / "cpu.cc"), "-o", str(folder / "cpu.o")],
        ]
        if self.nvcc:
            cuda = ["-std=c++17", "-O3", f"-arch={self.architecture}", "-Xcompiler", "-fPIC", "-ccbin", self.compiler]
            commands.append([self.nvcc, *cuda, "-c", str(SOURCES / "gpu.cu"), "-o", str(folder / "gpu.o")])
        return commands

    def link_command(self, folder: Path) -> list[str]:
        tf = device.tensorflow()
        objects = [str(folder / f"{name}.o") for name in ("operations", "cpu", *(["gpu"] if self.nvcc else []))]
        against = list(tf.sysconfig.get_link_flags())
        if self.nvcc:
            flags = [part for flag in LINK_FLAGS[1:] for part in ("-Xcompiler", flag.replace(",", "\\,"))]
            linker = [self.nvcc, "-shared", "-cudart", "none", f"-arch={self.architecture}", "-ccbin", self.compiler]
            # Before TensorFlow, which exports functions of the same names for the CUDA it was built with.
            runtime = ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
            return [*linker, *flags, *objects, *runtime, *against, "-o", str(folder / LIBRARY)]
        return [self.compiler, *LINK_FLAGS, *objects, *against, "-o", str(folder / LIBRARY)]

    def digest(self) -> str:
        """What a library depends on, but for the paths; 32 hexadecimal digits."""
        parts = [device.tensorflow().__version__, platform.machine(), _processor_features(), *map(str, self._flags())]
        parts += [_version(tool) for tool in (self.compiler, self.nvcc) if tool]
        content = hashlib.sha256("\0".join(parts).encode())
        for path in sorted(SOURCES.iterdir()):
            content.update(path.name.encode() + b"\0" + path.read_bytes())
        return content.hexdigest()[:32]

    def _flags(self) -> Sequence[Any]:
        return (*FLAGS, *ARITHMETIC_FLAGS, *LINK_FLAGS, self.architecture, Path(__file__).read_text(encoding="utf-8"))


def toolchain() -> Toolchain:
    """Find the compilers.

    Raises:
        PipelineError: There is no C++ compiler, or a GPU but no CUDA compiler.
    """
    wanted = os.environ.get("CXX")
    compiler = (
        shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    )
    if compiler is None:
        looked_for = f"CXX is {wanted!r}, which is not found" if wanted else "no g++, c++ or clang++ is found"
        raise PipelineError(f"The custom operations need a C++ compiler, but {looked_for}; install g++ or set CXX.")
    if not device.has_gpu():
        return Toolchain(compiler, None, None)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)]
    nvcc = next(filter(None, candidates), None)
    if nvcc is None:
        raise PipelineError(
            "The custom operations need CUDA's compiler on a machine with a GPU, but no nvcc is found; install the "
            "CUDA toolkit or set CUDA_HOME."
        )
    major, minor = device.compute_capability()
    return Toolchain(compiler, nvcc, f"sm_{major}{minor}")


def build() -> Path:
    """Compile the operations unless the cache holds them.

    Returns:
        The shared library.

    Raises:
        PipelineError: No compiler, a compiler that fails (exit code 1), or no room for the result.
    """
    tools = toolchain()
    folder = files.cache_folder() / "ops" / tools.digest()
    if not _intact(folder):
        with _locked(folder.with_suffix(".lock")):
            if not _intact(folder):  # another process may have built it while this one waited
                shutil.rmtree(folder, ignore_errors=True)
                with files.atomic_write_in_cache(folder) as temporary:
                    temporary.mkdir()
                    _compile(tools, temporary)
    return folder / LIBRARY


def load() -> ModuleType:
    """Build the operations where needed, load them into TensorFlow, and try each once on the device.

    Returns:
        A module with one function for each operation, as TensorFlow generates it.

    Raises:
        PipelineError: They cannot be built, loaded or run.
    """
    tf = device.tensorflow()
    path = build()
    try:
        library = tf.load_op_library(str(path))
    except (tf.errors.OpError, RuntimeError) as error:
        raise PipelineError(
            f"TensorFlow does not load {path} ({first_line(str(error))}); remove that file.", 1
        ) from None
    _register_gradients(library)
    _try_out(library)
    return library


def _try_out(library: ModuleType) -> None:
    # A CUDA toolkit newer than the driver, for one, is only noticed at the first launch.
    tf = device.tensorflow()
    where = "/GPU:0" if device.has_gpu() else "/CPU:0"
    try:
        with tf.init_scope(), tf.device(where):
            ones = tf.ones([2, 3])
            library.pipeline_leaky_relu(ones, alpha=0.5).numpy()
            library.pipeline_bias_gelu_grad(ones, ones, ones[0], approximate=False)[1].numpy()
    except tf.errors.OpError as error:
        reason = first_line(error.message)
        raise PipelineError(f"The custom operations were built, but do not run here ({reason}).", 1) from None


@functools.cache
def _register_gradients(library: ModuleType) -> None:
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
        # For gradient penalties; rare enough for TensorFlow's own operations.
        gradient, features, bias = operation.inputs
        first, second = _derivatives(tf.cast(features, tf.float32) + tf.cast(bias, tf.float32), operation)
        direction = tf.cast(along_features, tf.float32) + tf.cast(along_bias, tf.float32)
        along = direction * tf.cast(gradient, tf.float32) * second
        over_rows = tf.reduce_sum(tf.reshape(along, [-1, tf.size(bias)]), axis=0)
        return tuple(tf.cast(part, features.dtype) for part in (direction * first, along, over_rows))

    def _derivatives(x: Any, operation: Any) -> tuple[Any, Any]:
        """The first and second derivative of GELU at `x`, float32."""
        if not operation.get_attr("approximate"):
            density = tf.exp(-0.5 * x * x) * 0.3989422804
            return 0.5 * tf.math.erfc(x * -0.7071067812) + x * density, density * (2.0 - x * x)
        linear, cubic = 1.5957691216, 0.044715  # gelu(x) = x · sigmoid(linear · (x + cubic · x³))
        inner, slope = tf.sigmoid(linear * (x + cubic * x**3)), linear * (1.0 + 3.0 * cubic * x * x)
        bend = inner * (1.0 - inner)
        curvature = (1.0 - 2.0 * inner) * slope * slope + 6.0 * linear * cubic * x
        return inner + x * bend * slope, bend * (2.0 * slope + x * curvature)


def _compile(tools: Toolchain, folder: Path) -> None:
    """Make the library in `folder`, its digest beside it, and nothing else."""
    for step in (tools.commands(folder), [tools.link_command(folder)]):
        running = [_start(command) for command in step]
        try:
            for process in running:
                output = process.communicate(timeout=TIMEOUT)[0]
                if process.returncode != 0:
                    raise _failure(process.args[0], output)
        except subprocess.TimeoutExpired:
            raise PipelineError(f"A compiler of the custom operations ran for {TIMEOUT} s without an end.", 1) from None
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                process.communicate()
    library = folder / LIBRARY
    if not library.is_file():
        raise _failure(tools.compiler, "it ended well and left no library")
    for path in folder.glob("*.o"):
        path.unlink()
    _digest_file(library).write_text(_digest_of(library), encoding="utf-8")


def _start(command: list[str]) -> subprocess.Popen:
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise PipelineError(f"The compiler {command[0]} does not start ({error.strerror or error}).", 1) from None


def _failure(compiler: str, output: str) -> PipelineError:
    if "No space left on device" in output:
        return PipelineError("No room on the disk to compile the custom operations; free some space.", 1)
    lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()
    reason = first_line("\n".join(lines)) or "it said nothing"
    return PipelineError(f"{compiler} does not compile the custom operations ({reason}).", 1)


def _intact(folder: Path) -> bool:
    """Whether the folder holds a library as it was written."""
    library = folder / LIBRARY
    try:
        return _digest_file(library).read_text(encoding="utf-8") == _digest_of(library)
    except (OSError, UnicodeDecodeError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise files.cache_write_error(path, error) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # freed by the kernel when its holder dies
        yield


@functools.cache
def _version(tool: str) -> str:
    try:
        answer = subprocess.run([tool, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PipelineError(f"The compiler {tool} does not start ({error}).", 1) from None
    if answer.returncode != 0:
        raise PipelineError(f"{tool} --version fails ({first_line(answer.stderr or answer.stdout)}).", 1)
    return answer.stdout


def _processor_features() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
