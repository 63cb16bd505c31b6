"""Scores of packed requests are those of whole texts, whatever shares a row with them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_cases import make, naive_nats

from wings_jax.inference import chunks, likelihood, packed_scores, scoring_plan
from wings_jax.inference.scoring_plan import ScoringRequest
from wings_jax.model import attention
from wings_jax.model.layout import Visibility

RANDOM = np.random.default_rng(7)


def ids(count: int) -> list[int]:
    return RANDOM.integers(40, 90, count).tolist()


def request(prompt, answers, *, with_prompt=False) -> ScoringRequest:
    return ScoringRequest(chunks.from_ids(prompt, (), 1), answers, with_prompt)


def some_requests() -> list[ScoringRequest]:
    """Returns requests with one to four answers, with and without a common start."""
    start = ids(3)
    return [
        request(ids(9), [ids(5), ids(4)], with_prompt=True),
        request(ids(12), [[*start, 41, 42], [*start, 43], [*start, 41, 44, 45]]),
        request(ids(1), [ids(40)]),
        request(ids(50), [[41], [42], [43], [44]], with_prompt=True),
        request(ids(25), [ids(20), ids(30)]),
        request(ids(3), [ids(2), []]),
    ]


@pytest.mark.parametrize("case", ["plain", "router", "qwen3"])
def test_packed_requests_equal_whole_texts(case):
    generator, params = make(case, 4)
    assert likelihood.can_pack(generator.spec)
    requests = some_requests()
    batches = scoring_plan.plan_batches(requests, 4, can_pack=True)
    assert max(count for batch in batches for count in batch.rows) > 2

    scored = dict(likelihood.score(generator.spec, generator.weights, requests, 4))
    assert sorted(scored) == list(range(len(requests)))
    for index, found in scored.items():
        prompt = requests[index].prompt.tokens.tolist()
        nats = naive_nats(generator, params, prompt)
        if requests[index].with_prompt:
            assert -found.prompt.logprob == pytest.approx(nats, rel=1e-5)
            assert found.prompt.tokens == len(prompt) - 1
        for answer, one in zip(requests[index].answers, found.answers, strict=True):
            both = naive_nats(generator, params, [*prompt, *answer])
            assert -one.logprob == pytest.approx(both - nats, abs=2e-3)
            assert one.tokens == len(answer)


@pytest.mark.parametrize("case", ["plain", "router"])
def test_packed_scores_equal_those_with_a_cache(case):
    generator, _ = make(case, 4)
    requests = some_requests()
    packed = dict(likelihood.score(generator.spec, generator.weights, requests, 4))

    scorer = likelihood.PromptScorer(generator.spec, generator.weights)
    for batch in scoring_plan.plan_batches(requests, 4):
        assert not batch.rows
        scored = scorer.score_batch([requests[i] for i in batch.indices], batch)
        for index, cached in zip(batch.indices, scored, strict=True):
            one = packed[index]
            assert one.first == pytest.approx(cached.first, abs=1e-4)
            pairs = zip([one.prompt, *one.answers], [cached.prompt, *cached.answers], strict=True)
            for a, b in pairs:
                assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
                assert (a.tokens, a.is_greedy) == (b.tokens, b.is_greedy)


def test_packing_invariance_to_row_mates_and_other_branches():
    generator, _ = make("router", 4)
    prompt, answer = ids(8), ids(6)
    alone = request(prompt, [answer])
    crowded = [request(prompt, [answer, ids(7)]), request(ids(20), [ids(9)])]

    (one,) = packed_scores.score_rows(generator.spec, generator.weights, [[alone]], 64)
    many = packed_scores.score_rows(generator.spec, generator.weights, [crowded[::-1]], 64)
    np.testing.assert_allclose(many[1].of(0)[0], one.of(0)[0], atol=1e-5)


def test_release_semantics_and_other_kernels_are_not_packed():
    generator, _ = make("router", 2)
    semantics = dataclasses.replace(generator.spec.arch.semantics, prompt_length=3)
    release = dataclasses.replace(generator.spec.arch, semantics=semantics)
    assert not likelihood.can_pack(dataclasses.replace(generator.spec, arch=release))
    assert not likelihood.can_pack(dataclasses.replace(generator.spec, kernel="chunked"))

    tree = Visibility(jnp.ones((1, 3), int), jnp.arange(3)[None], jnp.array([[0, 1, 2]]))
    q = jnp.ones((1, 3, 2, 4))
    with pytest.raises(ValueError, match="'chunked' does not support branches"):
        attention.attend(q, q, q, query=tree, key=tree, kernel="chunked")


def test_packed_batch_without_one_of_its_requests_is_refused():
    generator, _ = make("plain", 2)
    requests = some_requests()
    batch = scoring_plan.plan_batches(requests, 2, can_pack=True)[0]
    scorer = likelihood.PromptScorer(generator.spec, generator.weights)
    with pytest.raises(ValueError, match="requests of a packed batch of"):
        scorer.score_batch([requests[i] for i in batch.indices[1:]], batch)


def test_requests_without_anything_to_score_have_scores_of_nothing():
    generator, _ = make("plain", 2)
    ((_, found),) = likelihood.score(
        generator.spec, generator.weights, [request(ids(5), [[], []])], 2
    )
    assert [(one.logprob, one.tokens) for one in found.answers] == [(0.0, 0)] * 2
    assert found.first == [0.0, 0.0]


def test_rows_hold_every_request_once_and_never_too_much():
    sizes = {i: int(n) for i, n in enumerate(RANDOM.integers(1, 101, 300))}
    packed = scoring_plan.pack_rows(sizes)
    held = [i for rows in packed.values() for row in rows for i in row]
    assert sorted(held) == sorted(sizes)
    for length, rows in packed.items():
        assert max(sum(sizes[i] for i in row) for row in rows) <= length
    slots = sum(length * len(rows) for length, rows in packed.items())
    assert slots < 1.06 * sum(sizes.values())


def test_batches_of_a_length_have_equal_numbers_of_rows():
    requests = [request(ids(50), [ids(30)]) for _ in range(21)]
    batches = scoring_plan.plan_batches(requests, 8, can_pack=True)
    assert [len(batch.rows) for batch in batches] == [7, 7, 7]
    assert sorted(i for batch in batches for i in batch.indices) == list(range(21))


def test_likeliest_token_is_the_first_of_equal_ones():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0]])
    tokens = jnp.array([[1, 2, 0]])
    logprobs, is_likeliest = packed_scores.score_candidates(logits, tokens)
    assert is_likeliest.tolist() == [[True, False, False]]
    expected = jax.nn.log_softmax(logits)[0][tokens[0]]
    np.testing.assert_allclose(logprobs[0], expected, rtol=1e-6)
