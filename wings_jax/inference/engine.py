"""Prefill, extend and step: the model over new slots with a KV cache. Pure functions.

They apply the same layers as training does, one after the other instead of by a scan: a cache
that a scan carries is copied at every token. `prefill` starts a cache, `extend` appends any slots
to it, and `step` appends one token to every row. The states of a prefix never depend on what
follows, so a conversation that grows turn by turn equals one that is computed at once.

Under jit they are one program, which decoding needs. Outside of it they are a few small programs
(`layer_programs`) that all layers share, which compile in a fraction of the time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from wings_jax import tree
from wings_jax.inference import kv_cache, layer_programs
from wings_jax.inference.kv_cache import KVCache
from wings_jax.model import joined
from wings_jax.model.context import KVInputs, LayerContext, rope_tables, ungated_tokens
from wings_jax.model.layers import is_matrix
from wings_jax.model.layout import IMAGE, LEARNERS, MAIN, NEVER, PADDING, TEXT, Array, Visibility
from wings_jax.model.presets import WingsArch
from wings_jax.model.wings import Wings


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What is computed, apart from the weights, and on which devices: static under jit.

    arch    the architecture
    dtype   of matrices, activations and caches
    kernel  attention kernel (`attention.attend`)
    mesh    devices that share weights and caches; None for one device
    """

    arch: WingsArch
    dtype: str = "float32"
    kernel: str = "auto"
    mesh: Mesh | None = None

    @property
    def model(self) -> Wings:
        """Returns the module whose methods encode images, embed tokens and compute logits."""
        return Wings(self.arch, jnp.dtype(self.dtype), self.kernel)

    def learners_of(self, layer: int) -> tuple[str, ...]:
        """Returns the learners of a layer."""
        carriers = self.arch.learner_layers
        return self.arch.learners if carriers is None or layer in carriers else ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters in the form that decoding needs.

    layers  the decoder's layers, each a nested dict; on one device with joined kernels
            (`model/joined.py`)
    rest    everything else, nested: vision, projector, decoder/{embed, norm, head}
    """

    layers: tuple[Mapping[str, Any], ...]
    rest: Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """New slots of B rows, right-padded; computed on the host except in `step`.

    tokens        i32[B,T]    0 where the slot is not text
    modality      i32[B,T]    PADDING, TEXT or IMAGE
    positions     i32[B,T]    within the conversation
    visible_from  i32[B,T,3]  first query position that each attention's key is visible to
    features      i32[B,T]    of an image slot: its row of the encoded features
    picks         learner -> i32[B,F], the slots of its modality, then T as filling;
                  a learner without new slots is left out
    segments      i32[B,T]    conversation of each slot, where a row has several; None: one a row
    branches      i32[B,T]    `layout.Visibility.branches`
    """

    tokens: Array
    modality: Array
    positions: Array
    visible_from: Array
    features: Array
    picks: Mapping[str, Array]
    segments: Array | None = None
    branches: Array | None = None


def split_layers(params: Mapping[str, Any], spec: ModelSpec, *, release: bool = False) -> Weights:
    """Returns nested parameters as `Weights`: matrices in `spec.dtype`, all else in float32.

    Args:
      release: whether parameters are deleted one by one as they are split, so that the layers are
        never in memory twice; `params` cannot be used afterwards.
    """
    flat = {
        path: jnp.asarray(x, spec.dtype if is_matrix(path) else jnp.float32)
        for path, x in tree.flatten(params).items()
    }
    nested = tree.nest(flat)
    above_layers = dict(nested["decoder"])
    stacked = tree.flatten(above_layers.pop("layers"))

    # [L, ...] -> L times [...], one parameter after the other
    layers: list[dict[str, Any]] = [{} for _ in range(spec.arch.decoder.num_layers)]
    for path, values in stacked.items():
        for index, layer in enumerate(layers):
            layer[path] = values[index]
        if release:
            jax.block_until_ready([layer[path] for layer in layers])
            values.delete()

    # Heads that devices share stay as they are. One layer after the other frees what it joins.
    if spec.mesh is None:
        for index, layer in enumerate(layers):
            layers[index] = jax.block_until_ready(joined.join_kernels(layer))
            layer.clear()
    return Weights(tuple(map(tree.nest, layers)), {**nested, "decoder": above_layers})


def encode(spec: ModelSpec, weights: Weights, images: jax.Array) -> jax.Array:
    """Returns f32[n*P,D], the projected features of images u8[n,h,w,3]."""
    features = spec.model.apply({"params": weights.rest}, images[None], method=Wings.encode)
    return features[0].astype(jnp.float32)


def logits(spec: ModelSpec, weights: Weights, hidden: jax.Array) -> jax.Array:
    """Returns f32[B,V] of final states [B,D]."""
    model, params = spec.model, {"params": weights.rest}
    scores: Any = model.apply(params, hidden[:, None], method=Wings.logits)
    return scores[:, 0]


def prefill(
    spec: ModelSpec,
    weights: Weights,
    chunk: Chunk,
    features: jax.Array | None,
    slots: Mapping[str, int],
) -> tuple[KVCache, jax.Array]:
    """Returns the KV cache of new conversations and their final states [B,T,D].

    Args:
      features: f32[n,D], encoded images; None if the chunk has no image slots.
      slots: attention -> how many slots to allocate, at least those of the chunk.
    """
    x0, visibility, ctx = _begin(spec, weights.rest, chunk, features)
    x, layers = layer_programs.run_layers(
        spec, weights, ctx, x0, None, slots=tuple(sorted(slots.items()))
    )
    more = slots["main"] - chunk.positions.shape[1]
    cache = KVCache(
        layers=layers,
        visibility={
            name: kv_cache.pad_visibility(keys, slots[name]) for name, keys in visibility.items()
        },
        positions=jnp.pad(chunk.positions, [(0, 0), (0, more)]),
        used={name: jnp.int32(keys.visible_from.shape[1]) for name, keys in visibility.items()},
        lengths=_lengths(chunk),
    )
    return cache, x


def forward(
    spec: ModelSpec, weights: Weights, chunk: Chunk, features: jax.Array | None
) -> jax.Array:
    """Returns the final states [B,T,D] of whole conversations, without a KV cache."""
    x0, _, ctx = _begin(spec, weights.rest, chunk, features)
    return layer_programs.run_layers(spec, weights, ctx, x0, None, keep=False)[0]


def extend(
    spec: ModelSpec,
    weights: Weights,
    cache: KVCache,
    chunk: Chunk,
    features: jax.Array | None = None,
    *,
    owned: bool = False,
    keep: bool = True,
) -> tuple[KVCache, jax.Array]:
    """Returns the KV cache with a chunk appended, and the chunk's final states [B,T,D].

    The cache must have free slots for the chunk (`kv_cache.grow`), and a buffer for each learner
    that has picks.

    Args:
      features: f32[n,D], encoded images; None if the chunk has no image slots.
      owned: whether the buffers of `cache` are reused, outside of jit; it is then of no more use.
      keep: whether the layers of the new cache are wanted; without, it has none.
    """
    # What differs between layers apart, so that a layer is compiled once.
    rest = dataclasses.replace(cache, layers=())
    x0, ctx, extended = _begin_extend(spec, weights.rest, rest, chunk, features)
    hidden, layers = layer_programs.run_layers(
        spec, weights, ctx, x0, cache.layers, owned=owned, keep=keep
    )
    return dataclasses.replace(extended, layers=layers), hidden


@functools.partial(jax.jit, static_argnames="spec")
def _begin(
    spec: ModelSpec, rest: Mapping[str, Any], chunk: Chunk, features: jax.Array | None
) -> tuple[jax.Array, dict[str, Visibility], LayerContext]:
    """Returns layer-0 features, visibility of the new keys, and the context of every layer."""
    x0 = _embed(spec, rest, chunk, features)
    return x0, *_layer_context(spec, chunk, x0)


@functools.partial(jax.jit, static_argnames="spec")
def _begin_extend(
    spec: ModelSpec,
    rest: Mapping[str, Any],
    cache: KVCache,
    chunk: Chunk,
    features: jax.Array | None,
) -> tuple[jax.Array, LayerContext, KVCache]:
    """Returns layer-0 features, the context of every layer, and the new cache without layers."""
    x0, new_visibility, ctx = _begin(spec, rest, chunk, features)

    # Write the new slots' visibility and positions: [B, S] with [B, T] from `used` on.
    visibility = dict(cache.visibility)
    for name, new in new_visibility.items():
        visibility[name] = kv_cache.write_visibility(visibility[name], new, cache.used[name])
    positions = jax.lax.dynamic_update_slice_in_dim(
        cache.positions, chunk.positions, cache.used["main"], axis=1
    )

    # A learner without new slots computes no keys, but queries may attend to its cached ones.
    no_new_keys = KVInputs(ctx.main.visibility)
    learners = {
        name: dataclasses.replace(
            ctx.learners.get(name, no_new_keys),
            visibility=visibility[name],
            start=cache.used[name],
        )
        for name in spec.arch.learners
        if name in visibility
    }

    # The keys are now all S slots of the cache; the queries are the T new slots.
    ctx = dataclasses.replace(
        ctx,
        main=KVInputs(visibility["main"], cache.used["main"]),
        positions=positions,
        learners=learners,
        ungated=ungated_tokens(spec.arch, ctx.query, learners),
    )

    # Every attention's buffer is filled by as many slots as were written.
    used = dict(cache.used)
    for name, new in new_visibility.items():
        used[name] = cache.used[name] + new.visible_from.shape[1]
    lengths = jnp.maximum(cache.lengths, _lengths(chunk))
    return x0, ctx, KVCache((), visibility, positions, used, lengths)


def step(
    spec: ModelSpec, weights: Weights, cache: KVCache, tokens: jax.Array, active: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Returns the KV cache with one token per row appended, and the logits f32[B,V] after it.

    Args:
      tokens: i32[B].
      active: bool[B]; for the other rows an empty slot is written.
    """
    # [B] -> [B, 1]
    is_active = active[:, None]
    positions = jnp.where(is_active, cache.lengths[:, None], 0)

    # Text slots are keys of the main attention and of the textual learner, never of the visual.
    visible_from = jnp.where(is_active, positions, NEVER)
    never = jnp.full_like(visible_from, NEVER)
    picks = {"textual": jnp.where(is_active, 0, 1)} if "textual" in spec.arch.learners else {}

    chunk = Chunk(
        tokens=tokens[:, None],
        modality=jnp.where(is_active, TEXT, PADDING),
        positions=positions,
        visible_from=jnp.stack([visible_from, never, visible_from], axis=-1),
        features=jnp.zeros_like(positions),
        picks=picks,
    )
    cache, hidden = extend(spec, weights, cache, chunk)
    return cache, logits(spec, weights, hidden[:, 0])


