"""The decoder (Qwen2, Llama) with its wings: learners and router in parallel to attention.

For one layer (WINGS, equations 4 and 5, with the paper's semantics made exact):

    h      = RMSNorm(x)
    main   = O(attend(rope(Q h), rope(K h), V h))                       text and image slots
    wing_m = O_m(attend(rope(h(1+Q_m)), rope(x0(1+K_m)), x0(1+V_m)))    slots of modality m only
    gate   = softmax_m(silu(sum_heads a W_m + b_m))                     a: main attention rows
    x      = x + main + gain * sum_m gate_m wing_m
    x      = x + mlp(RMSNorm(x))

x0 are the layer-0 features: projected image features and token embeddings. With a prefix, main is
O(attend(...) + tanh(gate) attend(rope(Q h), K', V')), with K', V' trained. The authors' release
differs in a few values (`presets.Semantics`), which are named where they are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from wings_jax import axes
from wings_jax.model import attention
from wings_jax.model import layout as layout_lib
from wings_jax.model.layers import INIT, GatedMlp, Prefix, Projection, RMSNorm, rope, rope_table
from wings_jax.model.layout import IMAGE, LEARNERS, MAIN, Layout, Visibility
from wings_jax.model.presets import WingsArch

# Attention -> keys and values of the slots that it has seen, each [B*K,S,H] (`attention.attend`).
Cache = Mapping[str, tuple[jax.Array, jax.Array]]

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVInputs:
    """What one attention's keys and values are made from, and how they are seen.

    Without a cache the keys are the fresh ones; with one they are the cache's S slots with the
    fresh ones written in from slot `start` on. A learner's slots may be packed: those of other
    modalities need not be among them.

    visibility  Sight [B,S]   of all slots that may be seen
    start  i32[]         where in the cache the fresh keys go; None without a cache
    x0     f32[B,F,D]    a learner's fresh layer-0 features; None where nothing is written
    table  cos, sin      f32[B,F,H/2] at their positions
    """

    visibility: Visibility
    start: jax.Array | None = None
    x0: jax.Array | None = None
    table: tuple[jax.Array, jax.Array] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerContext:
    """What every layer reads besides the residual stream of its T slots.

    table      cos, sin    f32[B,T,H/2] at their positions
    query      Sight [B,T]
    main       Source of the main attention (whose x0 is the stream itself)
    positions  i32[B,S]    of the main attention's slots: the router's weights go by them
    learners   Source by learner; one that has no slot to see anywhere may be left out
    classes    f32[B,S,C]  values to probe the main attention with (attention masses), or None
    wing_table as `table`, for the learners' queries; None where it is the same
    alone      bool[B,T]   where a learner counts 1 because it alone sees anything; None: nowhere
    """

    table: tuple[jax.Array, jax.Array]
    query: Visibility
    main: KVInputs
    positions: jax.Array
    learners: Mapping[str, KVInputs]
    classes: jax.Array | None = None
    wing_table: tuple[jax.Array, jax.Array] | None = None
    ungated: jax.Array | None = None


def _extend(
    cached: tuple[jax.Array, jax.Array] | None,
    fresh: tuple[jax.Array, jax.Array],
    start: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns all keys and values: the cache [B*K,S,H] with the fresh [B,F,K,H] written in."""
    if cached is None:
        return fresh
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(
            old, attention.merge_heads(new.astype(old.dtype)), start, axis=1
        )
        for old, new in zip(cached, fresh, strict=True)
    )


class Attention(nn.Module):
    """The main attention, [B,T,D] -> [B,T,D], its probes f32[B,T,N,C], and its keys and values."""

    arch: WingsArch
    kernel: str

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        ctx: LayerContext,
        probes: jax.Array | None,
        cached: tuple[jax.Array, jax.Array] | None,
        prefix: Prefix | None,
    ) -> tuple[jax.Array, jax.Array | None, tuple[jax.Array, jax.Array]]:
        decoder = self.arch.decoder

        def project(name: str, eqn: str, sizes: Mapping[str, int], *, bias: bool) -> Projection:
            rank = self.arch.lora_rank if name in self.arch.lora_targets else 0
            scale = self.arch.lora_alpha / max(rank, 1)
            return Projection(eqn, sizes, bias=bias, rank=rank, scale=scale, name=name)

        heads = {"N": decoder.num_heads, "K": decoder.num_kv_heads, "H": decoder.head_dim}
        bias = decoder.qkv_bias
        q = rope(project("q", "BTD,DNH->BTNH", heads, bias=bias)(h), ctx.table)
        k = rope(project("k", "BTD,DKH->BTKH", heads, bias=bias)(h), ctx.table)
        v = project("v", "BTD,DKH->BTKH", heads, bias=bias)(h)
        kept = _extend(cached, (k, v), ctx.main.start)
        out, probed = attention.attend(
            q, *kept, query=ctx.query, key=ctx.main.visibility, probes=probes, kernel=self.kernel
        )
        if prefix is not None:
            out = out + prefix(q, ctx.query)
        width = {"D": decoder.hidden_size}
        return project("o", "BTNH,NHD->BTD", width, bias=False)(out), probed, kept


