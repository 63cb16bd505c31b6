"""Log-probabilities of given tokens: of prompts, and of answers to prompts. Pure functions.

Prompts and answers have many lengths: the layers are programs of their own (`inference.engine`), as
whole models of every length would take longer to compile than to run.

A sum of log-probabilities comes with the number of tokens that are the likeliest at their place:
where both counts agree, greedy decoding would generate the text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from wings_jax import axes
from wings_jax.inference import decode, engine, kv_cache, prefixes
from wings_jax.inference.engine import Chunk, ModelSpec, Weights
from wings_jax.inference.kv_cache import KVCache
from wings_jax.model.layout import Array

Scores = tuple[jax.Array, jax.Array]  # log-probability f32[B], likeliest tokens i32[B]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoredSlots:
    """Slots of B rows whose own likelihood counts; W is the most of any row, 0 for none.

    sources  i32[B,W]   the slot whose state predicts each; -1: the end of what came before
    tokens   i32[B,W]   the token of each
    is_used  bool[B,W]  False for padding
    """

    sources: Array
    tokens: Array
    is_used: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ComputedPrompts:
    """B prompts that answers can follow, each with what all of its answers start with.

    cache   their KV cache
    logits  f32[B,V] after each
    prompt  scores of the prompt's scored slots
    head    scores of what the answers start with
    """

    cache: KVCache
    logits: jax.Array
    prompt: Scores
    head: Scores


def compute_prompts(
    spec: ModelSpec,
    weights: Weights,
    chunk: Chunk,
    features: jax.Array | None,
    scored: tuple[ScoredSlots, ScoredSlots],
    *,
    slots: tuple[tuple[str, int], ...],
) -> ComputedPrompts:
    """Returns prompts that start with this chunk.

    Args:
      scored: of the prompts and of the heads of their answers.
      features: f32[n,D], encoded images; None if the chunk has no image slots.
      slots: pairs of attention and how many slots to allocate.
    """
    chunk = _place_chunk(spec, chunk)
    cache, hidden = engine.prefill(spec, weights, chunk, features, dict(slots))
    scores = _score_prompts(spec, weights.rest, chunk, hidden, scored, None)
    return ComputedPrompts(_place_cache(spec, cache), *scores)


def continue_prompts(
    spec: ModelSpec,
    weights: Weights,
    beginning: ComputedPrompts,
    chunk: Chunk,
    scored: tuple[ScoredSlots, ScoredSlots],
    *,
    slots: tuple[tuple[str, int], ...],
) -> ComputedPrompts:
    """Returns prompts of which each is the beginning, a single row, followed by its own text."""
    # The beginning is one row of the cache, which each row of the batch continues.
    chunk = _place_chunk(spec, chunk)
    cache = prefixes.repeat_prefix(spec, beginning.cache, chunk.tokens.shape[0], slots)
    cache, hidden = engine.extend(spec, weights, cache, chunk, owned=True)

    scores = _score_prompts(spec, weights.rest, chunk, hidden, scored, beginning.logits)
    return ComputedPrompts(_place_cache(spec, cache), *scores)


def score_answers(
    spec: ModelSpec,
    weights: Weights,
    computed: ComputedPrompts,
    chunk: Chunk,
    targets: tuple[Array, Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the scores of one answer to each prompt, and f32[B], that of its first token.

    Args:
      computed: the prompts; they are not changed.
      chunk: the answers without their last tokens, [B,T].
      targets: all tokens i32[B,T+1] of the answers, and which of them are used.
    """
    _, hidden = engine.extend(spec, weights, computed.cache, chunk, keep=False)
    return _score_targets(spec, weights.rest, computed.logits, hidden, targets)


@functools.partial(jax.jit, static_argnames="spec")
def _place_chunk(spec: ModelSpec, chunk: Chunk) -> Chunk:
    return axes.shard_leading_axis(chunk, spec.mesh)


def _place_cache(spec: ModelSpec, cache: KVCache) -> KVCache:
    """Returns the cache with the sharding of `axes.RULES`; without a mesh as it is."""
    return _shard_cache(spec, cache) if spec.mesh else cache


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def _shard_cache(spec: ModelSpec, cache: KVCache) -> KVCache:
    return kv_cache.shard_cache(cache, spec.mesh)


