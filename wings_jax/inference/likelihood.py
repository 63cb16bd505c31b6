"""Log-probabilities of given answers. A prompt is computed once, however many answers it has."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wings_jax import errors
from wings_jax.inference import chunks, decode, device_memory, engine, image_features
from wings_jax.inference.chunks import PromptSlots
from wings_jax.inference.engine import Chunk, ModelSpec, Weights
from wings_jax.inference.kv_cache import KVCache
from wings_jax.model.layout import PADDING, Array


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """One given answer under the model.

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


@dataclasses.dataclass(frozen=True)
class ScoringRequest:
    """A prompt and the answers to score.

    prompt   its slots, with images
    answers  the ids of each answer
    """

    prompt: PromptSlots
    answers: Sequence[Sequence[int]]

    @property
    def size(self) -> tuple[int, int]:
        """Returns the slots of the prompt and of the longest answer."""
        return self.prompt.count, max(map(len, self.answers), default=0)


@functools.partial(jax.jit, static_argnames="spec")
def score_answers(
    spec: ModelSpec, weights: Weights, cache: KVCache, prompt_logits: jax.Array, chunk: Chunk
) -> tuple[jax.Array, jax.Array]:
    """Returns each row's log-probability f32[B], and how many tokens are the likeliest, i32[B].

    Args:
      cache: that of the prompts; it is not changed.
      prompt_logits: f32[B,V], after each prompt.
      chunk: the answers, [B,T].
    """
    _, hidden = engine.extend(spec, weights, cache, chunk)
    is_used = chunk.modality != PADDING

    # The first token is predicted by the prompt, token t by the state of token t - 1.
    logprob, likeliest = score_tokens(prompt_logits, chunk.tokens[:, 0], is_used[:, 0])
    if chunk.tokens.shape[1] == 1:
        return logprob, likeliest

    def score_column(
        column: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        states, tokens, used = column
        return score_tokens(engine.logits(spec, weights, states), tokens, used)

    # One column at a time: logits of all columns together would be [B, T, V].
    columns = (hidden[:, :-1], chunk.tokens[:, 1:], is_used[:, 1:])
    columns = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), columns)
    later_logprobs, later_likeliest = jax.lax.map(score_column, columns)
    return logprob + later_logprobs.sum(0), likeliest + later_likeliest.sum(0)


def score_tokens(logits: jax.Array, tokens: Array, is_used: Array) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities f32[B] of tokens i32[B], and i32[B], 1 where one is the likeliest.

    Both are 0 where bool[B] `is_used` does not hold.

    Args:
      logits: f32[B,V].
    """
    token_logits = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    logprobs = token_logits - jax.nn.logsumexp(logits, axis=-1)
    is_likeliest = logits.argmax(-1) == tokens
    return jnp.where(is_used, logprobs, 0.0), (is_likeliest & is_used).astype(jnp.int32)


def score(
    spec: ModelSpec, weights: Weights, requests: Sequence[ScoringRequest], rows: int
) -> Iterator[tuple[int, list[Likelihood]]]:
    """Yields (index, the likelihood of each answer) of every request, the short ones first.

    Args:
      rows: how many prompts are computed at once.

    Raises:
      UserError: the rows do not fit the devices' memory.
    """
    # Similar sizes together, so that little is padded.
    order = sorted(range(len(requests)), key=lambda i: requests[i].size)
    for first in range(0, len(order), rows):
        batch = order[first : first + rows]
        with errors.full_memory(device_memory.ADVICE):
            likelihoods = _score_batch(spec, weights, [requests[i] for i in batch])
        yield from zip(batch, likelihoods, strict=True)


def _score_batch(
    spec: ModelSpec, weights: Weights, requests: Sequence[ScoringRequest]
) -> list[list[Likelihood]]:
    """Returns the likelihood of each answer of each request; one row per request."""
    arch = spec.arch
    size = chunks.power(len(requests))
    rows = [request.prompt for request in requests]
    rows += [chunks.EMPTY] * (size - len(rows))

    # Compute the prompts, with room in the cache for the longest answer.
    length = chunks.bucket(max(row.count for row in rows))
    images = chunks.power(max(len(row.images) for row in rows))
    chunk = chunks.make_chunk(rows, np.zeros(size, np.int32), arch, length=length, images=images)
    all_images = [image for row in rows for image in row.images]
    features = image_features.encode(
        spec, weights, all_images, batch_size=size, count=size * images
    )
    answer_slots = chunks.bucket(
        max((len(ids) for request in requests for ids in request.answers), default=1)
    )
    slots = device_memory.cache_slots(spec, chunk, length + answer_slots)
    cache, logits = decode.prefill(spec, weights, chunk, features, slots=slots)

    # Score answer n of every request together; a request with fewer answers has an empty row.
    prompt_ends = np.array([row.count for row in rows], np.int32)
    likelihoods: list[list[Likelihood]] = [[] for _ in requests]
    for number in range(max(len(request.answers) for request in requests)):
        ids = [tuple(request.answers[number : number + 1]) for request in requests]
        answers = [chunks.from_ids(row[0], (), 1) if row else chunks.EMPTY for row in ids]
        answers += [chunks.EMPTY] * (size - len(answers))
        chunk = chunks.make_chunk(answers, prompt_ends, arch, length=answer_slots, images=0)

        logprobs, likeliest = jax.device_get(score_answers(spec, weights, cache, logits, chunk))
        for row, answer in enumerate(ids):
            if answer:
                tokens = len(answer[0])
                is_greedy = int(likeliest[row]) == tokens
                likelihoods[row].append(Likelihood(float(logprobs[row]), tokens, is_greedy))
    return likelihoods
