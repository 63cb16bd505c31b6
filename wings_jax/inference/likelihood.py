"""Log-probabilities of given answers, and of prompts themselves, in batches.

A prompt is computed once, however many answers it has; what its answers have in common at their
start is part of it. The beginning that the prompts of a group share, such as solved examples, is
computed once for the group.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from wings_jax import distributed, errors
from wings_jax.inference import (
    chunks,
    device_memory,
    image_features,
    packed_scores,
    token_scores,
)
from wings_jax.inference.chunks import PromptSlots
from wings_jax.inference.engine import ModelSpec, Weights
from wings_jax.inference.packed_scores import COMMON, PROMPT, ScoredTokens
from wings_jax.inference.scoring_plan import (
    ScoringBatch,
    ScoringRequest,
    common_ids,
    plan_batches,
)
from wings_jax.inference.token_scores import ComputedPrompts, ScoredSlots
from wings_jax.model.layout import TEXT

# Texts are short: little padding counts more than few compilations. All small caches have one
# size, since scoring is compiled once for every size.
SMALLEST, CAPACITY = 2, 128


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """One given text under the model.

    logprob    sum over its tokens, in nats
    tokens     how many there are
    is_greedy  whether greedy decoding would generate it
    """

    logprob: float
    tokens: int
    is_greedy: bool

    def __add__(self, other: Likelihood) -> Likelihood:
        """Returns the likelihood of this text followed by the other."""
        return Likelihood(
            self.logprob + other.logprob,
            self.tokens + other.tokens,
            self.is_greedy and other.is_greedy,
        )


NOTHING = Likelihood(0.0, 0, True)  # of an empty text


@dataclasses.dataclass(frozen=True)
class ScoredRequest:
    """What was computed of a request.

    prompt   the likelihood of the prompt after its first slot, of no tokens without `with_prompt`
    answers  the likelihood of each answer
    first    of each answer, the log-probability of the first token after those that all share
    """

    prompt: Likelihood
    answers: list[Likelihood]
    first: list[float]


class PromptScorer:
    """Scores batches of requests with one model; keeps the beginning of the newest group.

    Args:
      spec: the model.
      weights: its weights.
    """

    def __init__(self, spec: ModelSpec, weights: Weights):
        self._spec, self._weights = spec, weights
        self._beginning: tuple[PromptSlots, ComputedPrompts] | None = None

    def score_batch(
        self, requests: Sequence[ScoringRequest], batch: ScoringBatch
    ) -> list[ScoredRequest]:
        """Returns what is computed of the requests of one batch.

        Args:
          requests: those of `batch.indices`; some may be left out of a batch that is not packed.

        Raises:
          UserError: the batch does not fit the devices' memory.
        """
        if batch.rows:
            with errors.full_memory(device_memory.ADVICE):
                return _score_packed(self._spec, self._weights, requests, batch)

        shared = batch.shared
        with errors.full_memory(device_memory.ADVICE):
            beginning = self._compute_beginning(requests[0].prompt, shared) if shared else None
            scored = _score_batch(self._spec, self._weights, requests, shared, beginning)

        # The batch's caches are deleted; without this, those of the next one would lie beside them.
        slots = max(sum(request.size) for request in requests)
        size = device_memory.cache_bytes(self._spec, len(requests), {"main": slots})
        if size > device_memory.LARGE:
            device_memory.trim_host_memory()
        return scored

    def _compute_beginning(self, prompt: PromptSlots, shared: int) -> ComputedPrompts:
        # Batches of a group follow each other: its beginning is computed once.
        start = chunks.head(prompt, shared)
        if self._beginning is None or not np.array_equal(self._beginning[0].tokens, start.tokens):
            self._beginning = start, _compute_beginning(self._spec, self._weights, start)
        return self._beginning[1]


def score(
    spec: ModelSpec, weights: Weights, requests: Sequence[ScoringRequest], rows: int
) -> Iterator[tuple[int, ScoredRequest]]:
    """Yields (index, what was computed of it) of every request.

    Args:
      rows: how many prompts are computed at once.

    Raises:
      UserError: the rows do not fit the devices' memory.
    """
    scorer = PromptScorer(spec, weights)
    for batch in plan_batches(requests, rows, can_pack=can_pack(spec)):
        scored = scorer.score_batch([requests[i] for i in batch.indices], batch)
        yield from zip(batch.indices, scored, strict=True)


def can_pack(spec: ModelSpec) -> bool:
    """Returns whether several requests can be in a row: not with the release's semantics."""
    return spec.kernel in ("auto", "einsum") and spec.arch.semantics.prompt_length is None