class Learner(nn.Module):
    """A LoRRA learner (eq. 4), [B,T,D] -> [B,T,D], and its keys and values.

    Always as many kv heads as query heads. Exactly 0 at initialisation (b of `o` is zero) and
    for a query that sees no slot of the learner's modality.
    """

    arch: WingsArch
    kernel: str

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        ctx: LayerContext,
        source: KVInputs,
        cached: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        decoder, rank = self.arch.decoder, self.arch.rank
        heads = {"N": decoder.num_heads, "H": decoder.head_dim}

        def residual(name: str, x: jax.Array) -> jax.Array:
            return Projection("BTD,DNH->BTNH", heads, base="identity", rank=rank, name=name)(x)

        q = rope(residual("q", h), ctx.wing_table or ctx.table)
        kept = cached
        if source.x0 is not None:
            x0 = source.x0.astype(h.dtype)
            k = rope(residual("k", x0), source.table)
            kept = _extend(cached, (k, residual("v", x0)), source.start)
        out, _ = attention.attend(
            q, *kept, query=ctx.query, key=source.visibility, kernel=self.kernel
        )
        width = {"D": decoder.hidden_size}
        return Projection("BTNH,NHD->BTD", width, base="none", rank=rank, name="o")(out), kept


class Router(nn.Module):
    """Weighs the learners per token from the main attention's rows.

    `values` are the weights W at the keys' positions, f32[B,S,M]: probes of the main attention.
    `__call__` turns the head-summed probes f32[B,T,M] into gates f32[B,T,M] that add up to 1.
    """

    learners: int
    positions: int

    def setup(self) -> None:
        bound = self.positions**-0.5

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel = nn.with_logical_partitioning(uniform, ("M", None))
        bias = nn.with_logical_partitioning(nn.initializers.zeros, ("M",))
        shape = (self.learners, self.positions)
        self.kernel = self.param("kernel", kernel, shape, jnp.float32)
        self.bias = self.param("bias", bias, (self.learners,), jnp.float32)

    def values(self, positions: jax.Array) -> jax.Array:
        return self.kernel.astype(jnp.float32).T[positions]

    def __call__(self, summed: jax.Array) -> jax.Array:
        return jax.nn.softmax(jax.nn.silu(summed + self.bias.astype(jnp.float32)), axis=-1)


class DecoderLayer(nn.Module):
    """One layer: residual stream [B,T,D] -> [B,T,D], and the layer's cache.

    `layer` is its switch (1 where it carries learners, else 0) and its cache: None for none,
    {} to begin one, from which the fresh keys and values [B,T,K,H] are returned.

    Sown under `intermediates` for analysis and tests: hidden, gates, head_masses (the probes of
    `classes`, f32[B,T,N,C]) and masses (their mean over heads), visual_wing and textual_wing
    (before their gates), and main_norm, visual_norm, textual_norm: f32[B,T], the length of what
    the main attention and each learner, gated, add to the stream.
    """

    arch: WingsArch
    kernel: str = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: tuple[jax.Array, Cache | None], ctx: LayerContext
    ) -> tuple[jax.Array, Cache | None]:
        switch, cache = layer
        arch, decoder = self.arch, self.arch.decoder
        cached = dict(cache) if cache is not None else {}
        h = RMSNorm(decoder.norm_eps, name="norm_attn")(x)
        router = Router(len(arch.learners), arch.router_positions, name="router")
        probes = [router.values(ctx.positions)] if arch.router else []
        probes += [ctx.classes] if ctx.classes is not None else []
        probes = jnp.concatenate(probes, axis=-1) if probes else None
        prefix = None
        if arch.prefix_length:
            prefix = Prefix(arch.prefix_length, decoder.num_kv_heads, name="prefix")
        attend = Attention(arch, self.kernel, name="attn")
        main, probed, kept = attend(h, ctx, probes, cached.get("main"), prefix)
        fresh = {"main": kept}
        gates = jnp.ones((*x.shape[:2], len(arch.learners)), jnp.float32)
        if arch.router:
            gates = router(probed[..., : len(arch.learners)].sum(2))
            self.sow("intermediates", "gates", gates)
        if ctx.classes is not None:
            masses = probed[..., -ctx.classes.shape[-1] :]
            self.sow("intermediates", "head_masses", masses)
            self.sow("intermediates", "masses", masses.mean(2))
        gates = gates * (arch.gain * switch)
        if ctx.ungated is not None:
            gates = jnp.where(ctx.ungated[..., None], switch, gates)
        gates = gates.astype(x.dtype)
        update = main
        self.sow("intermediates", "main_norm", _norm(main))
        asking = h if arch.semantics.query == "normed" else x + main
        for m, name in enumerate(arch.learners):
            if name not in ctx.learners:
                continue
            learner = Learner(arch, self.kernel, name=name)
            wing, fresh[name] = learner(asking, ctx, ctx.learners[name], cached.get(name))
            self.sow("intermediates", f"{name}_wing", wing)
            added = gates[..., m : m + 1] * wing
            self.sow("intermediates", f"{name}_norm", _norm(added))
            update = update + added
        x = x + update
        targets = {n: arch.lora_rank for n in arch.lora_targets if arch.lora_rank}
        scale = arch.lora_alpha / max(arch.lora_rank, 1)
        mlp = GatedMlp(decoder.ffn_size, targets, scale, name="mlp")
        x = x + mlp(RMSNorm(decoder.norm_eps, name="norm_mlp")(x))
        x = axes.constrain(x, "BTD")
        self.sow("intermediates", "hidden", x)
        return x, fresh if cache is not None else None


