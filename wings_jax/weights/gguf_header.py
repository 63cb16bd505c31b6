"""The header of a GGUF file: metadata fields and the list of tensors, read with bounds checks.

The reader of the `gguf` package trusts every count in the file, so that a damaged one can make it
run without end. Here all lengths are checked against the file's size before anything is read.
The format: magic, version, counts of tensors and fields; the fields (key, type, value); the
tensors (name, dimensions, type, offset); then the data, aligned.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from typing import Any

import numpy as np

from wings_jax.weights.tensors import WeightsError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Type number of a field -> little-endian dtype; 8 is a string, 9 an array.
SCALARS: dict[int, np.dtype] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 8


@dataclasses.dataclass(frozen=True)
class GgufEntry:
    """One tensor of the file, its data not read.

    name       of the tensor
    shape      slowest dimension first, as numpy orders them (the file has it reversed)
    type_id    number of its quantization type
    offset     of its first byte, from the beginning of the data
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """What precedes the data of a GGUF file.

    fields       key -> number, bool, string, or list of these
    entries      the tensors
    data_start   position of the first byte of data
    file_size    bytes of the whole file
    """

    fields: dict[str, Any]
    entries: list[GgufEntry]
    data_start: int
    file_size: int


class _Cursor:
    """Reads values one after the other; never past the end."""

    def __init__(self, data: mmap.mmap | bytes):
        self.data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise WeightsError("cut short")
        part = self.data[self.position : end]
        self.position = end
        return part

    def u32(self) -> int:
        return struct.unpack("<I", self.take(4))[0]

    def u64(self) -> int:
        return struct.unpack("<Q", self.take(8))[0]

    def string(self) -> str:
        try:
            return self.take(self.u64()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise WeightsError("damaged: a text in it is not UTF-8") from error

    def count(self, smallest: int) -> int:
        """Returns a number of items that each take at least `smallest` bytes."""
        number = self.u64()
        if number * smallest > len(self.data) - self.position:
            raise WeightsError("cut short")
        return number


def read_header(path: str | os.PathLike) -> GgufHeader:
    """Returns the header of a GGUF file.

    Raises:
      WeightsError: the file is not GGUF, of another version, damaged or cut short.
    """
    try:
        # 24 bytes: the magic number, the version, and the numbers of tensors and fields.
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24 or file.read(4) != MAGIC:
                raise WeightsError(f"{path} is not a GGUF file, or is cut short")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse_header(data)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    except WeightsError as error:
        if str(path) in str(error):
            raise
        raise WeightsError(f"{path} is not a GGUF file, or is {error}") from error


def _parse_header(data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(data)
    cursor.take(len(MAGIC))
    version = cursor.u32()
    if version not in VERSIONS:
        raise WeightsError(f"of version {version}, not one of {VERSIONS}")

    # A tensor takes at least 8 + 4 + 4 + 8 bytes, a field 8 + 4 + 1.
    tensor_count = cursor.count(24)
    fields = {}
    for _ in range(cursor.count(13)):
        key = cursor.string()
        fields[key] = _parse_value(cursor, cursor.u32())

    entries = [_parse_entry(cursor) for _ in range(tensor_count)]

    # The data begins at the next multiple of the alignment.
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise WeightsError(f"damaged: general.alignment is {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    return GgufHeader(fields, entries, data_start, len(data))


def _parse_value(cursor: _Cursor, type_id: int) -> Any:
    """Returns a field's value."""
    if type_id in SCALARS:
        dtype = SCALARS[type_id]
        return np.frombuffer(cursor.take(dtype.itemsize), dtype)[0].item()
    if type_id == STRING:
        return cursor.string()
    if type_id != ARRAY:
        raise WeightsError(f"damaged: field type {type_id}")

    item_type = cursor.u32()
    if item_type == STRING:
        return [cursor.string() for _ in range(cursor.count(8))]
    if item_type not in SCALARS:
        raise WeightsError(f"damaged: array of type {item_type}")

    # Numbers are read at once: a vocabulary has more than 100,000 scores.
    dtype = SCALARS[item_type]
    count = cursor.count(dtype.itemsize)
    return np.frombuffer(cursor.take(count * dtype.itemsize), dtype).tolist()


def _parse_entry(cursor: _Cursor) -> GgufEntry:
    """Returns one line of the list of tensors."""
    name = cursor.string()
    dimensions = cursor.u32()
    if dimensions > MAX_DIMENSIONS:
        raise WeightsError(f"damaged: a tensor with {dimensions} dimensions")

    # The file lists the fastest dimension first.
    sizes = [cursor.u64() for _ in range(dimensions)]
    # A product beyond this limit can only come from a damaged file.
    if math.prod(sizes) > 2**48:
        raise WeightsError(f"damaged: a tensor of shape {sizes}")
    return GgufEntry(name, tuple(reversed(sizes)), cursor.u32(), cursor.u64())