def _score_packed(
    spec: ModelSpec, weights: Weights, requests: Sequence[ScoringRequest], batch: ScoringBatch
) -> list[ScoredRequest]:
    """Returns what is computed of packed requests, all of the batch."""
    if len(requests) != len(batch.indices):
        raise ValueError(f"{len(requests)} requests of a packed batch of {len(batch.indices)}")

    ends = list(itertools.accumulate(batch.rows))
    rows = [requests[end - count : end] for count, end in zip(batch.rows, ends, strict=True)]

    results = []
    found = packed_scores.score_rows(spec, weights, rows, batch.length)
    for request, scored in zip(requests, found, strict=True):
        prompt, common = (_sum_tokens(scored, part) for part in (PROMPT, COMMON))
        rests = [_sum_tokens(scored, number) for number in range(len(request.answers))]
        firsts = [scored.of(number)[0][:1] for number in range(len(request.answers))]
        first = [float(values[0]) if len(values) else 0.0 for values in firsts]
        results.append(ScoredRequest(prompt, [common + rest for rest in rests], first))
    return results


def _sum_tokens(scored: ScoredTokens, part: int) -> Likelihood:
    """Returns the likelihood of one part of a request."""
    logprobs, is_likeliest = scored.of(part)
    return Likelihood(float(logprobs.sum()), len(logprobs), bool(is_likeliest.all()))


def _compute_beginning(spec: ModelSpec, weights: Weights, start: PromptSlots) -> ComputedPrompts:
    """Returns the computed beginning of a group: one row, whose every slot but 0 is scored."""
    length = chunks.bucket(start.count)
    zero = np.zeros(1, np.int32)

    chunk = chunks.make_chunk([start], zero, spec.arch, length=length, images=0)
    slots = device_memory.cache_slots(spec, chunk, length)
    scored = _scored_slots([start], [(1, start.count)]), _scored_slots([start], [(0, 0)])
    return token_scores.compute_prompts(spec, weights, chunk, None, scored, slots=slots)


def _scored_slots(rows: Sequence[PromptSlots], spans: Sequence[tuple[int, int]]) -> ScoredSlots:
    """Returns the slots of each row from its span's first to before its last."""
    width = max(last - first for first, last in spans)
    shape = (len(rows), chunks.bucket(width, SMALLEST) if width else 0)
    sources, tokens = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    is_used = np.zeros(shape, bool)

    for row, (slots, (first, last)) in enumerate(zip(rows, spans, strict=True)):
        sources[row, : last - first] = np.arange(first, last) - 1
        tokens[row, : last - first] = slots.tokens[first:last]
        # Images are given, not predicted.
        is_used[row, : last - first] = slots.modality[first:last] == TEXT
    return ScoredSlots(sources, tokens, is_used)


def _score_batch(
    spec: ModelSpec,
    weights: Weights,
    requests: Sequence[ScoringRequest],
    shared: int,
    beginning: ComputedPrompts | None,
) -> list[ScoredRequest]:
    """Returns what is computed of each request, one row per request.

    Args:
      shared: how many slots of every prompt `beginning` has.
    """
    # One row: the rest of the prompt after the beginning, and what its answers have in common.
    patches = spec.arch.vision.num_patches
    common = [common_ids(request) for request in requests]
    rows, prompt_spans, head_spans = [], [], []
    for request, ids in zip(requests, common, strict=True):
        rest = chunks.tail(request.prompt, shared, patches)
        rows.append(chunks.join(rest, chunks.from_ids(ids, (), patches)))
        # Slot 0 of a prompt has nothing before it, the first slot after a beginning has.
        first = 0 if shared else 1
        prompt_spans.append((first, rest.count) if request.with_prompt else (0, 0))
        head_spans.append((rest.count, rest.count + len(ids)))

    # Rows are filled up to a power of two, so that few batch sizes are compiled.
    empty = chunks.power(len(requests)) - len(rows)
    rows += [chunks.EMPTY] * empty
    spans = prompt_spans + [(0, 0)] * empty, head_spans + [(0, 0)] * empty
    rests = [
        [ids[len(start) :] for ids in request.answers]
        for request, start in zip(requests, common, strict=True)
    ]

    # The prompts and the common ids first, then the rest of every answer.
    room = max((len(ids) for answers in rests for ids in answers), default=1)
    computed = _compute_rows(spec, weights, rows, spans, (shared, beginning), room)
    ends = np.array([shared + row.count for row in rows], np.int32)
    answers = _score_rests(spec, weights, computed, rests, ends)
    return _join_scores(requests, common, shared, (beginning, computed), answers)


