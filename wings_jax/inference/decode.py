"""The jitted decoding loop: prefill or extend, then one token per step until every row is done.

Everything here is compiled once per shape; `scheduler` and `dialogue` use few shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from wings_jax import axes
from wings_jax.inference import engine, kv_cache, sampling
from wings_jax.inference.engine import Chunk, ModelSpec, Weights
from wings_jax.inference.kv_cache import KVCache
from wings_jax.inference.sampling import BatchSamplingParams
from wings_jax.model.layout import PADDING


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of B answers between two steps.

    tokens    i32[B]    the newest token of each: sampled, but not yet in the KV cache
    logprobs  f32[B]    its log-probability before any filter
    count     i32[B]    tokens of the answer so far, the newest included
    done      bool[B]   the newest is a stop token, or the last that is allowed
    seen      bool[B,V] tokens of prompt and answer; None without a repetition penalty
    """

    tokens: jax.Array
    logprobs: jax.Array
    count: jax.Array
    done: jax.Array
    seen: jax.Array | None


truncate = jax.jit(kv_cache.truncate, donate_argnums=0)
insert = jax.jit(kv_cache.insert, donate_argnums=0)
grow = jax.jit(lambda cache, slots: kv_cache.grow(cache, dict(slots)), static_argnums=1)
_find_used = jax.jit(kv_cache.find_used)
_move_slots = jax.jit(kv_cache.move_slots, donate_argnums=0)


def compact(cache: KVCache) -> KVCache:
    """Returns the cache with every row's used slots in front; the given one is of no more use."""
    # Layer by layer, as the moved slots of all would be as large as the cache.
    moved, sources = _find_used(dataclasses.replace(cache, layers=()))
    layers = tuple(_move_slots(layer, sources) for layer in cache.layers)
    return dataclasses.replace(moved, layers=layers)


@functools.partial(jax.jit, static_argnames="spec")
def encode(spec: ModelSpec, weights: Weights, images: jax.Array) -> jax.Array:
    """Returns f32[n*P,D], the projected features of images u8[n,h,w,3]."""
    return engine.encode(spec, weights, axes.shard_leading_axis(images, spec.mesh))


@functools.partial(jax.jit, static_argnums=(1, 2))
def stack_features(features: tuple[jax.Array, ...], width: int, rows: int) -> jax.Array:
    """Returns f32[rows,width]: concatenated features, cut off or padded with zeros to `rows`."""
    stacked = jnp.concatenate([*features, jnp.zeros((rows, width))])
    return stacked[:rows]


@jax.jit
def insert_rows(state: DecodeState, new_rows: DecodeState, rows: jax.Array) -> DecodeState:
    """Returns the state with row `rows[i]` replaced by row i of `new_rows`."""
    return jax.tree.map(lambda old, new: old.at[rows].set(new, mode="drop"), state, new_rows)


@functools.partial(jax.jit, static_argnames=("spec", "slots"))
def prefill(
    spec: ModelSpec,
    weights: Weights,
    chunk: Chunk,
    features: jax.Array | None,
    *,
    slots: tuple[tuple[str, int], ...],
) -> tuple[KVCache, jax.Array]:
    """Returns the KV cache of new conversations and the logits f32[B,V] after each one's last slot.

    Args:
      slots: pairs of attention and how many slots to allocate.
    """
    chunk = axes.shard_leading_axis(chunk, spec.mesh)
    cache, hidden = engine.prefill(spec, weights, chunk, features, dict(slots))
    logits = engine.logits(spec, weights, last_states(chunk, hidden))
    return kv_cache.shard_cache(cache, spec.mesh), logits


@functools.partial(jax.jit, static_argnames="spec")
def forward(
    spec: ModelSpec, weights: Weights, chunk: Chunk, features: jax.Array | None
) -> jax.Array:
    """Returns the logits f32[B,V] after each conversation's last slot, without a KV cache."""
    hidden = engine.forward(spec, weights, chunk, features)
    return engine.logits(spec, weights, last_states(chunk, hidden))


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("cache",))
def extend(
    spec: ModelSpec, weights: Weights, cache: KVCache, chunk: Chunk, features: jax.Array | None
) -> tuple[KVCache, jax.Array]:
    """Returns the KV cache with a chunk appended and the logits f32[B,V] after each last slot."""
    chunk = axes.shard_leading_axis(chunk, spec.mesh)
    cache, hidden = engine.extend(spec, weights, cache, chunk, features)
    logits = engine.logits(spec, weights, last_states(chunk, hidden))
    return kv_cache.shard_cache(cache, spec.mesh), logits


