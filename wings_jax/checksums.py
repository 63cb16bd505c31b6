"""Checksums of arrays, which do not depend on how an array is sharded.

The checksum of an array is a sum over its elements, so each device adds up its own shard:

    checksum = sum_i mix(bits_i ^ (i * 0x9E3779B9))  mod 2^32

`bits_i` are the bits of element i in row-major order, and `mix` is the finalizer of MurmurHash3, a
bijection of 32 bits. A change of one element always changes the sum; a change of more is missed
with probability 2^-32. This finds damaged files, it is no protection against an attacker.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SPREAD = np.uint32(0x9E3779B9)  # odd, so that no two indices of 32 bits become the same
_CHUNK = 1 << 16  # elements that numpy works on at a time; they stay in the processor's cache
_SPREAD_INDEX = np.arange(_CHUNK, dtype=np.uint32) * _SPREAD

# Checksum of an array by the dtype that it may be loaded in.
Checksums = dict[str, int]


def checksum_arrays(arrays: Mapping[str, Any]) -> dict[str, Checksums]:
    """Returns the checksums of each array.

    A f32 array has two, as bfloat16 too: inference loads it in that dtype.

    >>> checksum_arrays({"a": np.arange(3, dtype=np.float32)})
    {'a': {'float32': 4013119933, 'bfloat16': 2140118262}}
    """
    # Named by path and dtype, so that one call computes all of them.
    versions = {
        f"{path}:{dtype}": (array, dtype)
        for path, array in arrays.items()
        for dtype in _dtypes(str(array.dtype))
    }

    sums = _checksum_versions(versions)
    return {
        path: {dtype: sums[f"{path}:{dtype}"] for dtype in _dtypes(str(array.dtype))}
        for path, array in arrays.items()
    }


def find_damaged(arrays: Mapping[str, Any], saved: Mapping[str, Checksums]) -> list[str]:
    """Returns the paths of arrays whose values are not those that were saved.

    An array that has no checksum, or a dtype in which none can be computed, is not checked.
    """
    checked = {}
    for path, array in arrays.items():
        # bf16 -> f32 is exact, and so is the way back.
        for dtype in (str(array.dtype), "bfloat16"):
            if dtype in saved.get(path, {}):
                checked[path] = (array, dtype)
                break

    sums = _checksum_versions(checked)
    return [path for path, (_, dtype) in checked.items() if sums[path] != saved[path][dtype]]


def _dtypes(dtype: str) -> tuple[str, ...]:
    return ("float32", "bfloat16") if dtype == "float32" else (dtype,)


def _checksum_versions(versions: Mapping[str, tuple[Any, str]]) -> dict[str, int]:
    """Returns the checksum of each (array, dtype), the array cast to the dtype."""
    on_host, on_device = {}, {}
    for name, (array, dtype) in versions.items():
        # Arrays of several hosts or on an accelerator are summed where they are.
        is_local = not isinstance(array, jax.Array) or array.is_fully_addressable
        if is_local and (not isinstance(array, jax.Array) or jax.default_backend() == "cpu"):
            on_host[name] = checksum_numpy(np.asarray(array), dtype)
        else:
            on_device[name] = (array, dtype)

    if on_device:
        dtypes = tuple((name, dtype) for name, (_, dtype) in on_device.items())
        arrays = {name: array for name, (array, _) in on_device.items()}
        sums = jax.device_get(_checksum_jax(arrays, dtypes))
        on_host |= {name: int(value) for name, value in sums.items()}
    return on_host


@functools.partial(jax.jit, static_argnums=1)
def _checksum_jax(
    arrays: dict[str, jax.Array], dtypes: tuple[tuple[str, str], ...]
) -> dict[str, jax.Array]:
    """Returns u32[] checksums of arrays on any mesh."""
    sums = {}
    for name, dtype in dtypes:
        # The bits as unsigned integers, whatever the dtype.
        array = arrays[name].astype(dtype)
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)

        # Row-major index, one term per axis, so that no axis has to be merged with another.
        index = jnp.zeros(array.shape, jnp.uint32)
        stride = 1
        for axis in reversed(range(array.ndim)):
            position = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
            index = index + position * jnp.uint32(stride % 2**32)
            stride *= array.shape[axis]
        sums[name] = _mix(bits ^ (index * _SPREAD)).sum(dtype=jnp.uint32)
    return sums


def checksum_numpy(array: np.ndarray, dtype: str) -> int:
    """Returns the checksum of a host array as `dtype`."""
    flat = np.ascontiguousarray(array).reshape(-1)
    total = 0
    for start in range(0, flat.size, _CHUNK):
        # The part is cast, not the array: memory stays at one part.
        part = flat[start : start + _CHUNK].astype(jnp.dtype(dtype), copy=False)
        bits = part.view(f"uint{8 * part.dtype.itemsize}").astype(np.uint32)

        # The index of the first element, spread as all indices are.
        first = np.uint32(start * int(_SPREAD) % 2**32)
        bits ^= _SPREAD_INDEX[: part.size] + first

        total += int(_mix(bits).sum(dtype=np.uint64))
    return total % 2**32


def _mix(x: Any) -> Any:
    """Returns MurmurHash3's finalizer of u32[...]; a numpy array is overwritten."""
    x ^= x >> 16
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> 16
    return x
