"""Attention on TPUs: the splash kernel of jax, forward and fused backward.

Visibility is causality in the order of the slots, or intervals of keys, and segments on the query
and on the key side: a key that is never visible is in a segment that no query is in. The probes
are columns of the values (`columns.py`), which may be wider than the keys.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)

from wings_jax.model import layout
from wings_jax.model.kernels import columns
from wings_jax.model.kernels.intervals import Intervals, KeyMask
from wings_jax.model.layout import Visibility

LANES = 128  # slots are a multiple of this
BLOCK = 512  # slots per block, at most
PADDED_QUERY, NEVER_KEY = -2, -1  # segments that are equal to no other


def requirement(device: jax.Device, dtype: jnp.dtype) -> str | None:
    """Returns what is missing for this kernel, in a few words; None where it runs."""
    return None if device.platform == "tpu" else "needs a TPU"


def packs_keys(is_causal: bool) -> bool:
    """Returns whether never visible keys must be at the end (`intervals.pack_order`)."""
    return not is_causal


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    probes: jax.Array,
    mask: KeyMask | None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns out [B,T,N,H] in q's dtype, and probed f32[B,T,N,C].

    Args:
      q: [B,T,N,H]
      k, v: [B,S,K,H]
      probes: f32[B,S,C]; C may be 0.
      mask: which keys a query attends to; None: all.
      interpret: whether to run on any backend, slowly.
    """
    # Probes are further columns of the values, so one pass computes both.
    (num_queries, _, width), num_keys = q.shape[1:], k.shape[1]
    num_probes = probes.shape[-1]
    wide = columns.add_columns(v, probes if num_probes else None)

    # [B, T, N, H] -> [B, N, T', H], padded to whole blocks.
    padding = (-num_queries % LANES, -num_keys % LANES)
    scaled = (q.astype(jnp.float32) / math.sqrt(width)).astype(q.dtype)
    q_heads = _to_heads(scaled, padding[0])
    k_heads, v_heads = _to_heads(k, padding[1]), _to_heads(wide, padding[1])

    if mask is None:
        mask = _all_visible(q.shape[0], num_queries, num_keys)
    segments = _segments(mask, padding)

    # The kernel computes one row: the batch is mapped over.
    kernel = functools.partial(_one_row, is_causal=mask.is_causal, interpret=interpret)
    # i32[B,T'], the last key slot that each query attends to
    last = jnp.pad(jnp.asarray(mask.intervals.stop) - 1, ((0, 0), (0, padding[0])))
    out = jax.vmap(kernel)(q_heads, k_heads, v_heads, segments, last)

    # [B, N, T', W] -> [B, T, N, W]
    out = out.swapaxes(1, 2)[:, :num_queries]
    out, probed = columns.split_columns(out, width, num_probes, v.dtype)

    # The kernel's row of a query without keys is not defined; its output is zero.
    has_keys = jnp.asarray(mask.intervals.has_keys)[..., None, None]
    return jnp.where(has_keys, out, 0), jnp.where(has_keys, probed, 0.0)


def _to_heads(x: jax.Array, padding: int) -> jax.Array:
    """Returns [B,N,T+padding,H] of [B,T,N,H]."""
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)


def _all_visible(rows: int, num_queries: int, num_keys: int) -> KeyMask:
    """Returns the mask of queries that attend to all keys."""
    queries, keys = (jnp.zeros((rows, count), jnp.int32) for count in (num_queries, num_keys))
    everything = Intervals(queries, queries + num_keys)
    return KeyMask(Visibility(queries, queries), Visibility(keys, keys), everything)


def _segments(mask: KeyMask, padding: tuple[int, int]) -> splash.SegmentIds:
    """Returns i32[B,T'] and i32[B,S']: a query attends to keys of its own segment only."""
    # Keys that no query attends to have a segment that no query has.
    is_never = jnp.asarray(mask.key.visible_from) >= layout.NEVER
    return splash.SegmentIds(
        jnp.pad(
            jnp.asarray(mask.query.segments),
            ((0, 0), (0, padding[0])),
            constant_values=PADDED_QUERY,
        ),
        jnp.pad(
            jnp.where(is_never, NEVER_KEY, mask.key.segments),
            ((0, 0), (0, padding[1])),
            constant_values=NEVER_KEY,
        ),
    )


def _one_row(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: splash.SegmentIds,
    last: jax.Array,
    *,
    is_causal: bool,
    interpret: bool,
) -> jax.Array:
    """Returns [N,T,W] of q [N,T,H], k [K,S,H], v [K,S,W].

    A query attends to the keys of its segment up to its own slot (`is_causal`, whose blocks
    after the diagonal are skipped), or up to key slot `last` i32[T].
    """
    shape = (q.shape[1], k.shape[1])
    row_mask = splash_mask.CausalMask(shape) if is_causal else splash_mask.FullMask(shape)
    kernel = splash.make_splash_mha(
        mask=splash_mask.MultiHeadMask([row_mask] * q.shape[0]),
        block_sizes=_block_sizes(*shape),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )

    # Key slots are compared with `last` in place of the query's own slot.
    if not is_causal:
        infos = (kernel.fwd_mask_info, kernel.dkv_mask_info)
        forward, backward = (info._replace(q_sequence=last) for info in infos)
        options = {**kernel.kwargs, "mask_function": _is_up_to}
        kernel = splash.SplashAttentionKernel(forward, None, backward, **options)
    return kernel(q, k, v, segments)


def _is_up_to(last: jax.Array, slots: jax.Array) -> jax.Array:
    """Returns the part of the mask that the kernel computes for a pair of blocks."""
    return slots <= last


def _block_sizes(num_queries: int, num_keys: int) -> splash.BlockSizes:
    """Returns blocks of at most BLOCK slots that divide both numbers of slots."""
    queries, keys = (
        max(size for size in range(LANES, BLOCK + 1, LANES) if count % size == 0)
        for count in (num_queries, num_keys)
    )
    return splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        use_fused_bwd_kernel=True,
    )
