"""The decoder (`families.FAMILIES`) with its wings: learners and router beside the attention.

One layer computes (paper, equations 4 and 5):

    h         = RMSNorm(x)
    main      = O(attend(rope(Q h), rope(K h), V h))                       all slots
    learner_m = O_m(attend(rope(h(1+Q_m)), rope(x0(1+K_m)), x0(1+V_m)))    slots of modality m only
    gate      = softmax_m(silu(sum_heads a W_m + b_m))                     a: main attention rows
    x         = x + main + gain * sum_m gate_m learner_m
    x         = x + mlp(RMSNorm(x))

x0 are the layer-0 features: projected image features and token embeddings. With a prefix, main is
O(attend(...) + tanh(gate) attend(rope(Q h), K', V')), with K', V' trained. LLMs differ in values
of `presets.DecoderArch`: some normalize each head of Q h and K h, some have layers without rope in
the main attention. The authors' release differs in a few values (`presets.Semantics`), which are
named where they are read.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from wings_jax import axes
from wings_jax.model import attention, joined
from wings_jax.model.context import (
    Cache,
    KeysValues,
    LayerContext,
    make_context,
    update_cache,
)
from wings_jax.model.flash import INPUTS, SAVED
from wings_jax.model.layers import GatedMlp, Prefix, RMSNorm, rope, switch_rope
from wings_jax.model.layout import Array, Layout
from wings_jax.model.learners import Learner, Router, run_learners
from wings_jax.model.presets import WingsArch
from wings_jax.model.projection import INIT, Projection, partitioned, project
from wings_jax.model.switches import LayerSwitches, layer_switches

# Name of the stream between a layer's attention and its feed-forward network.
STREAM = "stream"

# Name of a rematerialization policy -> what the forward pass saves for the backward pass.
# `save_attn` saves what the attention kernels name: their results and log-sum-exponentials.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # The results of every attention, so that the backward pass does not run it a second time.
    "save_attn": jax.checkpoint_policies.save_only_these_names(SAVED),
    # Also what it reads, the stream after it, and all matrix products whose results are not in
    # that: only what is cheap is computed again.
    "save_dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED, INPUTS, STREAM),
    ),
}


class Attention(nn.Module):
    """The main attention, causal within each conversation, with grouped kv heads.

    arch    sizes of the LLM, LoRA
    kernel  one of `attention.KERNELS`
    """

    arch: WingsArch
    kernel: str

    @nn.compact
    def __call__(
        self,
        h: jax.Array,
        ctx: LayerContext,
        probes: jax.Array | None,
        cached: KeysValues | None,
        prefix: Prefix | None,
        rope_switch: jax.Array | float | None,
    ) -> tuple[jax.Array, jax.Array | None, KeysValues]:
        """Returns the output [B,T,D] of h [B,T,D], the probed rows, and the keys and values.

        `probes` f32[B,S,C] are per-key values; the probed rows are f32[B,T,N,C]. The keys and
        values are the KV cache [B*K,S,H] where there is one, else [B,S,K,H].
        """
        decoder = self.arch.decoder
        heads = {"N": decoder.num_heads, "K": decoder.num_kv_heads, "H": decoder.head_dim}

        def project(name: str, eqn: str, sizes: Mapping[str, int], *, bias: bool) -> Projection:
            rank = self.arch.lora_rank if name in self.arch.lora_targets else 0
            scale = self.arch.lora_alpha / max(rank, 1)
            return Projection(eqn, sizes, bias=bias, rank=rank, scale=scale, name=name)

        # In decoding the three kernels may be one parameter.
        products: tuple[jax.Array | None, ...] = (None, None, None)
        if self.has_variable("params", joined.NAME):
            products = joined.project_joined(h, self.get_variable("params", joined.NAME))

        # [B, T, D] -> [B, T, N, H] and [B, T, K, H]
        bias = decoder.qkv_bias
        q = project("q", "BTD,DNH->BTNH", heads, bias=bias)(h, products[0])
        k = project("k", "BTD,DKH->BTKH", heads, bias=bias)(h, products[1])
        v = project("v", "BTD,DKH->BTKH", heads, bias=bias)(h, products[2])
        if decoder.qk_norm:
            q = RMSNorm(decoder.norm_eps, axis="H", name="q_norm")(q)
            k = RMSNorm(decoder.norm_eps, axis="H", name="k_norm")(k)

        table = switch_rope(ctx.rope_table, rope_switch)
        q, k = rope(q, table), rope(k, table)
        keys_values = update_cache(cached, (k, v), ctx.main.start)

        heads_output, probed = attention.attend(
            q,
            *keys_values,
            query=ctx.query,
            key=ctx.main.visibility,
            probes=probes,
            kernel=self.kernel,
            mask=ctx.main.mask,
        )
        if prefix is not None:
            heads_output = heads_output + prefix(q, ctx.query)

        # [B, T, N, H] -> [B, T, D]
        output = project("o", "BTNH,NHD->BTD", {"D": decoder.hidden_size}, bias=False)
        return output(heads_output), probed, keys_values


class DecoderLayer(nn.Module):
    """One layer: main attention, learners in parallel to it, feed-forward network.

    Sown under `intermediates`, for analysis and tests:

        hidden                         [B,T,D]       the stream after the layer
        gates                          f32[B,T,M]    of the router, before `gain`
        head_masses, masses            f32[B,T,N,C]  the probes of `ctx.classes`, and their mean
                                                     over heads, f32[B,T,C]
        visual_wing, textual_wing      [B,T,D]       the learners' outputs, not gated
        main_norm, visual_norm, ...    f32[B,T]      norms of what the main attention and each
                                                     gated learner add to the stream

    arch    sizes, learners, semantics
    kernel  one of `attention.KERNELS`
    """

    arch: WingsArch
    kernel: str = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, layer_inputs: tuple[LayerSwitches, Cache | None], ctx: LayerContext
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the residual stream [B,T,D] after the layer, and the layer's KV cache.

        Args:
          x: [B,T,D], the residual stream.
          layer_inputs: the layer's switches and its KV cache. With {} the new keys and values
            [B,T,K,H] are returned; with None nothing is.
          ctx: the inputs that all layers share.
        """
        arch, decoder = self.arch, self.arch.decoder
        switches, cache = layer_inputs
        cached = dict(cache) if cache is not None else {}

        # The main attention and, in the paper, the learners read the same normed stream, [B, T, D].
        h = RMSNorm(decoder.norm_eps, name="norm_attn")(x)

        # Probes: the router's weights and the classes, [B, S, M + C] -> [B, T, N, M + C].
        router = Router(len(arch.learners), arch.router_positions, name="router")
        prefix = None
        if arch.prefix_length:
            prefix = Prefix(arch.prefix_length, decoder.num_kv_heads, name="prefix")
        main, probed, keys_values = Attention(arch, self.kernel, name="attn")(
            h, ctx, self._probes(router, ctx), cached.get("main"), prefix, switches.rope
        )

        fresh = {"main": keys_values}
        self.sow("intermediates", "main_norm", _norm(main))
        self._sow_masses(probed, ctx)

        # Router: [B, T, N, M] -> [B, T, M]
        gates = self._gates(router, probed, switches.learners, ctx).astype(x.dtype)

        # Equation 5: the learners add sum_m gate_m * learner_m.
        update = main
        names = [name for name in arch.learners if name in ctx.learners]
        if names:
            queries = h if arch.semantics.query == "normed" else x + main
            learners = {name: Learner(arch, self.kernel, name=name) for name in names}
            added, lows, learner_keys_values = run_learners(learners, queries, gates, ctx, cached)
            update, fresh = main + added, {**fresh, **learner_keys_values}
            self._sow_learners(learners, lows, gates)
        x = checkpoint_name(x + update, STREAM)

        # Feed-forward network, [B, T, D] -> [B, T, D]
        ranks = {name: arch.lora_rank for name in arch.lora_targets if arch.lora_rank}
        scale = arch.lora_alpha / max(arch.lora_rank, 1)
        mlp = GatedMlp(decoder.ffn_size, ranks, scale, name="mlp")
        x = x + mlp(RMSNorm(decoder.norm_eps, name="norm_mlp")(x))
        x = axes.constrain(x, "BTD")
        self.sow("intermediates", "hidden", x)
        return x, fresh if cache is not None else None

    def _sow_learners(
        self, learners: Mapping[str, Learner], lows: Mapping[str, jax.Array], gates: jax.Array
    ) -> None:
        """Sows the learners' outputs [B,T,D], and the norms of what they add to the stream."""
        if not self.is_mutable_collection("intermediates"):
            return
        for name, learner in learners.items():
            output = project("BTR,RD->BTD", lows[name], learner.o.b)
            gate = gates[..., self.arch.learners.index(name), None]
            self.sow("intermediates", f"{name}_wing", output)
            self.sow("intermediates", f"{name}_norm", _norm(gate * output))

    def _probes(self, router: Router, ctx: LayerContext) -> jax.Array | None:
        """Returns f32[B,S,M+C]: the router's weights at the keys, then the classes."""
        probes = [router.values(ctx.positions)] if self.arch.router else []
        probes += [ctx.classes] if ctx.classes is not None else []
        return jnp.concatenate(probes, axis=-1) if probes else None

    def _sow_masses(self, probed: jax.Array | None, ctx: LayerContext) -> None:
        """Sows the attention masses of `ctx.classes`, the last C of the probed rows."""
        if ctx.classes is not None and probed is not None:
            masses = probed[..., -ctx.classes.shape[-1] :]
            self.sow("intermediates", "head_masses", masses)
            self.sow("intermediates", "masses", masses.mean(2))

    def _gates(
        self,
        router: Router,
        probed: jax.Array | None,
        switch: jax.Array | float,
        ctx: LayerContext,
    ) -> jax.Array:
        """Returns f32[B,T,M], the factors of the learners' outputs: gate x gain x switch."""
        arch = self.arch
        num_learners = len(arch.learners)
        gates = jnp.ones((*ctx.query.segments.shape, num_learners), jnp.float32)
        if arch.router and probed is not None:
            # [B, T, N, M] -> [B, T, M]
            gates = router(probed[..., :num_learners].sum(2))
            self.sow("intermediates", "gates", gates)
        gates = gates * (arch.gain * switch)

        # Tokens that only one learner has keys for are not gated.
        if ctx.ungated is not None:
            gates = jnp.where(ctx.ungated[..., None], switch, gates)
        return gates


