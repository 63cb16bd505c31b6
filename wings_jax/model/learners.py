"""The wings of a layer: the learners (paper, equation 4) and the router that weighs them."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from wings_jax.model import attention
from wings_jax.model.context import Cache, KeysValues, KVInputs, LayerContext, update_cache
from wings_jax.model.flash import INPUTS
from wings_jax.model.layers import rope
from wings_jax.model.layout import Array
from wings_jax.model.presets import WingsArch
from wings_jax.model.projection import LowRank, partitioned, project, project_together


class Learner(nn.Module):
    """A low-rank residual attention (LoRRA) over the keys of one modality.

        q = rope(h (1 + W^Q))    k = rope(x0 (1 + W^K))    v = x0 (1 + W^V)
        learner(h, x0) = softmax(q k^T / sqrt(H)) v W^O

    Every W is a product of two matrices of rank R. The keys and values are computed from the
    layer-0 features x0 in every layer, with as many kv heads as query heads. There are N = D / H
    heads: those of the LLM, unless its N x H differs from D (Qwen3). They have rope in every
    layer, and no norms. The result is exactly 0 at initialization (W^O = 0), and for a query
    without visible keys.

    Products of the same input are one product, over the learners of a layer too: the caller
    computes those of the queries and of the outputs (`run_learners`).

    arch    sizes of the LLM, and the rank
    kernel  one of `attention.KERNELS`
    """

    arch: WingsArch
    kernel: str

    def setup(self) -> None:
        decoder = self.arch.decoder
        sizes = {
            "D": decoder.hidden_size,
            "N": decoder.learner_heads,
            "H": decoder.head_dim,
            "R": self.arch.rank,
        }
        self.q, self.k, self.v = (LowRank("D", "NH", sizes) for _ in range(3))
        self.o = LowRank("NH", "D", sizes)

    def __call__(
        self,
        h: jax.Array,
        low_q: jax.Array,
        ctx: LayerContext,
        kv_inputs: KVInputs,
        cached: KeysValues | None,
    ) -> tuple[jax.Array, KeysValues]:
        """Returns the learner's output of low rank, and its keys and values.

        The output is [B,T,R]; its product with `o.b` is the learner's. The keys and values are the
        KV cache [B*N,S,H] where there is one, else [B,S,N,H].

        Args:
          h: [B,T,D], the queries' stream.
          low_q: [B,T,R], its product with `q.a`.
          ctx: the inputs that all layers share.
          kv_inputs: of this learner.
          cached: its KV cache, if there is one.
        """
        q = rope(self._residual(h, low_q, self.q), ctx.learner_rope_table or ctx.rope_table)

        # New keys and values are computed from x0; older ones are in the KV cache.
        keys_values = cached
        if kv_inputs.x0 is not None:
            if kv_inputs.rope_table is None:
                raise ValueError("layer-0 features need a rope table (KVInputs.rope_table)")
            # Named, as it is the same in all layers: kept once, not cast again by each.
            x0 = checkpoint_name(kv_inputs.x0.astype(h.dtype), INPUTS)
            low_k, low_v = project_together("BTD,DR->BTR", x0, [self.k.a, self.v.a])
            k = rope(self._residual(x0, low_k, self.k), kv_inputs.rope_table)
            v = self._residual(x0, low_v, self.v)
            keys_values = update_cache(cached, (k, v), kv_inputs.start)
        if keys_values is None:
            raise ValueError("a learner needs layer-0 features or a KV cache")

        heads_output, _ = attention.attend(
            q,
            *keys_values,
            query=ctx.query,
            key=kv_inputs.visibility,
            kernel=self.kernel,
            mask=kv_inputs.mask,
        )

        # [B, T, N, H] -> [B, T, R]
        return project("BTNH,NHR->BTR", heads_output, self.o.a), keys_values

    def _residual(self, x: jax.Array, low: jax.Array, pair: LowRank) -> jax.Array:
        """Returns x (1 + a b), [B,T,N,H] of x [B,T,D] and low = x a, [B,T,R]."""
        update = project("BTR,RNH->BTNH", low, pair.b)
        return x.reshape(update.shape) + update


def run_learners(
    learners: Mapping[str, Learner],
    queries: jax.Array,
    gates: jax.Array,
    ctx: LayerContext,
    cached: Cache,
) -> tuple[jax.Array, dict[str, jax.Array], Cache]:
    """Returns the gated sum of a layer's learners [B,T,D] (equation 5), and parts of it by learner.

    The parts are the outputs of low rank [B,T,R], not gated, and the keys and values.

    Args:
      learners: those that have keys in `ctx`, in the order of the architecture's.
      queries: [B,T,D], the stream that they read.
      gates: [B,T,M], of all learners of the architecture.
      ctx: the inputs that all layers share.
      cached: the layer's KV cache.
    """
    # The queries of all learners are one product, [B, T, D] -> [B, T, R] each.
    kernels = [learner.q.a for learner in learners.values()]
    low_queries = project_together("BTD,DR->BTR", queries, kernels)

    lows, keys_values, gated = {}, {}, []
    for (name, learner), low_q in zip(learners.items(), low_queries, strict=True):
        inputs = ctx.learners[name]
        low, keys_values[name] = learner(queries, low_q, ctx, inputs, cached.get(name))
        lows[name] = low
        # An einsum, whose gradient by the gates is fast on CPUs.
        gate = gates[..., learner.arch.learners.index(name)]
        gated.append(jnp.einsum("BT,BTR->BTR", gate, low))

    # Gated where their rank is low, the outputs are one product too: [B, T, M R] -> [B, T, D].
    kernel = jnp.concatenate([learner.o.b for learner in learners.values()], axis=0)
    return project("BTR,RD->BTD", jnp.concatenate(gated, axis=-1), kernel), lows, keys_values


class Router(nn.Module):
    """Weighs the learners per token, from the main attention's rows a (paper, equation 5).

        gate_m = softmax_m(silu(sum_heads sum_s a[t,s] W_m[position_s] + b_m))

    The inner sum is a probe of the main attention: its per-key values are W at the keys'
    positions, so the T x S matrix of the rows is never needed. Everything is float32.

    learners   M, number of learners
    positions  number of positions that have weights

    Parameters: kernel W [M,positions], bias b [M].
    """

    learners: int
    positions: int

    def setup(self) -> None:
        bound = self.positions**-0.5

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel = partitioned(uniform, ("M", None))
        bias = partitioned(nn.initializers.zeros, ("M",))
        shape = (self.learners, self.positions)
        self.kernel = self.param("kernel", kernel, shape, jnp.float32)
        self.bias = self.param("bias", bias, (self.learners,), jnp.float32)

    def values(self, positions: Array) -> jax.Array:
        """Returns f32[B,S,M], the weights at the keys' positions i32[B,S]."""
        return self.kernel.astype(jnp.float32).T[positions]

    def __call__(self, sums: jax.Array) -> jax.Array:
        """Returns gates f32[B,T,M] that add up to 1, of probes f32[B,T,M] summed over heads."""
        return jax.nn.softmax(jax.nn.silu(sums + self.bias.astype(jnp.float32)), axis=-1)
