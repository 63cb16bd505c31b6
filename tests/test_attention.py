"""Attention kernels: all equal the reference, and the chunked one never holds a T x S matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wings_jax.model import attention, flash, layout
from wings_jax.model.kernels import choice

B, T, H, C = 2, 70, 8, 3


def make_rows(seed: int = 0) -> layout.Layout:
    """Two rows: packed with images, and one with padding."""
    modality = np.ones((B, T), int)
    modality[:, 5:20] = layout.IMAGE
    modality[0, 45:50] = layout.IMAGE
    modality[1, 60:] = layout.PADDING
    segments = (modality > 0).astype(int)
    segments[0, 40:] = 2
    return layout.make_layout(np.ones((B, T)), modality, segments)


def make_inputs(heads: int, kv_heads: int, dtype=jnp.float32, slots: int = T):
    keys = jax.random.split(jax.random.key(3), 4)
    q = jax.random.normal(keys[0], (B, slots, heads, H), dtype)
    k, v = (jax.random.normal(x, (B, slots, kv_heads, H), dtype) for x in keys[1:3])
    return q, k, v, jax.random.normal(keys[3], (B, slots, C))


def naive_attention(q, k, v, probes, mask):
    """Loops over rows, heads and queries, in float64."""
    q, k, v, probes = (np.asarray(x, np.float64) for x in (q, k, v, probes))
    group = q.shape[2] // k.shape[2]
    out, probed = np.zeros(q.shape), np.zeros((*q.shape[:3], probes.shape[-1]))
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for n in range(q.shape[2]):
                keys = np.flatnonzero(mask[b, t])
                if not len(keys):
                    continue
                scores = k[b, keys, n // group] @ q[b, t, n] / np.sqrt(q.shape[-1])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, t, n] = weights @ v[b, keys, n // group]
                probed[b, t, n] = weights @ probes[b, keys]
    return out, probed


@pytest.mark.parametrize("which", [layout.MAIN, layout.VISUAL, layout.TEXTUAL])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["einsum", "chunked"])
def test_kernels_equal_loops_over_slots(which, kv_heads, kernel):
    q, k, v, probes = make_inputs(4, kv_heads)
    rows = make_rows()
    visibility = {"query": layout.query_visibility(rows), "key": layout.key_visibility(rows, which)}
    out, probed = attention.attend(q, k, v, probes=probes, kernel=kernel, block=16, **visibility)
    mask = np.asarray(layout.visible(*visibility.values()))
    expected, expected_probed = naive_attention(q, k, v, probes, mask)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(probed, expected_probed, atol=1e-5)

    has_no_keys = ~mask.any(-1)
    assert not np.asarray(out)[has_no_keys].any()
    assert not np.asarray(probed)[has_no_keys].any()


@pytest.mark.parametrize("which", [layout.MAIN, layout.VISUAL, layout.TEXTUAL])
@pytest.mark.parametrize("block", [7, 16, 128])
def test_chunked_gradients_equal_the_reference(which, block):
    inputs = make_inputs(4, 2)
    rows = make_rows()
    visibility = {"query": layout.query_visibility(rows), "key": layout.key_visibility(rows, which)}

    def scalar(kernel):
        def run(q, k, v, probes):
            out, probed = attention.attend(
                q, k, v, probes=probes, kernel=kernel, block=block, **visibility
            )
            return (out * jnp.cos(jnp.arange(H))).sum() / T + (probed**2).sum() / T

        return jax.jit(jax.grad(run, argnums=(0, 1, 2, 3)))(*inputs)

    for gradient, reference in zip(scalar("chunked"), scalar("einsum"), strict=True):
        assert float(jnp.abs(reference).max()) > 1e-3
        np.testing.assert_allclose(gradient, reference, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_chunked_without_visibility_sees_all_keys(dtype, tolerance):
    """As in the vision tower, whose keys have no probes either."""
    q, k, v, _ = make_inputs(2, 2, dtype)
    out, probed = attention.attend(q, k, v, kernel="chunked", block=16)
    expected, _ = attention.attend(q, k, v, kernel="einsum")
    assert probed is None
    np.testing.assert_allclose(
        *(np.asarray(x, np.float32) for x in (out, expected)), atol=tolerance
    )


@pytest.mark.parametrize("kernel", ["auto", *choice.PORTABLE])
def test_kv_cache_form_equals_the_reference(kernel):
    q, k, v, probes = make_inputs(4, 2)
    rows = make_rows()
    visibility = {
        "query": layout.query_visibility(rows),
        "key": layout.key_visibility(rows, layout.MAIN),
    }
    merged = [attention.merge_heads(x) for x in (k, v)]
    expected = attention.attend(q, k, v, probes=probes, kernel="einsum", **visibility)
    results = attention.attend(q, *merged, probes=probes, kernel=kernel, block=16, **visibility)
    for result, reference in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, reference, atol=1e-6)


@pytest.mark.parametrize("is_cache", [False, True])
@pytest.mark.parametrize(("kernel", "runs_flash"), [("einsum", False), ("chunked", True)])
def test_an_explicit_kernel_runs_whatever_the_form_of_the_keys(
    kernel, runs_flash, is_cache, monkeypatch
):
    """Keys in the form of a KV cache once overrode the choice without a word."""
    q, k, v, _ = make_inputs(4, 2)
    if is_cache:
        k, v = (attention.merge_heads(x) for x in (k, v))
    calls = []
    in_blocks = flash.attend_in_blocks
    monkeypatch.setattr(flash, "attend_in_blocks", lambda *x: calls.append(1) or in_blocks(*x))
    attention.attend(q[:, :3], k, v, kernel=kernel)
    assert bool(calls) == runs_flash


def test_an_unknown_kernel_is_an_error_for_a_kv_cache_too():
    q, k, v, _ = make_inputs(4, 2)
    merged = [attention.merge_heads(x) for x in (k, v)]
    with pytest.raises(ValueError, match="'flash' is not one of"):
        attention.attend(q, *merged, kernel="flash")


@pytest.mark.parametrize("kernel", ["einsum", "chunked"])
def test_bfloat16_inputs_have_float32_probes(kernel):
    q, k, v, probes = make_inputs(4, 2, jnp.bfloat16)
    rows = make_rows()
    visibility = {
        "query": layout.query_visibility(rows),
        "key": layout.key_visibility(rows, layout.MAIN),
    }
    out, probed = attention.attend(q, k, v, probes=probes, kernel=kernel, block=16, **visibility)
    assert (out.dtype, probed.dtype) == (jnp.bfloat16, jnp.float32)
    mask = np.asarray(layout.visible(*visibility.values()))
    expected, expected_probed = naive_attention(q, k, v, probes, mask)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.05)
    np.testing.assert_allclose(probed, expected_probed, atol=0.01)


def temporary_bytes(kernel: str, slots: int) -> int:
    """Returns the temporary memory that XLA needs for the gradient of one attention."""
    q, k, v, probes = make_inputs(2, 2, slots=slots)
    modality = np.ones((B, slots), int)
    rows = layout.make_layout(modality, modality)

    def run(q, k, v, probes):
        out, probed = attention.attend(
            q,
            k,
            v,
            query=layout.query_visibility(rows),
            key=layout.key_visibility(rows, layout.MAIN),
            probes=probes,
            kernel=kernel,
        )
        return out.sum() + probed.sum()

    lowered = jax.jit(jax.grad(run, argnums=(0, 1, 2, 3))).lower(q, k, v, probes)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def matrix_products(jaxpr):
    """Yields every matrix product of a computation and of those inside of it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(value, "jaxpr"):
                yield from matrix_products(value.jaxpr)