def _lengths(chunk: Chunk) -> jax.Array:
    """Returns i32[B], the position after each row's last slot; 0 for an empty row."""
    is_used = chunk.modality != PADDING
    return jnp.where(is_used, chunk.positions + 1, 0).max(1)


def _embed(
    spec: ModelSpec, rest: Mapping[str, Any], chunk: Chunk, features: jax.Array | None
) -> jax.Array:
    """Returns layer-0 features f32[B,T,D]: encoded images in image slots, else embeddings."""
    x0: Any = spec.model.apply(
        {"params": rest}, chunk.tokens, method=lambda m, tokens: m.decoder.embed(tokens)
    )
    if features is None:
        return x0

    # [n, D] -> [B, T, D]
    is_image = (chunk.modality == IMAGE)[..., None]
    return jnp.where(is_image, features[chunk.features], x0)


def _gather_slots(array: Array, picks: Array, fill: int = 0) -> jax.Array:
    """Returns [B,F,...], the picked slots i32[B,F] of [B,T,...]; `fill` where a pick is T."""
    return jax.vmap(lambda row, index: row.at[index].get(mode="fill", fill_value=fill))(
        array, picks
    )


def _layer_context(
    spec: ModelSpec, chunk: Chunk, x0: jax.Array
) -> tuple[dict[str, Visibility], LayerContext]:
    """Returns the visibility of the new keys by attention, and the context of every layer.

    In this context the chunk's own slots are the only keys; `extend` replaces that.
    """
    # Padding has segment 0; a row's conversation, if it is one, has segment 1.
    segments, branches = chunk.segments, chunk.branches
    if segments is None:
        segments = (chunk.modality != PADDING).astype(jnp.int32)
    query = Visibility(segments, chunk.positions, branches)
    visibility = {"main": Visibility(segments, chunk.visible_from[..., MAIN], branches)}

    # A learner's keys are packed: only the F slots of its modality.
    learners = {}
    for name, picks in chunk.picks.items():
        visible_from = _gather_slots(chunk.visible_from[..., LEARNERS[name]], picks, NEVER)
        visibility[name] = Visibility(
            _gather_slots(segments, picks),
            visible_from,
            None if branches is None else _gather_slots(branches, picks),
        )
        llm_table, learner_table = rope_tables(spec.arch, _gather_slots(chunk.positions, picks))
        learners[name] = KVInputs(
            visibility[name],
            x0=_gather_slots(x0, picks),
            rope_table=learner_table or llm_table,
        )

    llm_table, learner_table = rope_tables(spec.arch, chunk.positions)
    return visibility, LayerContext(
        rope_table=llm_table,
        query=query,
        main=KVInputs(visibility["main"]),
        positions=chunk.positions,
        learners=learners,
        learner_rope_table=learner_table,
        ungated=ungated_tokens(spec.arch, query, learners),
    )
