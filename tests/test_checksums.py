"""Checksums of arrays: the same wherever they are computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wings_jax import axes, checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8"])
def test_checksum_is_the_same_on_every_mesh(dtype):
    values = np.random.default_rng(0).normal(0, 50, (8, 24, 3)).astype(jnp.dtype(dtype))
    mesh = axes.make_mesh({"data": 2, "fsdp": 4})
    spec = jax.sharding.PartitionSpec("fsdp", "data")
    sharded = jax.device_put(values, jax.sharding.NamedSharding(mesh, spec))
    on_mesh = int(checksums._checksum_jax({"a": sharded}, (("a", dtype),))["a"])
    assert on_mesh == checksums.checksum_numpy(values, (dtype,))[0]
    for i in (0, 5, 301):
        changed = values.copy().reshape(-1)
        changed.view(np.uint8)[i] ^= 1
        assert checksums.checksum_numpy(changed, (dtype,))[0] != on_mesh
    swapped = values.reshape(-1)[::-1]
    assert checksums.checksum_numpy(swapped, (dtype,))[0] != on_mesh


def test_checksum_of_whole_blocks_is_that_of_their_elements(monkeypatch):
    """Compiled blocks and the rest, in one pass for both dtypes, also while a mesh is set."""
    values = np.random.default_rng(0).normal(0, 50, 1000).astype(np.float32)
    dtypes = ("float32", "bfloat16")
    expected = checksums.checksum_numpy(values, dtypes)
    monkeypatch.setattr(checksums, "_BLOCKS", (256, 64))
    with jax.set_mesh(axes.make_mesh({"data": 8})):
        assert checksums.checksum_numpy(values, dtypes) == expected
    values[300] = np.nextafter(values[300], np.inf)
    assert checksums.checksum_numpy(values, dtypes)[0] != expected[0]


def test_checksum_of_any_bits_is_that_without_compiled_blocks(monkeypatch):
    """Blocks of the real sizes, of several arrays at once: also subnormal, infinite, NaN values."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (2, sum(checksums._BLOCKS) + 5), dtype=np.uint32)
    bits[:, :1000] &= np.uint32(0x807FFFFF)
    bits[:, 1000:2000] |= np.uint32(0x7F800000)
    arrays = {"a": bits[0].view(np.float32), "b": bits[1].view(np.float32)}
    compiled = checksums.checksum_arrays(arrays)
    monkeypatch.setattr(checksums, "_BLOCKS", ())
    with np.errstate(invalid="ignore"):
        assert checksums.checksum_arrays(arrays) == compiled
