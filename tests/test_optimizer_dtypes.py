"""The first moment and the sum of micro-batches in bfloat16: dtypes, memory, resumption."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_flops
import training_cases as cases

from wings_jax import checkpoint
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import projection
from wings_jax.planning import compiled, memory, targets
from wings_jax.training import program
from wings_jax.weights import starting

BFLOAT16 = {
    "optimizer__moment_dtype": "bfloat16",
    "optimizer__accumulation_dtype": "bfloat16",
    "optimizer__accumulation": 2,
}


def state_bytes(**changes) -> tuple[memory.StateBytes, list]:
    """Returns the planned bytes of one device, and the leaves of the optimizer's state."""
    config = config_lib.from_config_dict(cases.tree_of("stage2", **changes))
    target = targets.open_devices(1, "", 0)
    config = compiled.resolve_config(config, target)
    arch = starting.resolve_arch(config.model)
    state, mesh, _ = compiled.abstract_step(config, arch, target)
    batch = program.abstract_batch(config, arch, mesh)
    return memory.count_state(state, batch, config, arch), jax.tree.leaves(state.opt_state)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_first_moment_is_half_as_large_and_the_second_stays_float32(name):
    whole, before = state_bytes(optimizer__name=name)
    half, after = state_bytes(optimizer__name=name, optimizer__moment_dtype="bfloat16")
    assert whole.optimizer - half.optimizer == whole.trained // 2
    assert {x.dtype.name for x in before} == {"float32", "int32"}

    # Muon has no second moment of matrices.
    first, second = (
        sum(x.size for x in after if x.dtype == dtype) for dtype in (jnp.bfloat16, jnp.float32)
    )
    parameters = whole.trained // 4
    assert first == parameters
    assert second == parameters if name == "adamw" else second < parameters


def test_sum_of_micro_batches_is_planned_as_it_is_stored():
    one, _ = state_bytes()
    whole, _ = state_bytes(optimizer__accumulation=2)
    half, _ = state_bytes(**BFLOAT16)
    assert one.gradients == one.trained
    assert (whole.gradients, half.gradients) == (2 * one.trained, 3 * one.trained // 2)


@pytest.mark.slow
def test_sum_of_micro_batches_is_in_the_program_as_planned():
    """Its dtype changes the temporaries by what is planned; more micro-batches do not."""
    arch = test_flops.arch(("visual", "textual"))
    # Mostly parameters: a row has few slots.
    decoder = dataclasses.replace(arch.decoder, vocab_size=4096, ffn_size=1024)
    arch = dataclasses.replace(arch, decoder=decoder)
    target = targets.open_devices(1, "", 0)
    changes = {"data__images_per_row": 0, "data__sequence_length": 32, "loss_chunk": 32}
    changes |= {"optimizer__name": "adamw", "remat": "full", "attention": "einsum"}

    def compile_with(count: int, dtype: str) -> tuple[int, int]:
        accumulation = {"optimizer__accumulation": count, "optimizer__accumulation_dtype": dtype}
        tree = cases.tree_of("stage2", batch_size=count, **changes, **accumulation)
        config = compiled.resolve_config(config_lib.from_config_dict(tree), target)
        state, mesh, _ = compiled.abstract_step(config, arch, target)
        batch = program.abstract_batch(config, arch, mesh)
        planned = memory.count_state(state, batch, config, arch).gradients
        return compiled.compile_step(config, arch, target).temporaries, planned

    (half, half_planned), (two, planned) = (compile_with(2, x) for x in ("bfloat16", "float32"))
    assert two - half == pytest.approx(planned - half_planned, rel=0.05)
    assert two > planned
    assert compile_with(4, "float32")[0] == pytest.approx(two, rel=0.01)


def test_bfloat16_state_resumes_bitwise_and_is_near_float32(tmp_path):
    cases.run(tmp_path / "float32", steps=4, optimizer__accumulation=2)
    options = {"steps": 4, "checkpoint_every": 2, **BFLOAT16}
    finished = cases.run(tmp_path / "whole", **options)

    # The same workdir without its last checkpoint is that of a run that was killed at step 3.
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(checkpoint.newest_step(tmp_path / "resumed"))
    assert checkpoint.newest_step(tmp_path / "resumed").name == "2"
    resumed = cases.run(tmp_path / "resumed", **options)

    assert cases.losses(tmp_path / "resumed") == cases.losses(tmp_path / "whole")
    for new, old in zip(*map(jax.tree.leaves, (resumed.state, finished.state)), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old))

    # Rounded, but the same training.
    exact, rounded = cases.losses(tmp_path / "float32"), cases.losses(tmp_path / "whole")
    assert exact[0] == rounded[0]
    assert exact != rounded
    np.testing.assert_allclose(rounded, exact, rtol=2e-3)


@pytest.mark.parametrize("key", ["moment_dtype", "accumulation_dtype"])
def test_other_dtypes_are_named(key):
    tree = cases.tree_of("stage2", **{f"optimizer__{key}": "float16"})
    with pytest.raises(UserError, match=f"config.optimizer.{key}: 'float16' is not one of"):
        config_lib.from_config_dict(tree)


def test_layers_are_cast_bit_for_bit():
    """Rounding before the cast changes nothing: 6 million patterns, all exponents and signs."""
    patterns = np.arange(0, 2**32, 701, dtype=np.uint64).astype(np.uint32).view(np.float32)
    patterns = patterns[~np.isnan(patterns)]
    kernel = jnp.asarray(patterns)
    ours = jax.jit(projection._cast_layer, static_argnums=1)(kernel, jnp.dtype(jnp.bfloat16))
    expected = kernel.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        np.asarray(ours).view(np.uint16), np.asarray(expected).view(np.uint16)
    )
