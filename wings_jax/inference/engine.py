"""Prefill, extend and step: the model over new slots, given what came before. Pure functions.

They run the same layers as training does, one after the other instead of by a scan: a cache that
a scan carries is copied at every token. `extend` is the general one, `prefill` begins a memory,
and `step` appends a token to every row. A prefix's states never depend on what follows, so a
conversation grown turn by turn equals one that is read at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from wings_jax import tree
from wings_jax.inference import kv_cache as memory_lib
from wings_jax.inference.kv_cache import KVCache
from wings_jax.model import attention, decoder
from wings_jax.model.decoder import DecoderLayer, KVInputs, LayerContext
from wings_jax.model.layers import RMSNorm, is_matrix
from wings_jax.model.layout import IMAGE, LEARNERS, MAIN, NEVER, PADDING, TEXT, Visibility
from wings_jax.model.presets import WingsArch
from wings_jax.model.wings import Wings


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What is computed, apart from the weights, and on which devices: static under jit."""

    arch: WingsArch
    dtype: str = "float32"
    kernel: str = "auto"
    mesh: Mesh | None = None

    @property
    def model(self) -> Wings:
        return Wings(self.arch, jnp.dtype(self.dtype), self.kernel)

    def learners_of(self, layer: int) -> tuple[str, ...]:
        """Returns the learners that a layer carries."""
        carriers = self.arch.learner_layers
        return self.arch.learners if carriers is None or layer in carriers else ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters as decoding reads them: the decoder's layers apart, everything else nested."""

    layers: tuple[Mapping[str, Any], ...]
    rest: Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """New slots of B rows, right-padded; decided on the host but for `step`.

    tokens     i32[B,T]    0 where the slot is not text
    modality   i32[B,T]    PADDING, TEXT or IMAGE
    positions  i32[B,T]    within the conversation
    visible_from     i32[B,T,3]  from which position on each attention sees the slot (`layout`)
    features   i32[B,T]    of an image slot: its row of the encoded features
    picks      learner -> i32[B,F], the slots of its modality in front, then T for none;
               a learner without new slots is left out
    """

    tokens: jax.Array
    modality: jax.Array
    positions: jax.Array
    visible_from: jax.Array
    features: jax.Array
    picks: Mapping[str, jax.Array]


def split_layers(params: Mapping[str, Any], spec: ModelSpec) -> Weights:
    """Returns nested parameters with the decoder's layers apart, matrices in `spec.dtype`."""
    flat = tree.flatten(params)
    params = tree.nest(
        {p: jnp.asarray(x, spec.dtype if is_matrix(p) else jnp.float32) for p, x in flat.items()}
    )
    above = dict(params["decoder"])
    stacked = above.pop("layers")
    layers = tuple(
        jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(spec.arch.decoder.num_layers)
    )
    return Weights(layers, {**params, "decoder": above})


def encode(spec: ModelSpec, weights: Weights, images: jax.Array) -> jax.Array:
    """Returns f32[n*P,D], the projected features of images u8[n,h,w,3]."""
    features = spec.model.apply({"params": weights.rest}, images[None], method=Wings.encode)
    return features[0].astype(jnp.float32)


def logits(spec: ModelSpec, weights: Weights, hidden: jax.Array) -> jax.Array:
    """Returns f32[B,V] of states [B,D]."""
    model, params = spec.model, {"params": weights.rest}
    return model.apply(params, hidden[:, None], method=Wings.logits)[:, 0]


def prefill(
    spec: ModelSpec,
    weights: Weights,
    chunk: Chunk,
    features: jax.Array | None,
    slots: Mapping[str, int],
) -> tuple[KVCache, jax.Array]:
    """Returns the memory of new conversations, with `slots` in its caches, and states [B,T,D]."""
    x0 = _stream(spec, weights, chunk, features)
    visibility, ctx = _begin(spec, chunk, x0)
    x, layers = _run(spec, weights, ctx, x0, None)
    layers = tuple(
        {
            name: tuple(memory_lib.pad_slots(attention.merge_heads(x), slots[name]) for x in pair)
            for name, pair in layer.items()
        }
        for layer in layers
    )
    return (
        KVCache(
            layers,
            {name: memory_lib.pad_visibility(s, slots[name]) for name, s in visibility.items()},
            jnp.pad(chunk.positions, [(0, 0), (0, slots["main"] - chunk.positions.shape[1])]),
            {name: jnp.int32(s.visible_from.shape[1]) for name, s in visibility.items()},
            _lengths(chunk),
        ),
        x,
    )


def forward(
    spec: ModelSpec, weights: Weights, chunk: Chunk, features: jax.Array | None
) -> jax.Array:
    """Returns the states [B,T,D] of whole conversations, of which nothing is kept."""
    x0 = _stream(spec, weights, chunk, features)
    _, ctx = _begin(spec, chunk, x0)
    return _run(spec, weights, ctx, x0, None)[0]


