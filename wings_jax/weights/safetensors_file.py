"""Safetensors files, read and written one tensor at a time.

The safetensors library maps whole files or needs whole shards in memory; an 8B checkpoint is
read and written here by seeking, so that the peak stays at one tensor. The format is 8 bytes of
header length, a JSON header (name -> dtype, shape, offsets) and the raw little-endian data.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from wings_jax import files
from wings_jax.weights.tensors import LazyTensor, TensorMap, WeightsError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100 * 2**20


def open_safetensors(path: pathlib.Path) -> TensorMap:
    """Returns the tensors of one file, unread.

    Raises:
      WeightsError: not a safetensors file, or shorter than its header requires.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise WeightsError(f"{path} is not a safetensors file, or is cut short")
            header = json.loads(file.read(length))
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{path} has a header that is not JSON") from error

    return {
        key: _open_entry(path, key, entry, data_start=8 + length, size=size)
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _open_entry(
    path: pathlib.Path, key: str, entry: Mapping[str, Any], *, data_start: int, size: int
) -> LazyTensor:
    """Returns one tensor of the header, after checking that the file holds its bytes."""
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise WeightsError(f"{key} in {path} has dtype {entry['dtype']}, not supported")

    # The bytes must lie in the file and be as many as the shape needs.
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if data_start + end > size:
        raise WeightsError(f"{path} is cut short: {key} ends past the end of the file")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise WeightsError(f"{key} in {path}: shape {list(shape)} does not fit its bytes")

    load = _tensor_reader(path, dtype, shape, data_start + begin)
    return LazyTensor(shape, dtype, load, str(path))


def _tensor_reader(
    path: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...], offset: int
) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        # Read as bytes: numpy cannot read bfloat16 from a file.
        raw = np.fromfile(path, np.uint8, count=size, offset=offset)
        if raw.size != size:
            raise WeightsError(f"{path} is cut short")
        return raw.view(dtype).reshape(shape)

    return load


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, LazyTensor],
    on_write: Callable[[str, int], None] = lambda key, size: None,
) -> None:
    """Writes one file atomically, tensor by tensor.

    Raises:
      UserError: the file cannot be written.
      WeightsError: a tensor's array has another size than the tensor's shape and dtype.
    """
    # All offsets are known before the first tensor is read.
    path = pathlib.Path(path)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end

    # The data begins at a multiple of 8 bytes.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with files.replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, tensor in tensors.items():
            array = np.ascontiguousarray(np.asarray(tensor))
            if array.nbytes != tensor.nbytes:
                raise WeightsError(f"{key} changed its size while {path} was written")
            file.write(array.reshape(-1).view(np.uint8).data)
            on_write(key, array.nbytes)