def _norm(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


class Embed(nn.Module):
    """Token embeddings [V,D]; with tied embeddings they are the output head too."""

    vocab_size: int
    width: int

    def setup(self) -> None:
        init = nn.with_logical_partitioning(INIT, ("V", "D"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.width), jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[tokens].astype(jnp.float32)

    def logits(self, hidden: jax.Array) -> jax.Array:
        table = self.embedding.astype(hidden.dtype)
        return jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)


def learner_switches(arch: WingsArch) -> jax.Array:
    """Returns f32[L]: 1 where a layer carries learners, else 0."""
    count = arch.decoder.num_layers
    carriers = range(count) if arch.learner_layers is None else arch.learner_layers
    return jnp.zeros(count).at[jnp.asarray(list(carriers), jnp.int32)].set(1.0)


def rope_tables(
    arch: WingsArch, positions: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array] | None]:
    """Returns cos and sin, f32[B,T,H/2] each, of the LLM, and of the learners if they differ."""
    llm = arch.decoder
    table = rope_table(positions, llm.head_dim, llm.rope_theta, llm.rope_scaling)
    if arch.semantics.scaled_rope or llm.rope_scaling is None:
        return table, None
    return table, rope_table(positions, llm.head_dim, llm.rope_theta)


def ungated_tokens(
    arch: WingsArch, query: Visibility, learners: Mapping[str, KVInputs]
) -> jax.Array | None:
    """Returns bool[B,T], where exactly one learner sees anything, if the semantics ask for it."""
    if not (arch.semantics.ungated_when_alone and learners):
        return None
    seeing = [layout_lib.visible(query, source.visibility).any(-1) for source in learners.values()]
    return sum(sees.astype(jnp.int32) for sees in seeing) == 1


def _pack(visual: KVInputs, rows: Layout, count: int) -> KVInputs:
    """Returns the visual learner's source without text slots: its first `count` image slots."""
    is_other = (rows.modality != IMAGE).astype(jnp.int32)
    index = jnp.argsort(is_other, axis=1, stable=True)[:, :count]

    def take(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

    return jax.tree.map(take, visual)


class Decoder(nn.Module):
    """All layers by one scan; `embed`, `__call__` (features to normed states), `logits`."""

    arch: WingsArch
    dtype: jnp.dtype = jnp.float32
    kernel: str = "auto"
    remat: str = "none"

    def setup(self) -> None:
        decoder = self.arch.decoder
        self._embed = Embed(decoder.vocab_size, decoder.hidden_size, name="embed")
        layer = DecoderLayer
        if self.remat != "none":
            layer = nn.remat(layer, policy=REMAT[self.remat], prevent_cse=False)
        self._layers = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=decoder.num_layers,
            metadata_params={nn.PARTITION_NAME: "L"},
        )(self.arch, self.kernel, name="layers")
        self._norm = RMSNorm(decoder.norm_eps, name="norm")
        if not decoder.tie_embeddings:
            self._head = Projection("BTD,DV->BTV", {"V": decoder.vocab_size}, name="head")

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns f32[B,T,D], the embeddings of i32[B,T] tokens."""
        return self._embed(tokens)

    def __call__(
        self,
        x0: jax.Array,
        rows: Layout,
        classes: jax.Array | None = None,
        *,
        image_slots: int | None = None,
    ) -> jax.Array:
        """Returns final normed states [B,T,D] in `dtype` of layer-0 features f32[B,T,D].

        `image_slots` says that no row has more image slots than that: the visual learner then
        reads so many keys instead of T, and with 0 it is left out. No value changes by it.
        """
        table, wing_table = rope_tables(self.arch, rows.positions)
        learners = {
            name: KVInputs(
                layout_lib.key_visibility(rows, LEARNERS[name]), None, x0, wing_table or table
            )
            for name in self.arch.learners
        }
        if image_slots == 0:
            learners.pop("visual", None)
        elif "visual" in learners and image_slots is not None and image_slots < x0.shape[1]:
            learners["visual"] = _pack(learners["visual"], rows, image_slots)
        main = KVInputs(layout_lib.key_visibility(rows, MAIN))
        query = layout_lib.query_visibility(rows)
        lone = ungated_tokens(self.arch, query, learners)
        ctx = LayerContext(table, query, main, rows.positions, learners, classes, wing_table, lone)
        x = axes.constrain(x0.astype(self.dtype), "BTD")
        x, _ = self._layers(x, (learner_switches(self.arch), None), ctx)
        return self._norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns f32[B,T,V] of states [B,T,D]."""
        if self.arch.decoder.tie_embeddings:
            return self._embed.logits(hidden)
        return self._head(hidden).astype(jnp.float32)
