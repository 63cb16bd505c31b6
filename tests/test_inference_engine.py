"""Cached decoding is the same function as reading everything at once."""

from __future__ import annotations

import dataclasses

import inference_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wings_jax.inference import decode, engine, kv_cache, prompts

CASES = cases.ARCHS


@pytest.mark.parametrize("case", CASES)
def test_prefill_extend_step_equal_one_pass(case: str):
    """Three unequal rows, grown by a prefill, an extension with an image, and single tokens."""
    spec, weights, params = cases.make(CASES[case])
    rows = cases.random_rows(spec.arch, ["tiittt", "ttttttttt", "iitiit"], seed=1)
    more = cases.random_rows(spec.arch, ["ttiit", "t", "ttii"], seed=2)
    tail = np.random.default_rng(3).integers(0, spec.arch.decoder.vocab_size, (3, 4))
    whole = [prompts.join(a, b, cases.text(t)) for a, b, t in zip(rows, more, tail, strict=True)]
    wanted = cases.uncached_logits(spec, params, whole)

    starts = np.zeros(3, np.int32)
    chunk, features = cases.make_chunk(spec, weights, rows, starts, length=12)
    grown, hidden = cases.prefill(
        spec, weights, chunk, features, {"main": 30, "visual": 14, "textual": 26}
    )
    cases.check_slots(spec, weights, hidden, wanted, rows, starts)
    starts = np.array([len(row.tokens) for row in rows], np.int32)
    chunk, features = cases.make_chunk(spec, weights, more, starts, length=8)
    grown, hidden = cases.extend(spec, weights, grown, chunk, features)
    cases.check_slots(spec, weights, hidden, wanted, more, starts)
    for index in range(tail.shape[1]):
        if index == 2:
            grown = kv_cache.compact(grown)
        at = np.asarray(grown.lengths)
        token = jnp.asarray(tail[:, index], jnp.int32)
        grown, logits = cases.step(spec, weights, grown, token, jnp.ones(3, bool))
        for row in range(3):
            np.testing.assert_allclose(logits[row], wanted[row][at[row]], rtol=1e-5, atol=1e-5)


def test_inactive_rows_and_forgotten_slots_leave_no_trace():
    spec, weights, _ = cases.make(CASES["router"])
    rows = cases.random_rows(spec.arch, ["tiitt", "ttt"], seed=4)
    starts = np.zeros(2, np.int32)
    chunk, features = cases.make_chunk(spec, weights, rows, starts, length=8)
    slots = {"main": 16, "visual": 4, "textual": 16}
    first, _ = cases.prefill(spec, weights, chunk, features, slots)
    lengths = first.lengths
    token = jnp.array([3, 5])
    _, wanted = cases.step(spec, weights, first, token, jnp.array([True, True]))
    other, _ = cases.step(spec, weights, first, token + 1, jnp.array([True, False]))
    np.testing.assert_array_equal(other.lengths, lengths + jnp.array([1, 0]))
    other, _ = cases.step(spec, weights, other, token + 2, jnp.array([True, True]))
    other = kv_cache.truncate(other, lengths)
    _, found = cases.step(spec, weights, other, token, jnp.array([True, True]))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_guest_takes_the_place_of_a_row():
    spec, weights, _ = cases.make(CASES["router"])
    slots = {"main": 16, "visual": 4, "textual": 16}
    starts = np.zeros(2, np.int32)
    rows = cases.random_rows(spec.arch, ["tiitt", "ttt"], seed=5)
    chunk, features = cases.make_chunk(spec, weights, rows, starts, length=8)
    hosts, _ = cases.prefill(spec, weights, chunk, features, slots)
    hosts, _ = cases.step(spec, weights, hosts, jnp.array([1, 2]), jnp.ones(2, bool))
    guests = cases.random_rows(spec.arch, ["tttiit", "t"], seed=6)
    chunk, features = cases.make_chunk(spec, weights, guests, starts, length=8)
    alone, _ = cases.prefill(spec, weights, chunk, features, slots)
    mixed = kv_cache.insert(hosts, alone, jnp.array([1, 9]))
    tokens, both = jnp.array([4, 7]), jnp.ones(2, bool)
    _, found = cases.step(spec, weights, mixed, tokens, both)
    _, host = cases.step(spec, weights, hosts, tokens, both)
    _, guest = cases.step(spec, weights, alone, tokens[::-1], both)
    np.testing.assert_allclose(found[0], host[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], guest[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["router", "gqa", "plain", "lora"])
def test_greedy_ids_equal_those_without_a_cache(case: str):
    spec, weights, params = cases.make(CASES[case])
    rows = cases.random_rows(spec.arch, ["tiitt", "ttttttt", "t"], seed=7)
    wanted = cases.uncached_greedy(spec, params, rows, 6)
    batched = cases.greedy(spec, weights, rows, 6)
    np.testing.assert_array_equal(batched, wanted)
    single = [cases.greedy(spec, weights, [row], 6)[0] for row in rows]
    np.testing.assert_array_equal(single, wanted)


def test_no_image_in_a_batch_needs_no_visual_slots():
    spec, weights, params = cases.make(CASES["router"])
    rows = cases.random_rows(spec.arch, ["tttt", "tt"], seed=8)
    chunk, features = cases.make_chunk(spec, weights, rows, np.zeros(2, np.int32), length=5)
    assert features is None
    assert "visual" not in chunk.picks
    grown, hidden = decode.prefill(
        spec, weights, chunk, features, slots=(("main", 8), ("textual", 8))
    )
    assert set(grown.visibility) == {"main", "textual"}
    wanted = cases.uncached_logits(spec, params, rows)
    for row, logits in enumerate(hidden):
        np.testing.assert_allclose(logits, wanted[row][-1], rtol=1e-5, atol=1e-5)


def test_in_bfloat16_caches_are_half_and_logits_near():
    """8 bits of a number: its products are off by up to 2**-8, and two layers add some up."""
    whole, weights, params = cases.make(CASES["gqa"])
    half = dataclasses.replace(whole, dtype="bfloat16")
    rows = cases.random_rows(whole.arch, ["tiittt", "ttttttttt"], seed=9)
    starts, slots = np.zeros(2, np.int32), {"main": 16, "visual": 4, "textual": 16}
    found = []
    for spec in (whole, half):
        weights = engine.split_layers(params, spec)
        chunk, features = cases.make_chunk(spec, weights, rows, starts, length=12)
        grown, _ = cases.prefill(spec, weights, chunk, features, slots)
        assert {x.dtype for x in jax.tree.leaves(grown.layers)} == {jnp.dtype(spec.dtype)}
        _, logits = cases.step(spec, weights, grown, jnp.array([3, 5]), jnp.ones(2, bool))
        assert logits.dtype == jnp.float32
        found.append(logits)
    off = jnp.linalg.norm(found[1] - found[0], axis=-1) / jnp.linalg.norm(found[0], axis=-1)
    assert 0 < off.max() < 0.05
