"""Read the tensors of a PyTorch state dict without PyTorch and without running code from the file.

weights = torch_file.read("efficientnet-lite0.pth")   # names to NumPy arrays
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.core.errors import PipelineError, first_line

_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER


@dataclasses.dataclass
class _Storage:
    key: str
    dtype: str


@dataclasses.dataclass
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool
    hooks: Any


# The only names that a file may refer to. Everything else in a pickle could run code.
_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch", "HalfStorage"): "<f2",
    ("torch", "FloatStorage"): "<f4",
    ("torch", "DoubleStorage"): "<f8",
    ("torch", "LongStorage"): "<i8",
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not a tensor")
        return _ALLOWED[module, name]

    def persistent_load(self, identifier: tuple[str, str, str, str, int, None]) -> _Storage:
        _, dtype, key, _, _, _ = identifier
        return _Storage(key, dtype)


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Read a state dict in PyTorch's legacy format, that of ``torch.save`` before PyTorch 1.6.

    The file consists of five pickles (a magic number, the protocol, the machine, the state dict, the keys of the
    storages), followed by the number of elements and the elements of each storage (`torch.serialization`).

    Args:
        path: The file. Newer versions of PyTorch write this format with ``_use_new_zipfile_serialization=False``.

    Returns:
        The tensors by name, as arrays in host memory.

    Raises:
        PipelineError: The file is missing, damaged or in another format, or contains other objects than tensors.
    """
    try:
        with Path(path).open("rb") as file:
            return _read(file)
    # Unpickling and the reading of damaged files raise many types.
    except Exception as error:
        raise PipelineError(
            f"Expected a PyTorch state dict in the legacy format, got {str(path)!r} ({first_line(error)}); save it "
            "with torch.save(…, _use_new_zipfile_serialization=False)."
        ) from error


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    if _Unpickler(file).load() != _MAGIC:
        raise ValueError("the first bytes are those of another format")
    for _ in ("protocol", "machine"):
        _Unpickler(file).load()
    tensors = _Unpickler(file).load()
    keys = _Unpickler(file).load()
    dtypes = {tensor.storage.key: np.dtype(tensor.storage.dtype) for tensor in tensors.values()}
    storages = {}
    for key in keys:
        size = int.from_bytes(file.read(8), "little") * dtypes[key].itemsize
        storages[key] = file.read(size)
    arrays = {}
    for name, tensor in tensors.items():
        dtype = dtypes[tensor.storage.key]
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        offset = tensor.offset * dtype.itemsize
        # The constructor checks that the strides stay inside the buffer, which as_strided does not.
        arrays[name] = np.ndarray(tensor.shape, dtype, storages[tensor.storage.key], offset, strides)
    return arrays