def extend(
    spec: ModelSpec,
    weights: Weights,
    memory: KVCache,
    chunk: Chunk,
    features: jax.Array | None = None,
) -> tuple[KVCache, jax.Array]:
    """Returns the memory with the new slots entered, and their states [B,T,D].

    The caches must have room for them (`memory.grow`) and one for each learner that has picks.
    """
    x0 = _stream(spec, weights, chunk, features)
    visibility, ctx = _begin(spec, chunk, x0)
    entered = dict(memory.visibility)
    for name, fresh in visibility.items():
        entered[name] = memory_lib.write_visibility(entered[name], fresh, memory.used[name])
    positions = jax.lax.dynamic_update_slice_in_dim(
        memory.positions, chunk.positions, memory.used["main"], axis=1
    )
    silent = KVInputs(ctx.main.visibility)
    learners = {
        name: dataclasses.replace(
            ctx.learners.get(name, silent), visibility=entered[name], start=memory.used[name]
        )
        for name in spec.arch.learners
        if name in entered
    }
    ctx = dataclasses.replace(
        ctx,
        main=KVInputs(entered["main"], memory.used["main"]),
        positions=positions,
        learners=learners,
        ungated=decoder.ungated_tokens(spec.arch, ctx.query, learners),
    )
    x, layers = _run(spec, weights, ctx, x0, memory.layers)
    used = {
        name: before + (visibility[name].visible_from.shape[1] if name in visibility else 0)
        for name, before in memory.used.items()
    }
    lengths = jnp.maximum(memory.lengths, _lengths(chunk))
    return KVCache(layers, entered, positions, used, lengths), x


def step(
    spec: ModelSpec, weights: Weights, memory: KVCache, tokens: jax.Array, active: jax.Array
) -> tuple[KVCache, jax.Array]:
    """Returns the memory with a token i32[B] appended to the active rows bool[B], and f32[B,V]."""
    column = active[:, None]
    nowhere = jnp.zeros(column.shape, jnp.int32)
    positions = jnp.where(column, memory.lengths[:, None], 0)
    order = jnp.where(column, positions, NEVER)
    chunk = Chunk(
        tokens=tokens[:, None],
        modality=jnp.where(column, TEXT, PADDING),
        positions=positions,
        visible_from=jnp.stack([order, jnp.full_like(order, NEVER), order], axis=-1),
        features=nowhere,
        picks={"textual": jnp.where(column, 0, 1)} if "textual" in spec.arch.learners else {},
    )
    memory, hidden = extend(spec, weights, memory, chunk)
    return memory, logits(spec, weights, hidden[:, 0])


def _lengths(chunk: Chunk) -> jax.Array:
    used = chunk.modality != PADDING
    return jnp.where(used, chunk.positions + 1, 0).max(1)


def _stream(
    spec: ModelSpec, weights: Weights, chunk: Chunk, features: jax.Array | None
) -> jax.Array:
    """Returns layer-0 features f32[B,T,D]: encoded images in image slots, else embeddings."""
    x0 = spec.model.apply(
        {"params": weights.rest}, chunk.tokens, method=lambda m, tokens: m.decoder.embed(tokens)
    )
    if features is None:
        return x0
    is_image = (chunk.modality == IMAGE)[..., None]
    return jnp.where(is_image, features[chunk.features], x0)


def _begin(
    spec: ModelSpec, chunk: Chunk, x0: jax.Array
) -> tuple[dict[str, Visibility], LayerContext]:
    """Returns how the new slots are seen by each attention, and their surroundings."""

    def take(x: jax.Array, picks: jax.Array, fill: int = 0) -> jax.Array:
        return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=fill))(x, picks)

    segments = (chunk.modality != PADDING).astype(jnp.int32)
    visibility = {"main": Visibility(segments, chunk.visible_from[..., MAIN])}
    learners = {}
    for name, picks in chunk.picks.items():
        order = take(chunk.visible_from[..., LEARNERS[name]], picks, NEVER)
        visibility[name] = Visibility(take(segments, picks), order)
        llm, own = decoder.rope_tables(spec.arch, take(chunk.positions, picks))
        learners[name] = KVInputs(visibility[name], None, take(x0, picks), own or llm)
    query = Visibility(segments, chunk.positions)
    table, wing_table = decoder.rope_tables(spec.arch, chunk.positions)
    return visibility, LayerContext(
        table,
        query,
        KVInputs(visibility["main"]),
        chunk.positions,
        learners,
        wing_table=wing_table,
        ungated=decoder.ungated_tokens(spec.arch, query, learners),
    )


def _run(
    spec: ModelSpec,
    weights: Weights,
    ctx: LayerContext,
    x0: jax.Array,
    caches: tuple | None,
) -> tuple[jax.Array, tuple]:
    """Returns final normed states [B,T,D], and every layer's keys and values."""
    x, made = x0.astype(spec.dtype), []
    layer = DecoderLayer(spec.arch, spec.kernel)
    for index, params in enumerate(weights.layers):
        carried = {n: ctx.learners[n] for n in spec.learners_of(index) if n in ctx.learners}
        here = dataclasses.replace(ctx, learners=carried)
        cache = {} if caches is None else caches[index]
        x, fresh = layer.apply({"params": params}, x, (1.0, cache), here)
        made.append({**cache, **fresh})
    norm = RMSNorm(spec.arch.decoder.norm_eps)
    return norm.apply({"params": weights.rest["decoder"]["norm"]}, x), tuple(made)
