"""The small parts beside the projection: two norms, rope, the feed-forward network, a prefix."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from wings_jax.model import attention
from wings_jax.model.flash import exact_einsum
from wings_jax.model.layout import Array, Visibility
from wings_jax.model.presets import RopeScaling
from wings_jax.model.projection import Projection, partitioned

# cos and sin, f32[B,T,H/2] each.
RopeTable = tuple[jax.Array, jax.Array]

# HF's activation names -> functions.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def is_matrix(path: str) -> bool:
    """Returns whether a parameter is multiplied in the compute dtype; the others are in float32.

    >>> is_matrix("decoder/layers/attn/q/kernel"), is_matrix("decoder/layers/router/kernel")
    (True, False)
    """
    *above, name = path.split("/")
    return name in ("kernel", "a", "b", "embedding", "k", "v") and "router" not in above


class RMSNorm(nn.Module):
    """Returns x / rms(x) * scale over the last axis, computed in float32 (HF Qwen2RMSNorm).

    eps   added to the mean square
    axis  logical axis of the scale
    """

    eps: float
    axis: str = "D"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = partitioned(nn.initializers.ones, (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)

        return rms_norm(x.astype(jnp.float32), scale.astype(jnp.float32), self.eps).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Returns x / rms(x) * scale of f32[...,D], where rms(x)^2 = mean(x^2) + eps.

    Its gradients are written out, since those that JAX derives take 20 times as long on CPUs: XLA
    recomputes the root for every element of the sum over rows. With i = 1 / rms(x):

        dscale = sum_rows i (x dy)
        dx     = i (scale dy) - x i^3 / D sum_D (scale x dy)
    """
    return _rms_norm_forward(x, scale, eps)[0]


def _rms_norm_forward(
    x: jax.Array, scale: jax.Array, eps: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns the result, and what the backward pass reads: x, scale and i [...,1]."""
    inverse = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)
    return x * inverse * scale, (x, scale, inverse)


def _rms_norm_backward(
    eps: float, residuals: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of x and scale."""
    x, scale, inverse = residuals
    products = x * dy
    d_scale = exact_einsum("...i,...D->D", inverse, products)
    # [..., D] -> [..., 1]
    along = exact_einsum("...D,D->...", products, scale)[..., None]
    return inverse * (scale * dy) - x * (inverse**3 * along / x.shape[-1]), d_scale


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class LayerNorm(nn.Module):
    """Returns (x - mean) / std * scale + bias over the last axis, computed in float32.

    eps   added to the variance
    axis  logical axis of scale and bias
    """

    eps: float
    axis: str = "E"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = partitioned(nn.initializers.ones, (self.axis,))
        zeros = partitioned(nn.initializers.zeros, (self.axis,))
        scale = self.param("scale", ones, (x.shape[-1],), jnp.float32).astype(jnp.float32)
        bias = self.param("bias", zeros, (x.shape[-1],), jnp.float32).astype(jnp.float32)

        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        inverse_std = jax.lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + self.eps)
        return (centered * inverse_std * scale + bias).astype(x.dtype)


def rope_table(
    positions: Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> RopeTable:
    """Returns cos and sin, f32[B,T,H/2], of rotary embeddings at positions i32[B,T].

    The angle of pair i at position p is p * theta^(-2i/H), before scaling. Source: HF
    `ROPE_INIT_FUNCTIONS` (default, linear, llama3).
    """
    # [H/2]
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequencies = _scale_frequencies(frequencies, scaling)

    # [B, T, 1] * [H/2] -> [B, T, H/2]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _scale_frequencies(frequencies: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Returns f32[H/2]: with llama3, long wavelengths divided by the factor, short ones not."""
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor

    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # 0 for long wavelengths, 1 for short ones, with a ramp between `low` and `high`.
    smooth = (scaling.original_max_positions / wavelengths - low) / (high - low)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rope(x: jax.Array, table: RopeTable) -> jax.Array:
    """Returns x [B,T,N,H] rotated by the table, halves paired as in HF's `rotate_half`."""
    # [B, T, H/2] -> [B, T, 1, H/2]
    cos, sin = (part[:, :, None] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def switch_rope(table: RopeTable, switch: jax.Array | float | None) -> RopeTable:
    """Returns the table where `switch` is 1 or None; where it is 0, that of no rotation."""
    if switch is None:
        return table
    cos, sin = table
    return jnp.where(switch, cos, 1.0), jnp.where(switch, sin, 0.0)


class GatedMlp(nn.Module):
    """Returns down(silu(gate(x)) * up(x)), [B,T,D] -> [B,T,D] (HF Qwen2MLP).

    ffn_size  F
    ranks     projection ("gate", "up", "down") -> R of its LoRA; without an entry it has none
    scale     of LoRA's update
    """

    ffn_size: int
    ranks: Mapping[str, int]
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def project(name: str, eqn: str, sizes: Mapping[str, int]) -> Projection:
            rank = self.ranks.get(name, 0)
            return Projection(eqn, sizes, rank=rank, scale=self.scale, name=name)

        # [B, T, D] -> [B, T, F] -> [B, T, D]
        wide = {"F": self.ffn_size}
        gate = project("gate", "BTD,DF->BTF", wide)(x)
        up = project("up", "BTD,DF->BTF", wide)(x)
        return project("down", "BTF,FD->BTD", {"D": x.shape[-1]})(jax.nn.silu(gate) * up)


class Prefix(nn.Module):
    """Returns tanh(gate) * attend(q, k, v) of trained keys and values, [B,T,N,H] -> [B,T,N,H].

    Prefix-tuning with its own softmax and gate (LLaMA-Adapter, arXiv 2303.16199). The result is
    added to the heads' output before it is projected. The gate is 0 at initialization, so a new
    prefix adds exactly 0. The main attention's rows do not include the prefix, and neither do the
    router's input and the attention masses. Every slot of every conversation attends to all of
    the prefix, padding to none of it. The queries have rope, the prefix has no positions.

    length    S, trained keys and values
    kv_heads  K

    Parameters: k, v [S,K,H] (Gaussian, of the size of a normed stream's keys), gate [N] (zero).
    """

    length: int
    kv_heads: int

    @nn.compact
    def __call__(self, q: jax.Array, query: Visibility) -> jax.Array:
        batch, _, heads, width = q.shape

        def trained(name: str) -> jax.Array:
            # [S, K, H] -> [B, S, K, H]
            init = partitioned(nn.initializers.normal(1.0), ("S", "K", "H"))
            shape = (self.length, self.kv_heads, width)
            values = self.param(name, init, shape, jnp.float32).astype(q.dtype)
            return jnp.broadcast_to(values, (batch, *shape))

        # All conversations of a row are segment 1 here; padding keeps segment 0.
        zeros = jnp.zeros((batch, self.length), jnp.int32)
        out, _ = attention.attend(
            q,
            trained("k"),
            trained("v"),
            query=Visibility(jnp.minimum(query.segments, 1), query.visible_from),
            key=Visibility(zeros + 1, zeros),
            kernel="einsum",  # T x length logits, not T x S
        )

        # [N] -> [N, 1], a factor per head
        init = partitioned(nn.initializers.zeros, ("N",))
        gate = jnp.tanh(self.param("gate", init, (heads,), jnp.float32))
        return gate.astype(q.dtype)[:, None] * out
