"""Copies with another order of dimensions, and parameters that are read one at a time."""

from __future__ import annotations

import itertools

import inference_cases as cases
import ml_dtypes
import numpy as np
import pytest

from wings_jax import checkpoint
from wings_jax.weights import copies, exports, stored_params
from wings_jax.weights.tensors import WeightsError, check_finite

DTYPES = (np.float32, ml_dtypes.bfloat16, np.int64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 50), (3, 17, 70), (2, 5, 3, 19), (7,)])
def test_copy_into_equals_numpys_copy(shape, dtype):
    """Every order of dimensions, also where the target has another dtype or is a strided view."""
    array = np.random.default_rng(0).integers(-99, 99, shape).astype(dtype)
    for order in itertools.permutations(range(array.ndim)):
        source = array.transpose(order)
        for target_dtype in (dtype, np.float32):
            target = np.zeros(source.shape, target_dtype)
            copies.copy_into(target, source)
            np.testing.assert_array_equal(target, source.astype(target_dtype))
        wide = np.zeros((*source.shape[:-1], 2 * source.shape[-1]), dtype)
        copies.copy_into(wide[..., ::2], source)
        np.testing.assert_array_equal(wide[..., ::2], source)


def test_the_orders_of_rules_are_matrices():
    """(N, H, D) -> (D, N, H) and (D, N, H) -> (N, H, D) take the fast way."""
    array = np.zeros((4, 5, 6))
    assert copies._as_transposed_matrix(array.transpose(2, 0, 1)).shape == (20, 6)
    assert copies._as_transposed_matrix(array.transpose(1, 2, 0)).shape == (4, 30)
    assert copies._as_transposed_matrix(array.transpose(1, 0, 2)) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_a_value_that_is_not_finite_is_found_anywhere(dtype, bad):
    array = np.ones((3, 200_000), dtype)
    check_finite("key", array, "file")
    for index in ((0, 0), (1, 131_072), (2, 199_999)):
        damaged = array.copy()
        damaged[index] = bad
        with pytest.raises(WeightsError, match="key of file holds NaN or infinity"):
            check_finite("key", damaged, "file")


def test_stored_params_are_those_of_the_step(tmp_path):
    """Whole, by layer, and with LoRA merged, which is computed layer by layer."""
    step = checkpoint.find_step(cases.write_checkpoint(tmp_path, "lora"), flag="")
    eager = {path: np.asarray(array) for path, array in checkpoint.read_params(step).items()}
    lazy = stored_params.open_params(step)
    assert lazy.keys() == eager.keys()
    for path, array in eager.items():
        assert (lazy[path].shape, lazy[path].dtype) == (array.shape, array.dtype)
        assert lazy[path].nbytes == array.nbytes
        np.testing.assert_array_equal(np.asarray(lazy[path]), array)
        np.testing.assert_array_equal(lazy[path][0], array[0])

    arch = cases.ARCHS["lora"]
    merged = exports.merge_lora(lazy, arch)
    path = "decoder/layers/attn/q/kernel"
    a, b = (eager[f"decoder/layers/attn/q/{half}"] for half in ("a", "b"))
    update = np.einsum("LDR,LRNH->LDNH", a, b) * arch.lora_alpha / arch.lora_rank
    np.testing.assert_allclose(np.asarray(merged[path]), eager[path] + update, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(merged[path])[1], merged[path][1])
    assert "decoder/layers/attn/q/a" not in merged
