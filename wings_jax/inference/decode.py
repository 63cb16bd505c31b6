"""The jitted loop: prefill or extend, choose, and then a token a step until every row is done.

Everything here is compiled once per shape; `generator` keeps the shapes few.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """B answers in the making.

    tokens   i32[B]    the newest token of each: chosen, but not yet in the memory
    logprobs f32[B]    its log-probability before any filter
    count    i32[B]    tokens of the answer so far, the newest included
    done     bool[B]   the newest is a stop token, or the last that is allowed
    seen     bool[B,V] tokens of prompt and answer; None without a repetition penalty
    """

    tokens: jax.Array
    logprobs: jax.Array
    count: jax.Array
    done: jax.Array
    seen: jax.Array | None


compact = jax.jit(kv_cache.compact)
truncate = jax.jit(kv_cache.truncate, donate_argnums=0)
insert = jax.jit(kv_cache.insert, donate_argnums=0)
grow = jax.jit(lambda before, slots: kv_cache.grow(before, dict(slots)), static_argnums=1)


@functools.partial(jax.jit, static_argnames="spec")
def encode(spec: ModelSpec, weights: Weights, images: jax.Array) -> jax.Array:
    """Returns f32[n*P,D], the projected features of images u8[n,h,w,3]."""
    return engine.encode(spec, weights, axes.shard_leading_axis(images, spec.mesh))


@functools.partial(jax.jit, static_argnums=(1, 2))
def stack(features: tuple[jax.Array, ...], width: int, rows: int) -> jax.Array:
    """Returns f32[rows,width]: features below each other, what is too much cut off, then zeros."""
    whole = jnp.concatenate([*features, jnp.zeros((rows, width))])
    return whole[:rows]


@jax.jit
def put(running: DecodeState, guests: DecodeState, rows: jax.Array) -> DecodeState:
    """Returns the answers with guest g in place of row `rows[g]`; past the end: nowhere."""
    return jax.tree.map(lambda old, new: old.at[rows].set(new, mode="drop"), running, guests)


@functools.partial(jax.jit, static_argnames=("spec", "slots"))
def prefill(
    spec: ModelSpec,
    weights: Weights,
    chunk: Chunk,
    features: jax.Array | None,
    *,
    slots: tuple[tuple[str, int], ...],
) -> tuple[KVCache, jax.Array]:
    """Returns new conversations' memory and f32[B,V] behind the last slot of each."""
    chunk = axes.shard_leading_axis(chunk, spec.mesh)
    grown, hidden = engine.prefill(spec, weights, chunk, features, dict(slots))
    return kv_cache.shard_cache(grown, spec.mesh), engine.logits(
        spec, weights, _last(chunk, hidden)
    )


@functools.partial(jax.jit, static_argnames="spec")
def forward(
    spec: ModelSpec, weights: Weights, chunk: Chunk, features: jax.Array | None
) -> jax.Array:
    """Returns f32[B,V] behind the last slot of each conversation, of which nothing is kept."""
    hidden = engine.forward(spec, weights, chunk, features)
    return engine.logits(spec, weights, _last(chunk, hidden))


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("before",))
def extend(
    spec: ModelSpec, weights: Weights, before: KVCache, chunk: Chunk, features: jax.Array | None
) -> tuple[KVCache, jax.Array]:
    """Returns the memory with the chunk appended and f32[B,V] behind the last slot of each."""
    chunk = axes.shard_leading_axis(chunk, spec.mesh)
    grown, hidden = engine.extend(spec, weights, before, chunk, features)
    return kv_cache.shard_cache(grown, spec.mesh), engine.logits(
        spec, weights, _last(chunk, hidden)
    )


def _last(chunk: Chunk, hidden: jax.Array) -> jax.Array:
    """Returns the states [B,D] of each row's last used slot."""
    index = jnp.maximum((chunk.modality > 0).sum(1) - 1, 0)
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


@jax.jit
def begin(
    logits: jax.Array, choice: BatchSamplingParams, stops: jax.Array, seen: jax.Array | None
) -> DecodeState:
    """Returns the answers with their first tokens, chosen from f32[B,V].

    `stops` i32[n] are the tokens that end an answer. A row whose limit is 0 is done at once.
    """
    return resume(logits, choice, stops, jnp.zeros(logits.shape[:1], jnp.int32), seen)


@jax.jit
def resume(
    logits: jax.Array,
    choice: BatchSamplingParams,
    stops: jax.Array,
    count: jax.Array,
    seen: jax.Array | None,
) -> DecodeState:
    """Returns the answers, of which count i32[B] tokens have been said, with the next tokens."""
    blank = jnp.zeros(count.shape, jnp.int32)
    before = DecodeState(blank, jnp.zeros(count.shape), count, choice.limits <= count, seen)
    return _advance(before, logits, choice, stops)


def _advance(
    before: DecodeState, logits: jax.Array, choice: BatchSamplingParams, stops: jax.Array
) -> DecodeState:
    """Returns the answers with one more token each, where they are not done."""
    tokens = sampling.sample_tokens(logits, choice, before.count, before.seen)
    picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    logprobs = picked - jax.nn.logsumexp(logits, axis=-1)
    tokens = jnp.where(before.done, before.tokens, tokens)
    count = before.count + ~before.done
    ended = (tokens[:, None] == stops).any(1) | (count >= choice.limits)
    seen = before.seen
    if seen is not None:
        seen = seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
    return DecodeState(tokens, logprobs, count, before.done | ended, seen)


@functools.partial(
    jax.jit, static_argnames=("spec", "steps"), donate_argnames=("before", "running")
)
def decode(
    spec: ModelSpec,
    weights: Weights,
    before: KVCache,
    running: DecodeState,
    choice: BatchSamplingParams,
    stops: jax.Array,
    *,
    steps: int,
) -> tuple[KVCache, DecodeState, Mapping[str, jax.Array]]:
    """Goes on for up to `steps` tokens, or until all rows are done.

    Returns:
      memory and running as they are then, and what was said meanwhile: tokens i32[steps,B] and
      logprobs f32[steps,B], of which a row's first `running.count - count before` are its own.
    """
    rows = running.tokens.shape[0]
    said = {
        "tokens": jnp.zeros((steps, rows), jnp.int32),
        "logprobs": jnp.zeros((steps, rows), jnp.float32),
    }

    def go_on(carry: tuple) -> jax.Array:
        index, _, running, _ = carry
        return (index < steps) & ~running.done.all()

    def body(carry: tuple) -> tuple:
        index, before, running, said = carry
        after, logits = engine.step(spec, weights, before, running.tokens, ~running.done)
        after = kv_cache.shard_cache(after, spec.mesh)
        running = _advance(running, logits, choice, stops)
        said = {
            "tokens": said["tokens"].at[index].set(running.tokens),
            "logprobs": said["logprobs"].at[index].set(running.logprobs),
        }
        return index + 1, after, running, said

    _, after, running, said = jax.lax.while_loop(go_on, body, (jnp.int32(0), before, running, said))
    return after, running, said
