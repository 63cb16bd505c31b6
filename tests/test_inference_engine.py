"""Decoding with a KV cache equals the full forward pass."""

from __future__ import annotations

import dataclasses

import inference_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wings_jax import tree
from wings_jax.inference import chunks, decode, engine, kv_cache
from wings_jax.model import joined

CASES = cases.ARCHS


@pytest.mark.parametrize("case", CASES)
def test_kv_cache_matches_full_forward(case: str):
    """Three unequal rows: a prefill, an extension with an image, and single tokens."""
    spec, weights, params = cases.make(CASES[case])
    rows = cases.random_rows(spec.arch, ["tiittt", "ttttttttt", "iitiit"], seed=1)
    more = cases.random_rows(spec.arch, ["ttiit", "t", "ttii"], seed=2)
    tail = np.random.default_rng(3).integers(0, spec.arch.decoder.vocab_size, (3, 4))
    whole = [chunks.join(a, b, cases.text(t)) for a, b, t in zip(rows, more, tail, strict=True)]
    expected = cases.uncached_logits(spec, params, whole)

    starts = np.zeros(3, np.int32)
    chunk, features = cases.make_chunk(spec, weights, rows, starts, length=12)
    cache, hidden = cases.prefill(
        spec, weights, chunk, features, {"main": 30, "visual": 14, "textual": 26}
    )
    cases.check_slots(spec, weights, hidden, expected, rows, starts)
    starts = np.array([len(row.tokens) for row in rows], np.int32)
    chunk, features = cases.make_chunk(spec, weights, more, starts, length=8)
    cache, hidden = cases.extend(spec, weights, cache, chunk, features)
    cases.check_slots(spec, weights, hidden, expected, more, starts)
    for index in range(tail.shape[1]):
        if index == 2:
            cache = decode.compact(cache)
        positions = np.asarray(cache.lengths)
        token = jnp.asarray(tail[:, index], jnp.int32)
        cache, logits = cases.step(spec, weights, cache, token, jnp.ones(3, bool))
        for row in range(3):
            np.testing.assert_allclose(
                logits[row], expected[row][positions[row]], rtol=1e-5, atol=1e-5
            )


