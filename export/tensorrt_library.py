"""Makes the TensorRT pip package visible to TensorFlow, without LD_LIBRARY_PATH.

TensorFlow 2.17 opens ``libnvinfer.so.8.6.1``, but the pip package contains ``libnvinfer.so.8``, and the dynamic loader
reads its search path only when a process starts. However, the loader does not search for a name that is already loaded.
`load` therefore writes a library of a few hundred bytes that has the wanted name and depends on the real file, and
loads it; symbol lookups in it find the symbols of its dependency.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import struct
import tempfile
from pathlib import Path

from pipeline.core import device
from pipeline.core.errors import PipelineError

MANIFEST = "tftrt.json"
VERSION = "8.6.1"  # TensorFlow 2.17 is linked against it
LIBRARIES = ("libnvinfer", "libnvinfer_plugin")
INSTEAD = "to use TFLite instead: python -m export.tflite, then python -m export.tflite_infer"


def require(artifact: Path | None = None) -> tuple[int, int, int]:
    """Load TensorRT, or raise an error that names what is missing.

    Args:
        artifact: A TF-TRT folder; its engines must have been built for this GPU's compute capability.

    Returns:
        The version of the loaded TensorRT, for example (8, 6, 1).

    Raises:
        PipelineError: There is no NVIDIA GPU or no TensorRT 8.6, TensorFlow was built without TensorRT, or the
            engines were built for another compute capability.
    """
    if not device.has_gpu():
        raise PipelineError(f"TF-TRT needs an NVIDIA GPU, and this machine has none; {INSTEAD}")
    if artifact is not None:
        manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
        built_for = tuple(manifest["compute_capability"])
        if built_for != device.compute_capability():
            raise PipelineError(
                f"The engines in {artifact} were built for compute capability {built_for}, but this GPU has "
                f"{device.compute_capability()}; export again on this machine: python -m export.tftrt"
            )
    version = load()  # before is_tensorrt_enabled(), which opens the library
    tf = device.tensorflow()
    from tensorflow.compiler.tf2tensorrt import _pywrap_py_utils as tf2tensorrt

    if not tf2tensorrt.is_tensorrt_enabled():
        raise PipelineError(
            f"TensorFlow {tf.__version__} was built without TensorRT {VERSION} (2.17 is the last with it); {INSTEAD}"
        )
    return version


@functools.cache
def load() -> tuple[int, int, int]:
    """Load TensorRT under the names that TensorFlow opens; returns its version.

    Raises:
        PipelineError: TensorRT is not installed or cannot be loaded.
    """
    for name in LIBRARIES:
        wanted = f"{name}.so.{VERSION}"
        try:
            ctypes.CDLL(wanted, mode=ctypes.RTLD_GLOBAL)
        except OSError:  # not on the loader's path
            folder = find()
            try:
                _preload(folder)
                load_as(wanted, folder / f"{name}.so.8")
            except OSError as error:
                raise PipelineError(f"TensorRT in {folder} cannot be loaded ({error}); {INSTEAD}") from error
    library = ctypes.CDLL(f"{LIBRARIES[0]}.so.{VERSION}")
    number = library.getInferLibVersion()
    return number // 1000, number // 100 % 10, number % 100


def find() -> Path:
    """The folder with the pip package's libraries; raises `PipelineError` if TensorRT 8 is not installed."""
    for folder in [*_package_folders("tensorrt_libs"), *_package_folders("tensorrt")]:
        if (folder / "libnvinfer.so.8").is_file():
            return folder
    raise PipelineError(
        "TensorRT 8.6 is not installed (found no libnvinfer.so.8 in a tensorrt_libs package); install it: pip install "
        f"-r requirements-tensorrt.txt; {INSTEAD}"
    )


def _package_folders(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []


def _preload(folder: Path) -> None:
    """Load the libraries that TensorRT opens by name later: its builder kernels, and cuDNN and cuBLAS of the wheels."""
    libraries = list(folder.glob("libnvinfer_builder_resource.so.8*"))
    for root in _package_folders("nvidia"):
        for library in ("cublas/lib/libcublasLt.so.12", "cublas/lib/libcublas.so.12", "cudnn/lib/libcudnn.so.8"):
            libraries += [path] if (path := root / library).is_file() else []
    for library in libraries:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def load_as(name: str, library: Path) -> None:
    """Load `library` so that opening `name` in this process finds it.

    Args:
        name: The file name that other code will open, without a folder.
        library: A shared library for this machine's architecture.

    Raises:
        OSError: The dynamic loader rejects `library`.
    """
    with tempfile.TemporaryDirectory() as folder:
        forwarder = Path(folder) / name
        forwarder.write_bytes(_forwarder(name, library.resolve()))
        ctypes.CDLL(str(forwarder), mode=ctypes.RTLD_GLOBAL)  # stays mapped after the file is deleted


def _forwarder(name: str, library: Path) -> bytes:
    """An ELF shared library without code, named `name`, that depends on `library`.

    Layout (System V ABI, "Object Files" and "Program Loading and Dynamic Linking"): header, three program headers, an
    empty symbol table, its hash table, the strings, the dynamic section.
    """
    with library.open("rb") as file:
        identification = file.read(20)
    if identification[:6] != b"\x7fELF\x02\x01":
        raise OSError(f"{library} is not a 64-bit little-endian ELF library")
    machine = struct.unpack_from("<H", identification, 18)[0]
    header, program_header, entry = 64, 56, 16
    symbols = header + 3 * program_header
    hashes = symbols + 24
    strings = hashes + 16
    table = b"\0" + name.encode() + b"\0" + str(library).encode() + b"\0"
    dynamic = strings + -(-len(table) // 8) * 8
    tags = [
        (1, 2 + len(name.encode())),  # DT_NEEDED: a path with a slash, which the loader does not search for
        (14, 1),  # DT_SONAME
        (4, hashes),  # DT_HASH
        (5, strings),  # DT_STRTAB
        (6, symbols),  # DT_SYMTAB
        (10, len(table)),  # DT_STRSZ
        (11, 24),  # DT_SYMENT
        (0, 0),
    ]
    end = dynamic + entry * len(tags)
    read_write = 6
    parts = [
        identification[:16],
        struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, header, 0, 0, header, program_header, 3, 64, 0, 0),
        struct.pack("<IIQQQQQQ", 1, read_write, 0, 0, 0, end, end, 0x10000),  # PT_LOAD, in pages of up to 64 KiB
        struct.pack("<IIQQQQQQ", 2, read_write, dynamic, dynamic, dynamic, *[end - dynamic] * 2, 8),  # PT_DYNAMIC
        struct.pack("<IIQQQQQQ", 0x6474E551, read_write, 0, 0, 0, 0, 0, 16),  # PT_GNU_STACK: no executable stack
        bytes(24),
        struct.pack("<IIII", 1, 1, 0, 0),
        table.ljust(dynamic - strings, b"\0"),
        *(struct.pack("<QQ", *tag) for tag in tags),
    ]
    return b"".join(parts)
