"""Checksums of arrays, which do not depend on how an array is sharded.

The checksum of an array is a sum over its elements, so each device adds up its own shard:

    checksum = sum_i mix(bits_i ^ (i * 0x9E3779B9))  mod 2^32

`bits_i` are the bits of element i in row-major order, and `mix` is the finalizer of MurmurHash3, a
bijection of 32 bits. A change of one element always changes the sum; a change of more is missed
with probability 2^-32. This finds damaged files, it is no protection against an attacker.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SPREAD = np.uint32(0x9E3779B9)  # odd, so that no two indices of 32 bits become the same
_CHUNK = 1 << 16  # elements that numpy works on at a time; they stay in the processor's cache
# Elements of an array on a CPU that are summed by one call of compiled code, as long as there are
# so many left. Few sizes, as each one is compiled. Their slices begin in different sets of the
# processor's cache, which slices of a power of two do not: they would evict each other.
_BLOCKS = (32 * (65536 - 48), 32 * (8192 - 48))
_SPREAD_INDEX = np.arange(_CHUNK, dtype=np.uint32) * _SPREAD

_SLICES = 32  # of a block, which are added to each other; 64 are slower

# Checksum of an array by the dtype that it may be loaded in.
Checksums = dict[str, int]


def checksum_arrays(arrays: Mapping[str, Any], *, is_cast: bool = True) -> dict[str, Checksums]:
    """Returns the checksums of each array.

    With `is_cast` a f32 array has two, as bfloat16 too: inference loads parameters in that dtype.

    >>> checksum_arrays({"a": np.arange(3, dtype=np.float32)})
    {'a': {'float32': 4013119933, 'bfloat16': 2140118262}}
    """
    # Named by path and dtype, so that one call computes all of them.
    versions = {
        f"{path}:{dtype}": (array, dtype)
        for path, array in arrays.items()
        for dtype in _dtypes(str(array.dtype), is_cast)
    }

    sums = _checksum_versions(versions)
    return {
        path: {dtype: sums[f"{path}:{dtype}"] for dtype in _dtypes(str(array.dtype), is_cast)}
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


def digest_json(content: Any) -> str:
    """Returns a short hash of what JSON can hold; tuples are lists, and the order of keys is free.

    >>> digest_json({"a": (1, 2.5), "b": "é"}) == digest_json({"b": "é", "a": [1, 2.5]})
    True
    """
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _dtypes(dtype: str, is_cast: bool) -> tuple[str, ...]:
    return ("float32", "bfloat16") if dtype == "float32" and is_cast else (dtype,)


def _checksum_versions(versions: Mapping[str, tuple[Any, str]]) -> dict[str, int]:
    """Returns the checksum of each (array, dtype), the array cast to the dtype."""
    on_device: dict[str, tuple[Any, str]] = {}
    # id of an array -> the array and name -> dtype: all its versions are computed in one pass.
    on_host: dict[int, tuple[Any, dict[str, str]]] = {}
    for name, (array, dtype) in versions.items():
        # Arrays of several hosts or on an accelerator are summed where they are.
        is_local = not isinstance(array, jax.Array) or array.is_fully_addressable
        if is_local and (not isinstance(array, jax.Array) or jax.default_backend() == "cpu"):
            on_host.setdefault(id(array), (array, {}))[1][name] = dtype
        else:
            on_device[name] = (array, dtype)

    # All are started before the first is waited for: the processor's threads are never idle.
    started = [
        _start_sums(np.asarray(array), tuple(dtypes.values())) for array, dtypes in on_host.values()
    ]
    sums: dict[str, int] = {}
    for (_, dtypes), parts in zip(on_host.values(), started, strict=True):
        sums |= dict(zip(dtypes, _finish_sums(parts), strict=True))

    if on_device:
        chosen = tuple((name, dtype) for name, (_, dtype) in on_device.items())
        arrays = {name: array for name, (array, _) in on_device.items()}
        fetched = jax.device_get(_checksum_jax(arrays, chosen))
        sums |= {name: int(value) for name, value in fetched.items()}
    return sums


@functools.partial(jax.jit, static_argnums=1)
def _checksum_jax(
    arrays: dict[str, jax.Array], dtypes: tuple[tuple[str, str], ...]
) -> dict[str, jax.Array]:
    """Returns u32[] checksums of arrays on any mesh."""
    sums = {}
    for name, dtype in dtypes:
        # Row-major index, one term per axis, so that no axis has to be merged with another.
        array = arrays[name]
        index = jnp.zeros(array.shape, jnp.uint32)
        stride = 1
        for axis in reversed(range(array.ndim)):
            position = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
            index = index + position * jnp.uint32(stride % 2**32)
            stride *= array.shape[axis]
        sums[name] = _mix_array(array, dtype, index).sum(dtype=jnp.uint32)
    return sums


def _mix_array(array: jax.Array, dtype: str, index: jax.Array) -> jax.Array:
    """Returns the terms u32[...] of an array cast to `dtype`; `index` numbers its elements."""
    # The bits as unsigned integers, whatever the dtype.
    cast = array.astype(dtype)
    unsigned = jnp.dtype(f"uint{8 * cast.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(cast, unsigned).astype(jnp.uint32)
    return _mix(bits ^ (index * _SPREAD))


def checksum_numpy(array: np.ndarray, dtypes: tuple[str, ...]) -> list[int]:
    """Returns the checksums of a host array, cast to each of the dtypes."""
    return _finish_sums(_start_sums(array, dtypes))


def _start_sums(array: np.ndarray, dtypes: tuple[str, ...]) -> list[list[Any]]:
    """Starts to sum a host array; returns parts of the sum of each dtype, for `_finish_sums`."""
    flat = np.ascontiguousarray(array).reshape(-1)

    # Whole blocks are compiled, where that runs on this processor; the rest is numpy's.
    blocks, done = [], 0
    sizes = _BLOCKS if jax.default_backend() == "cpu" else ()
    # On one device also where a mesh of virtual devices is set: each would compute the same.
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.local_devices()[:1]), ("data",))):
        for size in sizes:
            while flat.size - done >= size:
                part = flat[done : done + size]
                blocks.append(_sum_block(part, np.uint32(done % 2**32), dtypes))
                done += size
    return [
        [_sum_numpy(flat, dtype, done), *(sums[number] for sums in blocks)]
        for number, dtype in enumerate(dtypes)
    ]


def _finish_sums(parts: list[list[Any]]) -> list[int]:
    return [sum(int(part) for part in own) % 2**32 for own in parts]


@functools.partial(jax.jit, static_argnums=2)
def _sum_block(part: jax.Array, first: jax.Array, dtypes: tuple[str, ...]) -> list[jax.Array]:
    """Returns u32[] checksums of a part of an array, cast to each dtype.

    XLA adds slices in vector registers, which takes a third of the time of its `reduce` on a CPU.

    Args:
      first: u32[], the index of its first element.
    """
    width = part.shape[0] // _SLICES
    index = jax.lax.iota(jnp.uint32, width) + first

    sums = [jnp.zeros(width, jnp.uint32) for _ in dtypes]
    for start in range(0, part.shape[0], width):
        own, own_index = part[start : start + width], index + np.uint32(start)
        terms = [_mix_array(own, dtype, own_index) for dtype in dtypes]
        sums = [total + term for total, term in zip(sums, terms, strict=True)]
    return [total.sum(dtype=jnp.uint32) for total in sums]


def _sum_numpy(flat: np.ndarray, dtype: str, start: int) -> int:
    """Returns the checksum, without its remainder, of the elements from `start` on."""
    total = 0
    for first in range(start, flat.size, _CHUNK):
        # The part is cast, not the array: memory stays at one part.
        part = flat[first : first + _CHUNK].astype(jnp.dtype(dtype), copy=False)
        bits = part.view(f"uint{8 * part.dtype.itemsize}").astype(np.uint32)

        # The index of the first element, spread as all indices are.
        bits ^= _SPREAD_INDEX[: part.size] + np.uint32(first * int(_SPREAD) % 2**32)
        total += int(np.add.reduce(_mix(bits), dtype=np.uint32))
    return total


def _mix(x: Any) -> Any:
    """Returns MurmurHash3's finalizer of u32[...]; a numpy array is overwritten."""
    x ^= x >> 16
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> 16
    return x
