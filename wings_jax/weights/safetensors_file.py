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
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from wings_jax import files
from wings_jax.weights import text_files
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
MAX_DIMENSIONS = 16
METADATA = "__metadata__"  # the header's one entry that is not a tensor


def open_safetensors(path: pathlib.Path) -> TensorMap:
    """Returns the tensors of one file, unread.

    Raises:
      WeightsError: not a safetensors file, damaged, or shorter than its header requires.
    """
    header, data_start = _read_header(path)
    size = path.stat().st_size
    return {
        key: _open_entry(path, key, entry, data_start=data_start, size=size)
        for key, entry in header.items()
        if key != METADATA
    }


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """Returns the metadata of a file, name -> text. Raises as `open_safetensors`."""
    metadata = _read_header(path)[0].get(METADATA, {})
    if not isinstance(metadata, dict):
        raise WeightsError(f"{path} has a damaged header: {METADATA} is not an object")
    return {name: text for name, text in metadata.items() if isinstance(text, str)}


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """Returns the header of a file, and where its data begins."""
    text_files.check_not_pointer(path)
    size = path.stat().st_size
    # The file begins with the length of its header in 8 bytes, then the header as JSON.
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise WeightsError(f"{path} is not a safetensors file, or is cut short")
        content = file.read(length)

    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has a header that is not JSON") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path} has a header that is not a JSON object")
    return header, 8 + length


def _open_entry(
    path: pathlib.Path, key: str, entry: Any, *, data_start: int, size: int
) -> LazyTensor:
    """Returns one tensor of the header, after checking that the file holds its bytes."""
    # Everything in the header is checked, as a file may be damaged or made up.
    if not key.isprintable():
        raise WeightsError(f"{path} has a damaged header: {key[:40]!a} is not a key")
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise WeightsError(f"{path} has a damaged header: {key} has no dtype")

    shape = _whole_numbers(entry.get("shape"))
    offsets = _whole_numbers(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise WeightsError(f"{path} has a damaged header: {key} has no shape or no offsets")

    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        is_quantized = entry["dtype"].startswith(("F8", "F6", "F4"))
        what = "a quantized tensor" if is_quantized else "not supported"
        raise WeightsError(f"{key} in {path} has dtype {entry['dtype'][:20]!a}: {what}")

    # The bytes must lie in the file and be as many as the shape needs.
    begin, end = offsets
    if data_start + end > size:
        raise WeightsError(f"{path} is cut short: {key} ends past the end of the file")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise WeightsError(f"{key} in {path}: shape {list(shape)} does not fit its bytes")

    load = _tensor_reader(path, dtype, shape, data_start + begin)
    return LazyTensor(shape, dtype, load, str(path))


def _whole_numbers(value: Any) -> tuple[int, ...] | None:
    """Returns a short list of numbers from 0 as a tuple; None for anything else."""
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return None
    if any(type(item) is not int or not 0 <= item < 2**63 for item in value):
        return None
    return tuple(value)


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
    *,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes one file atomically, tensor by tensor, with `metadata` in its header.

    Raises:
      UserError: the file cannot be written.
      WeightsError: a tensor's array has another size than the tensor's shape and dtype.
    """
    # All offsets are known before the first tensor is read.
    path = pathlib.Path(path)
    header: dict[str, Any] = {METADATA: {"format": "pt", **metadata}}
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
        for key, tensor, array in _computed_ahead(tensors):
            if array.nbytes != tensor.nbytes:
                raise WeightsError(f"{key} changed its size while {path} was written")
            file.write(array.reshape(-1).view(np.uint8).data)
            on_write(key, array.nbytes)


def _computed_ahead(
    tensors: Mapping[str, LazyTensor],
) -> Iterator[tuple[str, LazyTensor, np.ndarray]]:
    """Yields key, tensor and its contiguous array; the next one is computed meanwhile."""

    def load(tensor: LazyTensor) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(tensor))

    with futures.ThreadPoolExecutor(1) as pool:
        # One tensor is computed while the one before it is written.
        waiting: list[tuple[str, LazyTensor, futures.Future]] = []
        for key, tensor in tensors.items():
            waiting.append((key, tensor, pool.submit(load, tensor)))
            if len(waiting) > 1:
                first_key, first, job = waiting.pop(0)
                yield first_key, first, job.result()
        for last_key, last, job in waiting:
            yield last_key, last, job.result()
