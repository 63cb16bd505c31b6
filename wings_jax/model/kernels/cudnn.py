"""Attention on NVIDIA Ampere and later: cuDNN through `jax.nn.dot_product_attention`, bfloat16.

cuDNN has one width for keys and values, so the probes are the values of a second call, which
computes the rows again. Its only mask besides causality is an additive one, bfloat16[B,1,T,S] in
memory for all heads: 2 T S bytes per row, 8 MiB at 2048 slots.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from wings_jax.model import layout
from wings_jax.model.kernels import columns
from wings_jax.model.kernels.intervals import KeyMask

Implementation = Literal["cudnn", "xla"]
IMPLEMENTATION: Implementation = "cudnn"  # "xla" for tests on any backend
SLOTS = 64  # query and key slots are a multiple of this where there is a mask
WIDTH = 8  # the head width is a multiple of this


def requirement(device: jax.Device, dtype: jnp.dtype) -> str | None:
    """Returns what is missing for this kernel, in a few words; None where it runs."""
    capability = float(getattr(device, "compute_capability", 0) or 0)
    if device.platform != "gpu" or capability < 8.0:
        return "needs an NVIDIA GPU of compute capability 8.0 or higher (A100)"
    if dtype != jnp.bfloat16:
        return "computes in bfloat16 (config.compute_dtype)"
    return None


def packs_keys(is_causal: bool) -> bool:
    """Returns whether never visible keys must be at the end (`intervals.pack_order`)."""
    return False


def _padded_mask(mask: KeyMask, padding: tuple[int, int]) -> jax.Array:
    """Returns bool[B,1,T',S'] with so many more query and key slots; every query has a key.

    cuDNN's gradient of a query without keys is NaN: such a query gets the first key. Its result is
    replaced by 0, so that its gradient is 0.
    """
    # [B, T, S] -> [B, T', S'] -> [B, 1, T', S']
    is_visible = layout.visible(mask.query, mask.key)
    is_visible = jnp.pad(is_visible, ((0, 0), (0, padding[0]), (0, padding[1])))
    is_empty = ~is_visible.any(2, keepdims=True)
    return (is_visible | (is_empty & (jnp.arange(is_visible.shape[2]) == 0)))[:, None]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    probes: jax.Array,
    mask: KeyMask | None,
    *,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns out [B,T,N,H] in q's dtype, and probed f32[B,T,N,C].

    Args:
      q: [B,T,N,H]
      k, v: [B,S,K,H]
      probes: f32[B,S,C]; C may be 0.
      mask: which keys a query attends to; None: all.
      implementation: of jax, IMPLEMENTATION by default.
    """
    (rows, num_queries, _, width), num_keys = q.shape, k.shape[1]
    num_probes = probes.shape[-1]

    is_visible, has_keys, is_causal = None, None, False
    if mask is not None:
        has_keys = jnp.asarray(mask.intervals.has_keys)[..., None, None]
        is_causal = mask.is_causal
        padding = (-num_queries % SLOTS, -num_keys % SLOTS)
        is_visible = _padded_mask(mask, padding)
        q = jnp.pad(q, ((0, 0), (0, padding[0]), (0, 0), (0, 0)))
        k, v = (jnp.pad(x, ((0, 0), (0, padding[1]), (0, 0), (0, 0))) for x in (k, v))
        probes = jnp.pad(probes, ((0, 0), (0, padding[1]), (0, 0)))

    # The width of all three is the same multiple of 8.
    def widen(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -width % WIDTH)))

    q, k = widen(q), widen(k)

    def call(values: jax.Array) -> jax.Array:
        result = jax.nn.dot_product_attention(
            q,
            k,
            values,
            mask=is_visible,
            is_causal=is_causal,
            scale=width**-0.5,
            implementation=implementation or IMPLEMENTATION,
        )[:, :num_queries]
        return result if has_keys is None else jnp.where(has_keys, result, 0)

    # [B, T, N, W] -> [B, T, N, H]
    out = call(widen(v))[..., :width]
    if not num_probes:
        return out, jnp.zeros((*out.shape[:3], 0), jnp.float32)

    # A second call whose values are the probes only.
    no_values = jnp.zeros((rows, k.shape[1], k.shape[2], 0), v.dtype)
    wide = columns.add_columns(no_values, probes, k.shape[-1])
    return out, columns.split_columns(call(wide), 0, num_probes, v.dtype)[1]