def _norm(x: jax.Array) -> jax.Array:
    """Returns f32[B,T], the Euclidean norm of each vector of [B,T,D]."""
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


class Embed(nn.Module):
    """Token embeddings; with tied embeddings they are the output head too.

    vocab_size  V
    width       D

    Parameters: embedding [V,D].
    """

    vocab_size: int
    width: int

    def setup(self) -> None:
        init = partitioned(INIT, ("V", "D"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.width), jnp.float32)

    def __call__(self, tokens: Array) -> jax.Array:
        """Returns f32[B,T,D] of tokens i32[B,T]."""
        return self.embedding[tokens].astype(jnp.float32)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns f32[...,V] of states [...,D]."""
        table = self.embedding.astype(hidden.dtype)
        return jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)


class Decoder(nn.Module):
    """Embeddings, all layers by one scan, the final norm and the output head.

    arch         the LLM and its wings
    dtype        of the residual stream and the matmuls
    kernel       one of `attention.KERNELS`
    remat        what the backward pass recomputes, a key of `REMAT`
    scan_layers  whether the layers are one loop in the compiled program; else each is compiled on
                 its own, and what the backward pass reads is not copied into arrays of all layers
    """

    arch: WingsArch
    dtype: jnp.dtype = jnp.float32
    kernel: str = "auto"
    remat: str = "none"
    scan_layers: bool = True

    def setup(self) -> None:
        decoder = self.arch.decoder
        self._embed = Embed(decoder.vocab_size, decoder.hidden_size, name="embed")

        layer = DecoderLayer
        if self.remat != "none":
            # In a loop, common subexpressions of the two passes are not merged in any case.
            layer = nn.remat(layer, policy=REMAT[self.remat], prevent_cse=not self.scan_layers)
        self._layers = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=decoder.num_layers,
            unroll=1 if self.scan_layers else decoder.num_layers,
            metadata_params={nn.PARTITION_NAME: "L"},
        )(self.arch, self.kernel, name="layers")

        self._norm = RMSNorm(decoder.norm_eps, name="norm")
        if not decoder.tie_embeddings:
            self._head = Projection("BTD,DV->BTV", {"V": decoder.vocab_size}, name="head")

    def embed(self, tokens: Array) -> jax.Array:
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

        `classes` f32[B,T,C] are probes of the main attention; `image_slots` is an upper bound of
        the image slots in a row, which saves work and changes no result (`context.make_context`).
        """
        slots = x0.shape[1]
        kernel = attention.choose_kernel(
            self.kernel, slots, slots, is_cache=False, dtype=jnp.dtype(self.dtype)
        )
        ctx = make_context(self.arch, x0, rows, classes, image_slots=image_slots, kernel=kernel)
        x = axes.constrain(x0.astype(self.dtype), "BTD")
        x, _ = self._layers(x, (layer_switches(self.arch), None), ctx)
        return self._norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns f32[B,T,V] of states [B,T,D]."""
        if self.arch.decoder.tie_embeddings:
            return self._embed.logits(hidden)
        return self._head(hidden).astype(jnp.float32)
