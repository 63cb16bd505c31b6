"""SHA-256 of the parameters that an adapter needs and does not hold, tensor by tensor.

A tensor is one layer of a stacked parameter, `decoder/layers/attn/q/kernel[3]`, or a whole one. Its
digest does not depend on the dtype that it happens to be stored or loaded in: it is that of the
values in bfloat16 and, where float32 holds more of them, in float32 too.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import ml_dtypes
import numpy as np

from wings_jax import distributed
from wings_jax.weights.tensors import LazyTensor

STACKED = "/layers/"


@dataclasses.dataclass(frozen=True)
class TensorDigest:
    """The digest of one tensor."""

    shape: tuple[int, ...]
    """Sizes of the tensor's dimensions."""
    bfloat16: str
    """SHA-256, in hexadecimal, of the values rounded to bfloat16."""
    float32: str | None = None
    """SHA-256 of the values in float32; None where bfloat16 holds them all exactly."""

    def is_same(self, other: TensorDigest) -> bool:
        """Returns whether two digests are of the same values, in the lower precision of the two."""
        if self.shape != other.shape:
            return False
        if self.float32 and other.float32:
            return self.float32 == other.float32
        return self.bfloat16 == other.bfloat16


def split_tensors(flat: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Returns name -> tensor of flat parameters; stacked ones, [L, ...], become L tensors."""
    tensors = {}
    for path, array in flat.items():
        # One digest per layer, whether a checkpoint stacks its layers or not.
        if STACKED not in path:
            tensors[path] = _lazy(array, array.shape, ())
            continue
        for layer in range(array.shape[0]):
            tensors[f"{path}[{layer}]"] = _lazy(array, array.shape[1:], (layer,))
    return tensors


def layer_tensors(path: str, layers: Sequence[Any]) -> Iterator[tuple[str, LazyTensor]]:
    """Yields name and tensor of a parameter whose layers are separate arrays."""
    for layer, array in enumerate(layers):
        yield f"{path}[{layer}]", _lazy(array, array.shape, ())


def _lazy(array: Any, shape: Sequence[int], index: tuple[int, ...]) -> LazyTensor:
    # Sliced on the device: only one layer at a time is copied to the host.
    def load() -> np.ndarray:
        return distributed.fetch(array[index] if index else array)

    return LazyTensor(tuple(shape), np.dtype(array.dtype), load)


def digest_tensors(tensors: Mapping[str, LazyTensor]) -> dict[str, TensorDigest]:
    """Returns the digest of each tensor, in the same order.

    Hashing releases Python's lock, so several tensors are hashed at once; not where they are on
    several hosts, which have to fetch them in the same order.
    """
    if not distributed.is_alone():
        return {name: digest_array(np.asarray(tensor)) for name, tensor in tensors.items()}
    with futures.ThreadPoolExecutor() as pool:
        digests = pool.map(lambda tensor: digest_array(np.asarray(tensor)), tensors.values())
        return dict(zip(tensors, digests, strict=True))


def digest_array(array: np.ndarray) -> TensorDigest:
    """Returns the digest of an array of floating-point numbers.

    >>> one = digest_array(np.array([0.5, 3.0], np.float32))
    >>> one == digest_array(np.array([0.5, 3.0], ml_dtypes.bfloat16)), one.float32
    (True, None)
    """
    shape = tuple(array.shape)
    if array.dtype == ml_dtypes.bfloat16:
        return TensorDigest(shape, _sha256(array))

    # The lower 16 bits of a float32 are what bfloat16 does not have.
    exact = np.ascontiguousarray(array, np.float32)
    rounded = _sha256(exact.astype(ml_dtypes.bfloat16))
    has_more = bool(np.any(exact.view(np.uint32) & 0xFFFF))
    return TensorDigest(shape, rounded, _sha256(exact) if has_more else None)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
