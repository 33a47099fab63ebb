"""Makes TensorRT's library visible to TensorFlow, without LD_LIBRARY_PATH.

TensorFlow 2.17 opens ``libnvinfer.so.8.6.1`` by that name, and the pip package holds ``libnvinfer.so.8``. The dynamic
loader reads its search path once, when a process starts, so no link made later is found. But a name that is loaded
already is not searched for: `load` writes a library of a few hundred bytes that has the wanted name and needs the real
file, and loads it. A handle on it finds the symbols of what it needs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import platform
import struct
import tempfile
from pathlib import Path

from pipeline.core import device
from pipeline.core.errors import PipelineError, first_line

MANIFEST = "tftrt.json"
VERSION = "8.6.1"  # what TensorFlow 2.17 is linked against
LIBRARIES = ("libnvinfer", "libnvinfer_plugin")
INSTEAD = "without them TFLite works: python -m export.tflite, python -m export.tflite_infer"


def require(artifact: Path | None = None) -> tuple[int, int, int]:
    """Load TensorRT, or say what is missing.

    Args:
        artifact: A TF-TRT folder that is about to be used: its engines run on the kind of GPU they were built on.

    Returns:
        The version of TensorRT that is loaded, for example (8, 6, 1).

    Raises:
        PipelineError: There is no NVIDIA GPU, no TensorRT 8.6, a TensorFlow built without it, or the artifact's
            engines were built on another kind of GPU.
    """
    if not device.has_gpu():
        raise PipelineError(f"TF-TRT needs an NVIDIA GPU and TensorRT, and no GPU was found here; {INSTEAD}.")
    if artifact is not None:
        try:
            manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
            built_for = tuple(manifest["compute_capability"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PipelineError(
                f"{artifact / MANIFEST} cannot be read ({first_line(error)}); make the engines again: python -m "
                "export.tftrt"
            ) from None
        if built_for != device.compute_capability():
            raise PipelineError(
                f"The engines of {artifact} were built for a GPU of compute capability {built_for}, and this one has "
                f"{device.compute_capability()}; make them again here: python -m export.tftrt"
            )
    version = load()  # first: TensorFlow looks for the library when it is asked whether it has TensorRT
    tf = device.tensorflow()
    from tensorflow.compiler.tf2tensorrt import _pywrap_py_utils as tf2tensorrt

    if not tf2tensorrt.is_tensorrt_enabled():
        raise PipelineError(
            f"TensorFlow {tf.__version__} was built without TensorRT {VERSION} (2.17 is the last with it); {INSTEAD}."
        )
    return version


@functools.cache
def load() -> tuple[int, int, int]:
    """Load TensorRT under the names TensorFlow opens; returns its version.

    Raises:
        PipelineError: It is not installed, or does not load.
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
                raise PipelineError(f"TensorRT in {folder} does not load ({error}); {INSTEAD}.") from None
    library = ctypes.CDLL(f"{LIBRARIES[0]}.so.{VERSION}")
    number = library.getInferLibVersion()
    return number // 1000, number // 100 % 10, number % 100


def find() -> Path:
    """The folder of the pip package's libraries.

    Raises:
        PipelineError: TensorRT 8 is not installed.
    """
    for package in ("tensorrt_libs", "tensorrt"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / "libnvinfer.so.8").is_file():
                return Path(folder)
    raise PipelineError(
        f"TensorRT 8.6 is not installed (no tensorrt_libs package with libnvinfer.so.8); run pip install -r "
        f"requirements-tensorrt.txt; {INSTEAD}."
    )


def _preload(folder: Path) -> None:
    """Load what TensorRT opens by name later: its kernels for building engines, and cuDNN and cuBLAS of the wheels."""
    libraries = list(folder.glob("libnvinfer_builder_resource.so.8*"))
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for library in ("cublas/lib/libcublasLt.so.12", "cublas/lib/libcublas.so.12", "cudnn/lib/libcudnn.so.8"):
            libraries += [path] if (path := Path(root) / library).is_file() else []
    for library in libraries:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def load_as(name: str, library: Path) -> None:
    """Load `library` so that opening `name` in this process finds it.

    Args:
        name: The file name that some other code will open, without a folder.
        library: A shared library of this machine's architecture.

    Raises:
        OSError: The loader refuses it; the text says why.
    """
    if platform.system() != "Linux":
        raise OSError(f"{platform.system()} has no TensorRT of this kind")
    with tempfile.TemporaryDirectory() as folder:
        forwarder = Path(folder) / name
        forwarder.write_bytes(_forwarder(name, library.resolve()))
        ctypes.CDLL(str(forwarder), mode=ctypes.RTLD_GLOBAL)  # stays mapped when the file is gone


def _forwarder(name: str, library: Path) -> bytes:
    """An ELF shared library without code, named `name`, that needs `library`.

    Layout (System V ABI, "Object Files" and "Program Loading and Dynamic Linking"): header, three program headers, an
    empty symbol table, its hash table, the strings, the dynamic section.
    """
    with library.open("rb") as file:
        identification = file.read(20)
    if identification[:6] != b"\x7fELF\x02\x01":
        raise OSError(f"{library} is no 64-bit little-endian library")
    machine = struct.unpack_from("<H", identification, 18)[0]
    header, program_header, entry = 64, 56, 16
    symbols = header + 3 * program_header
    hashes = symbols + 24
    strings = hashes + 16
    table = b"\0" + name.encode() + b"\0" + str(library).encode() + b"\0"
    dynamic = strings + -(-len(table) // 8) * 8
    tags = [
        (1, 2 + len(name.encode())),  # DT_NEEDED: the path, whose slash keeps the loader from searching
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
