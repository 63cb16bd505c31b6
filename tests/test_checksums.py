"""Checksums of arrays: the same wherever they are computed, and of what is saved."""

from __future__ import annotations

import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wings_jax import axes, checkpoint, checkpoint_items, checksums
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import presets
from wings_jax.training import writer


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


def open_writer(workdir: pathlib.Path) -> writer.CheckpointWriter:
    arch = presets.WingsArch(presets.DECODERS["qwen1_5_0_5b"], presets.VISION["siglip_base_224"])
    return writer.CheckpointWriter(workdir, config_lib.Config(), arch, {}, max_checkpoints=1)


def test_checksums_are_of_the_saved_values_while_training_goes_on(tmp_path, monkeypatch):
    """They are computed late, when updates have been given the memory of the arrays."""
    is_trained = threading.Event()
    start_sums = checksums._start_sums

    def wait(*arguments):
        assert is_trained.wait(60)
        return start_sums(*arguments)

    values = {"a": np.arange(300_000, dtype=np.float32), "b": np.full(4, 0.5, np.float32)}
    expected = checksums.checksum_arrays(values)
    monkeypatch.setattr(checksums, "_start_sums", wait)
    update = jax.jit(lambda arrays: jax.tree.map(lambda x: x + 1, arrays), donate_argnums=0)
    trained, opt_state, alone = ({key: jnp.array(x) for key, x in values.items()} for _ in "123")
    with open_writer(tmp_path) as opened:
        finish = checksums.start_checksums(alone)
        opened.save(1, trained, opt_state)
        for _ in range(3):
            trained, opt_state, alone = update((trained, opt_state, alone))
        assert float(trained["b"][0]) == 3.5
        assert not checkpoint.list_steps(tmp_path)
        is_trained.set()

    assert finish() == expected
    saved = checkpoint_items.read_checksums(checkpoint.find_step(tmp_path, flag="--checkpoint"))
    assert saved["params"] == expected
    assert saved["opt_state"] == {key: {"float32": expected[key]["float32"]} for key in values}
    assert checkpoint.verify_step(tmp_path / "checkpoints/1") == 4


def test_step_without_checksums_is_not_completed(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no sums today")

    monkeypatch.setattr(checksums, "_start_sums", fail)
    error = pytest.raises(UserError, match="cannot be written: no sums today")
    with error, open_writer(tmp_path) as opened:
        opened.save(1, {"decoder/a": jnp.ones(3)}, {"mu": jnp.ones(3)})
    assert not checkpoint.list_steps(tmp_path)