def test_kv_cache_truncate_and_inactive_rows_have_no_effect():
    spec, weights, _ = cases.make(CASES["router"])
    rows = cases.random_rows(spec.arch, ["tiitt", "ttt"], seed=4)
    starts = np.zeros(2, np.int32)
    chunk, features = cases.make_chunk(spec, weights, rows, starts, length=8)
    slots = {"main": 16, "visual": 4, "textual": 16}
    first, _ = cases.prefill(spec, weights, chunk, features, slots)
    lengths = first.lengths
    token = jnp.array([3, 5])
    _, expected = cases.step(spec, weights, first, token, jnp.array([True, True]))
    other, _ = cases.step(spec, weights, first, token + 1, jnp.array([True, False]))
    np.testing.assert_array_equal(other.lengths, lengths + jnp.array([1, 0]))
    other, _ = cases.step(spec, weights, other, token + 2, jnp.array([True, True]))
    other = kv_cache.truncate(other, lengths)
    _, actual = cases.step(spec, weights, other, token, jnp.array([True, True]))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_kv_cache_insert_replaces_a_row():
    spec, weights, _ = cases.make(CASES["router"])
    slots = {"main": 16, "visual": 4, "textual": 16}
    starts = np.zeros(2, np.int32)
    rows = cases.random_rows(spec.arch, ["tiitt", "ttt"], seed=5)
    chunk, features = cases.make_chunk(spec, weights, rows, starts, length=8)
    old, _ = cases.prefill(spec, weights, chunk, features, slots)
    old, _ = cases.step(spec, weights, old, jnp.array([1, 2]), jnp.ones(2, bool))
    new_rows = cases.random_rows(spec.arch, ["tttiit", "t"], seed=6)
    chunk, features = cases.make_chunk(spec, weights, new_rows, starts, length=8)
    alone, _ = cases.prefill(spec, weights, chunk, features, slots)
    mixed = kv_cache.insert(old, alone, jnp.array([1, 9]))
    tokens, both = jnp.array([4, 7]), jnp.ones(2, bool)
    _, actual = cases.step(spec, weights, mixed, tokens, both)
    _, old_row = cases.step(spec, weights, old, tokens, both)
    _, new_row = cases.step(spec, weights, alone, tokens[::-1], both)
    np.testing.assert_allclose(actual[0], old_row[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(actual[1], new_row[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["router", "gqa", "plain", "lora"])
def test_kv_cache_greedy_ids_match_uncached(case: str):
    spec, weights, params = cases.make(CASES[case])
    rows = cases.random_rows(spec.arch, ["tiitt", "ttttttt", "t"], seed=7)
    expected = cases.uncached_greedy(spec, params, rows, 6)
    batched = cases.greedy(spec, weights, rows, 6)
    np.testing.assert_array_equal(batched, expected)
    single = [cases.greedy(spec, weights, [row], 6)[0] for row in rows]
    np.testing.assert_array_equal(single, expected)


def test_kv_cache_of_text_only_rows_has_no_visual_slots():
    spec, weights, params = cases.make(CASES["router"])
    rows = cases.random_rows(spec.arch, ["tttt", "tt"], seed=8)
    chunk, features = cases.make_chunk(spec, weights, rows, np.zeros(2, np.int32), length=5)
    assert features is None
    assert "visual" not in chunk.picks
    cache, hidden = decode.prefill(
        spec, weights, chunk, features, slots=(("main", 8), ("textual", 8))
    )
    assert set(cache.visibility) == {"main", "textual"}
    expected = cases.uncached_logits(spec, params, rows)
    for row, logits in enumerate(hidden):
        np.testing.assert_allclose(logits, expected[row][-1], rtol=1e-5, atol=1e-5)


def test_kv_cache_in_bfloat16_has_near_logits():
    """8 bits of a number: its products are off by up to 2**-8, and two layers add some up."""
    whole, weights, params = cases.make(CASES["gqa"])
    half = dataclasses.replace(whole, dtype="bfloat16")
    rows = cases.random_rows(whole.arch, ["tiittt", "ttttttttt"], seed=9)
    starts, slots = np.zeros(2, np.int32), {"main": 16, "visual": 4, "textual": 16}
    actual = []
    for spec in (whole, half):
        weights = engine.split_layers(params, spec)
        chunk, features = cases.make_chunk(spec, weights, rows, starts, length=12)
        cache, _ = cases.prefill(spec, weights, chunk, features, slots)
        assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype(spec.dtype)}
        _, logits = cases.step(spec, weights, cache, jnp.array([3, 5]), jnp.ones(2, bool))
        assert logits.dtype == jnp.float32
        actual.append(logits)
    off = jnp.linalg.norm(actual[1] - actual[0], axis=-1) / jnp.linalg.norm(actual[0], axis=-1)
    assert 0 < off.max() < 0.05


def test_released_parameters_are_split_alike_and_deleted():
    spec, weights, params = cases.make(CASES["router"])
    split = engine.split_layers(params, spec, release=True)
    jax.tree.map(np.testing.assert_array_equal, split, weights)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params["decoder"]["layers"]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(split))


@pytest.mark.parametrize("name", ["gqa", "lora"])
def test_joined_kernels_are_those_of_the_parameters(name):
    """One product for queries, keys and values; split again, every array is the given one."""
    _, weights, params = cases.make(CASES[name])
    stacked = tree.flatten(params["decoder"]["layers"])
    for index, layer in enumerate(weights.layers):
        flat = tree.flatten(layer)
        assert joined.JOINED in flat
        assert not flat.keys() & set(joined.PARTS)
        split = joined.split_kernels(flat)
        assert split.keys() == stacked.keys()
        for path, values in split.items():
            np.testing.assert_array_equal(values, stacked[path][index])


def test_programs_of_single_layers_match_one_program():
    """Prefill and extension outside of jit; a cache that is not kept, one that is overwritten."""
    spec, weights, _ = cases.make(CASES["router"])
    rows = cases.random_rows(spec.arch, ["tiitt", "ttt"], seed=4)
    more = cases.random_rows(spec.arch, ["tt", "ttt"], seed=5)
    starts = np.zeros(2, np.int32)
    chunk, features = cases.make_chunk(spec, weights, rows, starts, length=8)
    slots = {"main": 16, "visual": 4, "textual": 16}
    expected, hidden = cases.prefill(spec, weights, chunk, features, slots)
    cache, states = engine.prefill(spec, weights, chunk, features, slots)
    np.testing.assert_allclose(states, hidden, atol=1e-5)

    starts = np.array([len(row.tokens) for row in rows], np.int32)
    chunk, _ = cases.make_chunk(spec, weights, more, starts, length=4)
    expected, hidden = cases.extend(spec, weights, expected, chunk, None)
    dropped, states = engine.extend(spec, weights, cache, chunk, keep=False)
    np.testing.assert_allclose(states, hidden, atol=1e-5)
    assert dropped.layers == ()
    owned, states = engine.extend(spec, weights, cache, chunk, owned=True)
    np.testing.assert_allclose(states, hidden, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(owned), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