def is_float32(product) -> bool:
    return {x.aval.dtype for x in product.invars} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kernel", ["einsum", "chunked"])
def test_float32_products_are_exact_with_bfloat16_inputs(kernel):
    """Otherwise a GPU or TPU rounds the router's input and the attention masses, and gradients."""
    q, k, v, probes = make_inputs(4, 2, jnp.bfloat16)
    rows = make_rows()
    visibility = {
        "query": layout.query_visibility(rows),
        "key": layout.key_visibility(rows, layout.MAIN),
    }

    def total(q, k, v, probes):
        out, probed = attention.attend(
            q, k, v, probes=probes, kernel=kernel, block=16, **visibility
        )
        return out.astype(jnp.float32).sum() + (probed**2).sum()

    traced = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2, 3)))(q, k, v, probes)
    products = list(matrix_products(traced.jaxpr))
    exact = [p for p in products if is_float32(p)]
    assert len(products) > len(exact) >= 3  # probed, and the gradients of both of its factors
    highest = jax.lax.Precision.HIGHEST
    assert all(set(p.params["precision"] or ()) == {highest} for p in exact)


def test_float32_products_are_exact_with_a_kv_cache():
    q, k, v, probes = make_inputs(4, 2, jnp.bfloat16)
    rows = make_rows()
    visibility = {
        "query": layout.query_visibility(rows),
        "key": layout.key_visibility(rows, layout.MAIN),
    }

    def run(q, k, v, probes):
        merged = (attention.merge_heads(x) for x in (k, v))
        return attention.attend(q, *merged, probes=probes, **visibility)

    traced = jax.make_jaxpr(run)(q, k, v, probes)
    precisions = [p.params["precision"] for p in matrix_products(traced.jaxpr) if is_float32(p)]
    assert precisions == [(jax.lax.Precision.HIGHEST,) * 2]


def test_chunked_memory_grows_linearly():
    small, middle, large = (temporary_bytes("chunked", slots) for slots in (1024, 2048, 4096))
    assert middle < 2.2 * small
    assert large < 2.2 * middle
    assert temporary_bytes("einsum", 2048) > 8 * middle