@functools.partial(jax.jit, static_argnames="spec")
def _score_prompts(
    spec: ModelSpec,
    rest: Mapping[str, Any],
    chunk: Chunk,
    hidden: jax.Array,
    scored: tuple[ScoredSlots, ScoredSlots],
    before: jax.Array | None,
) -> tuple[jax.Array, Scores, Scores]:
    """Returns the logits f32[B,V] after each row, and the scores of both kinds of scored slots.

    Args:
      hidden: [B,T,D], the states of the chunk.
      before: f32[1,V], the logits after the beginning that all rows continue; None for none.
    """
    weights = Weights((), rest)
    logits = engine.logits(spec, weights, decode.last_states(chunk, hidden))
    prompt, head = (score_slots(spec, weights, hidden, part) for part in scored)

    own = scored[0]
    if before is not None and own.tokens.shape[1]:
        # The first slot of a row is predicted by the end of the beginning.
        is_first = own.is_used[:, 0] & (own.sources[:, 0] < 0)
        first_logits = jnp.broadcast_to(before, logits.shape)
        first = score_tokens(first_logits, own.tokens[:, 0], is_first)
        prompt = prompt[0] + first[0], prompt[1] + first[1]
    return logits, prompt, head


@functools.partial(jax.jit, static_argnames="spec")
def _score_targets(
    spec: ModelSpec,
    rest: Mapping[str, Any],
    logits: jax.Array,
    hidden: jax.Array,
    targets: tuple[Array, Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the scores of tokens i32[B,T+1], and those of the first ones.

    Args:
      logits: f32[B,V], which predict the first token.
      hidden: [B,T,D], the states that predict the others.
    """
    tokens, is_used = (jnp.asarray(part) for part in targets)
    first, likeliest = score_tokens(logits, tokens[:, 0], is_used[:, 0])
    later = score_columns(spec, Weights((), rest), hidden, tokens[:, 1:], is_used[:, 1:])
    return first + later[0], likeliest + later[1], first


def score_slots(
    spec: ModelSpec, weights: Weights, hidden: jax.Array, scored: ScoredSlots
) -> Scores:
    """Returns the scores of the slots that states [B,T,D] of the same chunk predict."""
    # [B, T, D] -> [B, W, D]
    sources = jnp.maximum(jnp.asarray(scored.sources), 0)
    states = jnp.take_along_axis(hidden, sources[..., None], axis=1)
    is_used = jnp.asarray(scored.is_used & (scored.sources >= 0))
    return score_columns(spec, weights, states, jnp.asarray(scored.tokens), is_used)


def score_columns(
    spec: ModelSpec, weights: Weights, hidden: jax.Array, tokens: jax.Array, is_used: jax.Array
) -> Scores:
    """Returns the scores of the used tokens i32[B,T] of each row.

    Args:
      hidden: [B,T,D], the state that predicts each token.
    """
    if not tokens.shape[1]:
        nothing = jnp.zeros(tokens.shape[:1], jnp.int32)
        return nothing.astype(jnp.float32), nothing

    def score_column(column: tuple[jax.Array, jax.Array, jax.Array]) -> Scores:
        states, column_tokens, used = column
        return score_tokens(engine.logits(spec, weights, states), column_tokens, used)

    # One column at a time: logits of all columns together would be [B, T, V].
    columns = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (hidden, tokens, is_used))
    logprobs, likeliest = jax.lax.map(score_column, columns)
    return logprobs.sum(0), likeliest.sum(0)


@jax.jit
def score_tokens(logits: jax.Array, tokens: Array, is_used: Array) -> Scores:
    """Returns log-probabilities f32[B] of tokens i32[B], and i32[B], 1 where one is the likeliest.

    Both are 0 where bool[B] `is_used` does not hold.

    Args:
      logits: f32[B,V].
    """
    token_logits = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    logprobs = token_logits - jax.nn.logsumexp(logits, axis=-1)
    is_likeliest = logits.argmax(-1) == tokens
    return jnp.where(is_used, logprobs, 0.0), (is_likeliest & is_used).astype(jnp.int32)
