"""The decoder's layers one after the other, with KV caches; each a program that others share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from wings_jax.inference import kv_cache
from wings_jax.model import attention
from wings_jax.model.context import Cache, LayerContext
from wings_jax.model.decoder import DecoderLayer
from wings_jax.model.layers import RMSNorm
from wings_jax.model.switches import LayerSwitches, layer_switch

if TYPE_CHECKING:
    from wings_jax.inference.engine import ModelSpec, Weights


def run_layers(
    spec: ModelSpec,
    weights: Weights,
    ctx: LayerContext,
    x0: jax.Array,
    caches: tuple[Cache, ...] | None,
    *,
    slots: tuple[tuple[str, int], ...] = (),
    owned: bool = False,
    keep: bool = True,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Returns normalized final states [B,T,D], and the keys and values [B*K,S,H] of every layer.

    Outside of jit, a layer is a program of its own, which layers of one kind share.

    Args:
      caches: of every layer, into which new keys and values are written; None to start with.
      slots: without `caches`, how many slots each attention gets.
      owned: whether the buffers of `caches` are reused, outside of jit.
      keep: whether keys and values are wanted.
    """
    run = _run_owned_layer if owned else _run_layer
    x = x0.astype(spec.dtype)
    new_caches = []
    for index, params in enumerate(weights.layers):
        learners = {n: ctx.learners[n] for n in spec.learners_of(index) if n in ctx.learners}
        layer_ctx = dataclasses.replace(ctx, learners=learners)
        cache = {} if caches is None else caches[index]
        switch = layer_switch(spec.arch, index)
        x, cache = run(spec, switch, slots, keep, params, x, cache, layer_ctx)
        new_caches.append(cache)

    return _normalize(spec, weights.rest, x), tuple(new_caches) if keep else ()


def _apply_layer(
    spec: ModelSpec,
    switch: LayerSwitches,
    slots: tuple[tuple[str, int], ...],
    keep: bool,
    params: Mapping[str, Any],
    x: jax.Array,
    cache: Cache,
    ctx: LayerContext,
) -> tuple[jax.Array, Cache]:
    """Returns what a layer adds to the stream [B,T,D], and its keys and values, {} to drop them."""
    layer = DecoderLayer(spec.arch, spec.kernel)
    x, keys_values = layer.apply({"params": params}, x, (switch, cache), ctx)
    if not keep:
        return x, {}

    # Of a new cache: [B, T, K, H] -> [B*K, slots, H]
    sizes = dict(slots)
    if sizes:
        keys_values = {
            name: (
                kv_cache.pad_slots(attention.merge_heads(k), sizes[name]),
                kv_cache.pad_slots(attention.merge_heads(v), sizes[name]),
            )
            for name, (k, v) in keys_values.items()
        }
    return x, {**cache, **keys_values}


_LAYER_STATIC = ("spec", "switch", "slots", "keep")
_run_layer = jax.jit(_apply_layer, static_argnames=_LAYER_STATIC)
_run_owned_layer = jax.jit(_apply_layer, static_argnames=_LAYER_STATIC, donate_argnames="cache")


@functools.partial(jax.jit, static_argnames="spec")
def _normalize(spec: ModelSpec, rest: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """Returns the stream [B,T,D] after the final norm."""
    norm = RMSNorm(spec.arch.decoder.norm_eps)
    hidden: Any = norm.apply({"params": rest["decoder"]["norm"]}, x)
    return hidden
