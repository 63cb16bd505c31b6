"""The chunked kernel of `attention.attend`: flash attention with probes, in plain JAX.

Queries and keys are cut into blocks, and no more than one block of the T x S matrix exists at a
time, in the forward and in the backward pass (arXiv 2205.14135). With logits s_tj = q_t k_j for a
visible key j, the forward pass keeps a running maximum m and sum l per query and rescales what it
has summed whenever the maximum grows:

    m'   = max(m, max_j s_tj)                      p_j = exp(s_tj - m')
    l'   = l   exp(m - m') + sum_j p_j
    out' = out exp(m - m') + sum_j p_j v_j         and at last out / l

The probes' values are further channels of v: their products use the same p in float32. The
backward pass computes the rows again from lse_t = m_t + log l_t, the log of the sum of exponentials
of row t. With dO, dR the gradients of `out` and `probed` (R), and c_j the probes of key j:

    P_tj    = exp(s_tj - lse_t)
    dP_tj   = dO_t v_j + dR_t c_j
    delta_t = sum_j P_tj dP_tj = rowsum(dO_t * O_t) + rowsum(dR_t * R_t)
    dS_tj   = P_tj (dP_tj - delta_t)               the softmax's gradient
    dq_t    = sum_j dS_tj k_j      dk_j = sum_t dS_tj q_t
    dv_j    = sum_t P_tj dO_t      dc_j = sum_t P_tj dR_t

The sums over t also go over the G query heads of a kv head, dc's over all heads. Blocks in which
no key is visible to any query are skipped.

Shapes of blocked arrays: i counts query blocks of length t, j key blocks of length s, so q is
[i,B,t,K,G,H], k and v are [j,B,s,K,H], and probes [j,B,s,C].
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wings_jax.model import layout
from wings_jax.model.layout import Visibility

# Logit of a key that is not visible; finite, so that a row without visible keys is not NaN.
MASKED = -1e30

# Products of float32 with probes: GPUs and TPUs would round their operands to fewer bits.
exact_einsum = functools.partial(jnp.einsum, precision="highest")


class Residuals(NamedTuple):
    """What the forward pass saves for the backward pass, all in blocks.

    q, k, v, probes  as the forward pass reads them
    query, key       the two sides of the attention mask
    out, probed      as the forward pass returns them
    lse              f32[i,B,K,G,t], log of each row's sum of exponentials
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    probes: jax.Array
    query: Visibility
    key: Visibility
    out: jax.Array
    probed: jax.Array
    lse: jax.Array


