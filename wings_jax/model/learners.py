"""The wings of a layer: the learners (paper, equation 4) and the router that weighs them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from wings_jax.model import attention
from wings_jax.model.context import KeysValues, KVInputs, LayerContext, update_cache
from wings_jax.model.layers import Projection, partitioned, rope
from wings_jax.model.layout import Array
from wings_jax.model.presets import WingsArch


class Learner(nn.Module):
    """A low-rank residual attention (LoRRA) over the keys of one modality.

        q = rope(h (1 + W^Q))    k = rope(x0 (1 + W^K))    v = x0 (1 + W^V)
        learner(h, x0) = softmax(q k^T / sqrt(H)) v W^O

    Every W is a product of two matrices of rank R. The keys and values are computed from the
    layer-0 features x0 in every layer, with as many kv heads as query heads. There are N = D / H
    heads: those of the LLM, unless its N x H differs from D (Qwen3). They have rope in every
    layer, and no norms. The result is exactly 0 at initialization (W^O = 0), and for a query
    without visible keys.

    arch    sizes of the LLM, and the rank
    kernel  one of `attention.KERNELS`
    """

    arch: WingsArch
    kernel: str

    @nn.compact
    def __call__(
        self, h: jax.Array, ctx: LayerContext, kv_inputs: KVInputs, cached: KeysValues | None
    ) -> tuple[jax.Array, KeysValues]:
        """Returns the learner's output [B,T,D] of queries [B,T,D], and its keys and values.

        The keys and values are the KV cache [B*N,S,H] where there is one, else [B,S,N,H].
        """
        decoder, rank = self.arch.decoder, self.arch.rank
        heads = {"N": decoder.learner_heads, "H": decoder.head_dim}

        def residual(name: str, x: jax.Array) -> jax.Array:
            # x (1 + a b): [B, T, D] -> [B, T, N, H]
            return Projection("BTD,DNH->BTNH", heads, base="identity", rank=rank, name=name)(x)

        q = rope(residual("q", h), ctx.learner_rope_table or ctx.rope_table)

        # New keys and values are computed from x0; older ones are in the KV cache.
        keys_values = cached
        if kv_inputs.x0 is not None:
            if kv_inputs.rope_table is None:
                raise ValueError("layer-0 features need a rope table (KVInputs.rope_table)")
            x0 = kv_inputs.x0.astype(h.dtype)
            k = rope(residual("k", x0), kv_inputs.rope_table)
            keys_values = update_cache(cached, (k, residual("v", x0)), kv_inputs.start)
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

        # [B, T, N, H] -> [B, T, D]
        width = {"D": decoder.hidden_size}
        output = Projection("BTNH,NHD->BTD", width, base="none", rank=rank, name="o")
        return output(heads_output), keys_values


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