def _compute_rows(
    spec: ModelSpec,
    weights: Weights,
    rows: Sequence[PromptSlots],
    spans: tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]],
    start: tuple[int, ComputedPrompts | None],
    room: int,
) -> ComputedPrompts:
    """Returns the computed rows, with `room` in the cache for answers.

    Args:
      spans: scored slots of each row, of its prompt and of the head of its answers.
      start: how many slots of every prompt are computed already, and these.
    """
    shared, beginning = start
    length = chunks.bucket(max(row.count for row in rows), SMALLEST)
    scored = _scored_slots(rows, spans[0]), _scored_slots(rows, spans[1])

    starts = np.full(len(rows), shared, np.int32)
    images = chunks.power(max(len(row.images) for row in rows))
    chunk = chunks.make_chunk(rows, starts, spec.arch, length=length, images=images)
    # The cache holds the beginning, the rows after it and the answers.
    if beginning is not None:
        capacity = beginning.cache.positions.shape[1] + length + room
        slots = device_memory.cache_slots(spec, chunk, chunks.bucket(capacity, CAPACITY))
        return token_scores.continue_prompts(spec, weights, beginning, chunk, scored, slots=slots)

    # Without a beginning the rows may have images.
    all_images = [image for row in rows for image in row.images]
    features = image_features.encode(
        spec, weights, all_images, batch_size=len(rows), count=len(rows) * images
    )
    slots = device_memory.cache_slots(spec, chunk, chunks.bucket(length + room, CAPACITY))
    return token_scores.compute_prompts(spec, weights, chunk, features, scored, slots=slots)


def _score_rests(
    spec: ModelSpec,
    weights: Weights,
    computed: ComputedPrompts,
    rests: Sequence[Sequence[Sequence[int]]],
    ends: np.ndarray,
) -> list[list[tuple[Likelihood, float]]]:
    """Returns the likelihood of what each answer has after the common ids, and of its first token.

    Args:
      ends: i32[B], the position after each row.
    """
    # Answer n of every request together; a request with fewer answers has an empty row.
    likelihoods: list[list[tuple[Likelihood, float]]] = [[] for _ in rests]
    for number in range(max(map(len, rests), default=0)):
        ids = [answers[number] if number < len(answers) else () for answers in rests]
        ids += [()] * (len(ends) - len(ids))
        logprobs, likeliest, first = distributed.fetch(
            _score_answers(spec, weights, computed, ids, ends)
        )

        for row, answers in enumerate(rests):
            if number < len(answers):
                likelihood = _likelihood((logprobs[row], likeliest[row]), len(ids[row]))
                likelihoods[row].append((likelihood, float(first[row])))
    return likelihoods


def _score_answers(
    spec: ModelSpec,
    weights: Weights,
    computed: ComputedPrompts,
    ids: Sequence[Sequence[int]],
    ends: np.ndarray,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the scores of one answer per row, as `token_scores.score_answers`."""
    # The last token of an answer predicts nothing: it is not computed.
    longest = max(map(len, ids))
    length = chunks.bucket(longest - 1, SMALLEST) if longest > 1 else 0
    tokens = np.zeros((len(ids), length + 1), np.int32)
    is_used = np.zeros(tokens.shape, bool)
    for row, answer in enumerate(ids):
        tokens[row, : len(answer)] = answer
        is_used[row, : len(answer)] = True

    # Answers of one token, such as letters, need the logits of the prompt only.
    if not length:
        first = token_scores.score_tokens(computed.logits, tokens[:, 0], is_used[:, 0])
        return *first, first[0]

    rows = [chunks.from_ids(answer[:-1], (), 1) for answer in ids]
    chunk = chunks.make_chunk(rows, ends, spec.arch, length=length, images=0)
    return token_scores.score_answers(spec, weights, computed, chunk, (tokens, is_used))


def _likelihood(scores: tuple[np.ndarray, np.ndarray], tokens: int) -> Likelihood:
    """Returns the likelihood of `tokens` tokens by their sum and how many are the likeliest."""
    return Likelihood(float(scores[0]), tokens, int(scores[1]) == tokens)


def _join_scores(
    requests: Sequence[ScoringRequest],
    common: Sequence[tuple[int, ...]],
    shared: int,
    computed: tuple[ComputedPrompts | None, ComputedPrompts],
    rests: Sequence[Sequence[tuple[Likelihood, float]]],
) -> list[ScoredRequest]:
    """Returns the likelihoods of whole prompts and answers, of those of their parts."""
    beginning, rows = computed
    start = NOTHING
    if beginning is not None:
        logprobs, likeliest = distributed.fetch(beginning.prompt)
        start = _likelihood((logprobs[0], likeliest[0]), shared - 1)

    results = []
    prompt_scores, head_scores = distributed.fetch((rows.prompt, rows.head))

    for row, request in enumerate(requests):
        prompt = NOTHING
        if request.with_prompt:
            scores = (prompt_scores[0][row], prompt_scores[1][row])
            own = int((request.prompt.modality[max(shared, 1) :] == TEXT).sum())
            prompt = start + _likelihood(scores, own)

        head = _likelihood((head_scores[0][row], head_scores[1][row]), len(common[row]))
        answers = [head + rest for rest, _ in rests[row]]
        results.append(ScoredRequest(prompt, answers, [first for _, first in rests[row]]))
    return results