def attend_in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    probes: jax.Array,
    query: Visibility,
    key: Visibility,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns out [B,T,K,G,H] in q's dtype, and probed f32[B,T,K,G,C].

    Args:
      q: [B,T,K,G,H], query heads grouped by the kv head that they read.
      k, v: [B,S,K,H]
      probes: f32[B,S,C]
      query, key: the two sides of the attention mask, [B,T] and [B,S].
      block: t and s, in slots.
    """
    num_queries = q.shape[1]
    out, probed = _flash(
        _to_blocks(q / math.sqrt(q.shape[-1]), block),
        _to_blocks(k, block),
        _to_blocks(v, block),
        _to_blocks(probes, block),
        _visibility_blocks(query, block, segment=-1),
        _visibility_blocks(key, block, segment=-2),
    )
    return _from_blocks(out, num_queries), _from_blocks(probed, num_queries)


@jax.custom_vjp
def _flash(
    q: jax.Array, k: jax.Array, v: jax.Array, probes: jax.Array, query: Visibility, key: Visibility
) -> tuple[jax.Array, jax.Array]:
    """Returns out [i,B,t,K,G,H] and probed f32[i,B,t,K,G,C]; q is scaled by 1 / sqrt(H)."""
    return _flash_forward(q, k, v, probes, query, key)[0]


def _flash_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, probes: jax.Array, query: Visibility, key: Visibility
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    """Returns out and probed, and what the backward pass reads."""

    def attend_query_block(args):
        q_i, query_i, first, stop = args
        shape = (q_i.shape[0], *q_i.shape[2:4], q_i.shape[1])  # [B, K, G, t]

        def add_key_block(j, carry):
            running_max, running_sum, out, probed = carry
            logits, mask = _block_logits(q_i, k[j], query_i, _block_of(key, j))

            # p = exp(s - m'), [B, K, G, t, s]; what was summed before is rescaled to m'.
            new_max = jnp.maximum(running_max, logits.max(-1))
            weights = jnp.where(mask, jnp.exp(logits - new_max[..., None]), 0.0)
            rescale = jnp.exp(running_max - new_max)

            running_sum = running_sum * rescale + weights.sum(-1)
            weighted = jnp.einsum(
                "BKGTS,BSKH->BKGTH",
                weights.astype(v.dtype),
                v[j],
                preferred_element_type=jnp.float32,
            )
            out = out * rescale[..., None] + weighted
            weighted = exact_einsum("BKGTS,BSC->BKGTC", weights, probes[j])
            probed = probed * rescale[..., None] + weighted
            return new_max, running_sum, out, probed

        start = (
            jnp.full(shape, MASKED),
            jnp.zeros(shape),
            jnp.zeros((*shape, v.shape[-1])),
            jnp.zeros((*shape, probes.shape[-1])),
        )
        running_max, running_sum, out, probed = jax.lax.fori_loop(first, stop, add_key_block, start)

        # A query without visible keys has the sum 0, and the result 0.
        divisor = jnp.where(running_sum > 0, running_sum, 1.0)
        # [B, K, G, t, H] -> [B, t, K, G, H]
        out, probed = (jnp.moveaxis(x / divisor[..., None], 3, 1) for x in (out, probed))
        lse = running_max + jnp.log(divisor)
        return out.astype(q.dtype), probed, lse

    spans = _key_block_spans(query, key)
    out, probed, lse = jax.lax.map(attend_query_block, (q, query, *spans))
    return (out, probed), Residuals(q, k, v, probes, query, key, out, probed, lse)


def _flash_backward(
    residuals: Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, None, None]:
    """Returns the gradients of q, k, v and probes in their dtypes, from dO and dR."""
    q, k, v, probes, query, key, out, probed, lse = residuals
    d_out, d_probed = (x.astype(jnp.float32) for x in cotangents)

    # delta = rowsum(dO * O) + rowsum(dR * R), [i, B, t, K, G]
    delta = (d_out * out.astype(jnp.float32)).sum(-1) + (d_probed * probed).sum(-1)

    def add_query_block(sums, args):
        q_i, query_i, lse_i, delta_i, d_out_i, d_probed_i, first, stop = args
        delta_i = jnp.moveaxis(delta_i, 1, 3)  # [B, t, K, G] -> [B, K, G, t]
        d_out_low = d_out_i.astype(v.dtype)

        def add_key_block(j, carry):
            d_q, d_k, d_v, d_probes = carry
            logits, mask = _block_logits(q_i, k[j], query_i, _block_of(key, j))

            # P = exp(s - lse) and dP = dO v + dR c, [B, K, G, t, s]
            weights = jnp.where(mask, jnp.exp(logits - lse_i[..., None]), 0.0)
            d_weights = jnp.einsum(
                "BTKGH,BSKH->BKGTS", d_out_low, v[j], preferred_element_type=jnp.float32
            )
            d_weights += exact_einsum("BTKGC,BSC->BKGTS", d_probed_i, probes[j])

            # dS = P (dP - delta); dq = dS k, dk = dS^T q
            d_logits = (weights * (d_weights - delta_i[..., None])).astype(q.dtype)
            d_q += jnp.einsum("BKGTS,BSKH->BTKGH", d_logits, k[j]).astype(jnp.float32)
            d_k = d_k.at[j].add(jnp.einsum("BKGTS,BTKGH->BSKH", d_logits, q_i))

            # dv = P^T dO, dc = P^T dR
            weights_low = weights.astype(v.dtype)
            d_v = d_v.at[j].add(jnp.einsum("BKGTS,BTKGH->BSKH", weights_low, d_out_low))
            d_block = exact_einsum("BKGTS,BTKGC->BSC", weights, d_probed_i)
            d_probes = d_probes.at[j].add(d_block)
            return d_q, d_k, d_v, d_probes

        start = (jnp.zeros(q_i.shape, jnp.float32), *sums)
        d_q, *sums = jax.lax.fori_loop(first, stop, add_key_block, start)
        return tuple(sums), d_q.astype(q.dtype)

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v, probes))
    spans = _key_block_spans(query, key)
    sums, d_q = jax.lax.scan(add_query_block, sums, (q, query, lse, delta, d_out, d_probed, *spans))
    d_k, d_v, d_probes = (s.astype(x.dtype) for s, x in zip(sums, (k, v, probes), strict=True))
    return d_q, d_k, d_v, d_probes, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _block_logits(
    q: jax.Array, k: jax.Array, query: Visibility, key: Visibility
) -> tuple[jax.Array, jax.Array]:
    """Returns logits f32[B,K,G,t,s] of one pair of blocks, and their mask bool[B,1,1,t,s]."""
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    mask = layout.visible(query, key)[:, None, None]
    return jnp.where(mask, logits, MASKED), mask


def _key_block_spans(query: Visibility, key: Visibility) -> tuple[jax.Array, jax.Array]:
    """Returns i32[i] twice: the first key block that each query block reads, and one past the last.

    A pair of blocks is skipped when its earliest key comes after the last query, or when the
    ranges of its segments do not touch. The spans are never too narrow; keys in them that are not
    visible are masked slot by slot.
    """
    # Smallest and largest segment per block and row: [i, B] and [j, B]
    q_low, q_high = query.segments.min(2), query.segments.max(2)
    k_low, k_high = key.segments.min(2), key.segments.max(2)

    # Which key blocks may be visible to a query block, [i, j, B] -> [i, j]
    last = jnp.where(query.visible_from < layout.NEVER, query.visible_from, -1).max(2)
    may_attend = key.visible_from.min(2)[None] <= last[:, None]
    may_attend &= (k_low[None] <= q_high[:, None]) & (q_low[:, None] <= k_high[None])
    may_attend = may_attend.any(2)

    count = may_attend.shape[1]
    first = jnp.where(may_attend, jnp.arange(count), count).min(1)
    stop = jnp.where(may_attend, jnp.arange(count) + 1, 0).max(1)
    return first, stop


def _to_blocks(x: layout.Array, block: int, fill: int = 0) -> jax.Array:
    """Returns [blocks,B,block,...] of [B,T,...], padded at the end with `fill`."""
    short = -x.shape[1] % block
    x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    x = x.reshape(x.shape[0], x.shape[1] // block, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _from_blocks(x: jax.Array, slots: int) -> jax.Array:
    """Returns [B,slots,...] of [blocks,B,block,...], without the padding."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :slots]


def _visibility_blocks(visibility: Visibility, block: int, segment: int) -> Visibility:
    """Returns the blocks of a visibility; padding is in the given segment, which is not visible."""
    return Visibility(
        _to_blocks(visibility.segments, block, segment),
        _to_blocks(visibility.visible_from, block, layout.NEVER),
    )


def _block_of(visibility: Visibility, j: jax.Array) -> Visibility:
    """Returns block j of a blocked visibility, [B,s]."""
    return Visibility(visibility.segments[j], visibility.visible_from[j])