def last_states(chunk: Chunk, hidden: jax.Array) -> jax.Array:
    """Returns the states [B,D] of each row's last used slot, of [B,T,D]."""
    # Rows are right-padded; an empty row takes slot 0.
    slot_counts = (chunk.modality != PADDING).sum(1)
    last = jnp.maximum(slot_counts - 1, 0)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


@jax.jit
def begin(
    logits: jax.Array, params: BatchSamplingParams, stops: jax.Array, seen: jax.Array | None
) -> DecodeState:
    """Returns the answers with their first tokens, sampled from f32[B,V].

    A row whose limit is 0 is done at once.

    Args:
      stops: i32[n], the tokens that end an answer.
    """
    return resume(logits, params, stops, jnp.zeros(logits.shape[:1], jnp.int32), seen)


@jax.jit
def resume(
    logits: jax.Array,
    params: BatchSamplingParams,
    stops: jax.Array,
    count: jax.Array,
    seen: jax.Array | None,
) -> DecodeState:
    """Returns the answers, which have count i32[B] tokens already, with the next token each."""
    # The state before the next token: a row at its limit is done and gets none.
    no_tokens = jnp.zeros(count.shape, jnp.int32)
    no_logprobs = jnp.zeros(count.shape)
    state = DecodeState(no_tokens, no_logprobs, count, jnp.asarray(params.limits <= count), seen)
    return _sample_next(state, logits, params, stops)


def _sample_next(
    state: DecodeState, logits: jax.Array, params: BatchSamplingParams, stops: jax.Array
) -> DecodeState:
    """Returns the answers with one more token each, where they are not done."""
    tokens = sampling.sample_tokens(logits, params, state.count, state.seen)
    token_logits = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    logprobs = token_logits - jax.nn.logsumexp(logits, axis=-1)

    # A row that is done keeps its last token and count.
    tokens = jnp.where(state.done, state.tokens, tokens)
    count = jnp.where(state.done, state.count, state.count + 1)

    # [B, 1] == [n] -> [B, n]: any stop token ends an answer.
    is_stop = (tokens[:, None] == stops).any(1)
    done = state.done | is_stop | (count >= params.limits)

    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
    return DecodeState(tokens, logprobs, count, done, seen)


@functools.partial(jax.jit, static_argnames=("spec", "steps"), donate_argnames=("cache", "state"))
def decode(
    spec: ModelSpec,
    weights: Weights,
    cache: KVCache,
    state: DecodeState,
    params: BatchSamplingParams,
    stops: jax.Array,
    *,
    steps: int,
) -> tuple[KVCache, DecodeState, Mapping[str, jax.Array]]:
    """Generates up to `steps` tokens per row, or until all rows are done.

    Returns:
      The new cache and state, and what was generated: tokens i32[steps,B] and logprobs
      f32[steps,B]. Valid of a row are its first entries, as many as its `count` grew by.
    """
    # Fixed shapes: entries after a row's last token are not used.
    rows = state.tokens.shape[0]
    generated = {
        "tokens": jnp.zeros((steps, rows), jnp.int32),
        "logprobs": jnp.zeros((steps, rows), jnp.float32),
    }

    def is_unfinished(carry: tuple) -> jax.Array:
        index, _, state, _ = carry
        return (index < steps) & ~state.done.all()

    def body(carry: tuple) -> tuple:
        index, cache, state, generated = carry
        cache, logits = engine.step(spec, weights, cache, state.tokens, ~state.done)
        cache = kv_cache.shard_cache(cache, spec.mesh)
        state = _sample_next(state, logits, params, stops)

        generated = {
            "tokens": generated["tokens"].at[index].set(state.tokens),
            "logprobs": generated["logprobs"].at[index].set(state.logprobs),
        }
        return index + 1, cache, state, generated

    # A while loop, not a scan: it ends early, and updates the cache in place.
    carry = jnp.int32(0), cache, state, generated
    _, cache, state, generated = jax.lax.while_loop(is_unfinished, body, carry)
    return cache, state, generated
