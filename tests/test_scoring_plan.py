"""Scores of answers and prompts do not depend on what is shared, grouped or batched."""

from __future__ import annotations

import inference_cases as cases
import numpy as np
import pytest
from language_cases import make, naive_nats

from wings_jax.inference import chunks, likelihood, prefixes, scoring_plan
from wings_jax.inference.scoring_plan import ScoringRequest

SHARED = 17  # slots that the prompts have in common
RANDOM = np.random.default_rng(5)


def ids(count: int) -> list[int]:
    return RANDOM.integers(40, 90, count).tolist()


def some_requests(group: str) -> list[ScoringRequest]:
    """Returns requests with a long common beginning, whose answers have a common start."""
    beginning, start = ids(SHARED), ids(3)
    requests = []
    for index in range(5):
        prompt = chunks.from_ids(beginning + ids(index + 1), (), 1)
        answers = [[*start, 7], [*start, 8, 9, 10], [*start, 7, 8]][: index + 1]
        requests.append(ScoringRequest(prompt, answers, index % 2 == 1, group))
    return requests


@pytest.mark.parametrize("case", ["plain", "router"])
def test_shared_beginnings_equal_whole_prompts(case, monkeypatch):
    monkeypatch.setattr(prefixes, "MIN_SHARED", 12)
    generator, params = make(case, 4)
    requests = some_requests("shots")
    batches = scoring_plan.plan_batches(requests, 3)
    assert [batch.shared for batch in batches] == [SHARED] * 2
    assert sorted(i for batch in batches for i in batch.indices) == list(range(5))

    scorer = likelihood.PromptScorer(generator.spec, generator.weights)
    for batch in batches:
        scored = scorer.score_batch([requests[i] for i in batch.indices], batch)
        for index, result in zip(batch.indices, scored, strict=True):
            request = requests[index]
            prompt = request.prompt.tokens.tolist()
            nats = naive_nats(generator, params, prompt)
            if request.with_prompt:
                assert -result.prompt.logprob == pytest.approx(nats, rel=1e-5)
            assert result.prompt.tokens == (len(prompt) - 1 if request.with_prompt else 0)
            for answer, found in zip(request.answers, result.answers, strict=True):
                both = naive_nats(generator, params, [*prompt, *answer])
                assert -found.logprob == pytest.approx(both - nats, abs=2e-3)
                assert found.tokens == len(answer)
            # The first token after [*start] of the second answer, of the two that have one.
            if index == 1:
                start = request.answers[1][:-3]
                one_more = naive_nats(generator, params, [*prompt, *start, 8])
                before = naive_nats(generator, params, [*prompt, *start])
                assert -result.first[1] == pytest.approx(one_more - before, abs=2e-3)


def test_groups_without_a_common_beginning_share_batches():
    requests = [
        ScoringRequest(chunks.from_ids(ids(20), (), 1), [[1], [2]], group=f"g{index}")
        for index in range(6)
    ]
    (batch,) = scoring_plan.plan_batches(requests, 8)
    assert (batch.shared, len(batch.indices)) == (0, 6)


def test_greedy_answers_are_found_with_a_common_start():
    generator, params = make("plain", 4)
    prompt = ids(6)
    greedy: list[int] = []
    for _ in range(3):
        (logits,) = cases.uncached_logits(generator.spec, params, [cases.text([*prompt, *greedy])])
        greedy.append(int(np.argmax(logits[-1])))
    other = [*greedy[:2], (greedy[2] + 1) % 90]
    request = ScoringRequest(chunks.from_ids(prompt, (), 1), [greedy, other])
    ((_, found),) = likelihood.score(generator.spec, generator.weights, [request], 1)
    assert [one.is_greedy for one in found.answers] == [True, False]
