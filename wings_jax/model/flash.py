"""The chunked kernel of `attention.attend`: flash attention with probes, in plain JAX.

Queries and keys are cut into blocks, and no more than one block of the T x S matrix exists at a
time, in the forward and in the backward pass (arXiv 2205.14135). With logits s_tj = q_t k_j for a
visible key j, the forward pass keeps a running maximum m and sum l per query and rescales what it
has summed whenever the maximum grows:

    m'   = max(m, max_j s_tj)                      p_j = exp(s_tj - m')
    l'   = l   exp(m - m') + sum_j p_j
    out' = out exp(m - m') + sum_j p_j v_j         and at last out / l

The probes' values are multiplied with the same p in float32. The backward pass computes the rows
again from lse_t = m_t + log l_t, the log of the sum of exponentials of row t. With dO, dR the
gradients of `out` and `probed` (R), and c_j the probes of key j:

    P_tj    = exp(s_tj - lse_t)
    dP_tj   = dO_t v_j + dR_t c_j
    delta_t = sum_j P_tj dP_tj = rowsum(dO_t * O_t) + rowsum(dR_t * R_t)
    dS_tj   = P_tj (dP_tj - delta_t)               the softmax's gradient
    dq_t    = sum_j dS_tj k_j      dk_j = sum_t dS_tj q_t
    dv_j    = sum_t P_tj dO_t      dc_j = sum_t P_tj dR_t

Blocks in which no key is visible to any query are skipped.

What makes it fast on CPUs and costs nothing elsewhere:

    - Rows and kv heads are in front, and the queries of all G heads of a group are rows of one
      matrix, so that every product is a batch of plain matrix products.
    - Where v is float32, the probes are further channels of v: a product with few columns takes
      as long as one with H of them. Elsewhere v and probes are multiplied apart.
    - dk, dv and dc are summed transposed, [H,s]: XLA then transposes the small factor of the
      product (dO) and not the large one (P).

Shapes of blocked arrays: i counts query blocks of length t, j key blocks of length s, and r = t*G
is a row of a query block, so q is [i,B,K,r,H], k is [j,B,K,s,H], and values are [j,B,K,s,C].
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from wings_jax.model import layout
from wings_jax.model.layout import Visibility

# Logit of a key that is not visible; finite, so that a row without visible keys is not NaN.
MASKED = -1e30
# Where running maxima start: exp(MASKED - LOWEST) is 0, also in a row without visible keys.
LOWEST = MASKED / 2

# Products of float32 with probes: GPUs and TPUs would round their operands to fewer bits.
exact_einsum = functools.partial(jnp.einsum, precision="highest")

# Name of what the remat policy `save_attn` saves: results and lse of every attention.
SAVED = "attention"
# Name of what every attention reads: its queries, keys and values with rope.
INPUTS = "attention inputs"

Values = tuple[jax.Array, ...]


class Residuals(NamedTuple):
    """What the forward pass saves for the backward pass, all in blocks.

    q, k, values  as the forward pass reads them
    query, key    the two sides of the attention mask, [i,B,r] and [j,B,s]
    outputs       as the forward pass returns them
    lse           f32[i,B,K,r], log of each row's sum of exponentials
    """

    q: jax.Array
    k: jax.Array
    values: Values
    query: Visibility
    key: Visibility
    outputs: Values
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
      block: longest block of queries and of keys, in slots.
    """
    (rows, slots, kv_heads, groups, width), num_keys = q.shape, k.shape[1]
    t, s = _block_length(slots, block), _block_length(num_keys, block)

    # [B, T, K, G, H] -> [i, B, K, t * G, H]
    q_blocks = _to_blocks(q / math.sqrt(width), t)
    q_blocks = q_blocks.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows, kv_heads, t * groups, width)
    query = _visibility_blocks(query, t, segment=-1)
    query = jax.tree.map(lambda x: jnp.repeat(x, groups, axis=2), query)

    # [B, S, K, H] -> [j, B, K, s, H]; the probes are the same for every head.
    shared = jnp.broadcast_to(probes[:, :, None], (rows, num_keys, kv_heads, probes.shape[-1]))
    values = [jnp.concatenate([v, shared], -1)] if v.dtype == jnp.float32 else [v, shared]
    k_blocks, *value_blocks = (_to_blocks(x, s).swapaxes(2, 3) for x in (k, *values))

    outputs = _flash(
        q_blocks, k_blocks, tuple(value_blocks), query, _visibility_blocks(key, s, segment=-2)
    )

    def restore(x: jax.Array) -> jax.Array:
        # [i, B, K, t * G, C] -> [i, B, t, K, G, C] -> [B, T, K, G, C]
        # No -1: without probes C is 0.
        blocks = q_blocks.shape[0]
        x = x.reshape(blocks, rows, kv_heads, t, groups, x.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
        return _from_blocks(x, slots)

    # `out` first, then the probed values.
    joined = [restore(x) for x in outputs]
    if len(joined) == 1:
        joined = jnp.split(joined[0], [v.shape[-1]], axis=-1)
    return joined[0].astype(q.dtype), joined[1]


@jax.custom_vjp
def _flash(
    q: jax.Array, k: jax.Array, values: Values, query: Visibility, key: Visibility
) -> Values:
    """Returns the rows of attention times each of the values, [i,B,K,r,C] in its dtype."""
    return _flash_forward(q, k, values, query, key)[0]


def _flash_forward(
    q: jax.Array, k: jax.Array, values: Values, query: Visibility, key: Visibility
) -> tuple[Values, Residuals]:
    """Returns the outputs, and what the backward pass reads."""

    def attend_query_block(args):
        q_i, query_i, first, stop = args

        def add_key_block(j, carry):
            running_max, running_sum, outputs = carry
            logits = _block_logits(q_i, k[j], query_i, _block_of(key, j))

            # p = exp(s - m'), [B, K, r, s]; what was summed before is rescaled to m'.
            new_max = jnp.maximum(running_max, logits.max(-1))
            weights = jnp.exp(logits - new_max[..., None])
            rescale = jnp.exp(running_max - new_max)

            running_sum = running_sum * rescale + weights.sum(-1)
            outputs = tuple(
                output * rescale[..., None]
                + _product("BKTS,BKSC->BKTC", weights, value[j], is_exact=True)
                for output, value in zip(outputs, values, strict=True)
            )
            return new_max, running_sum, outputs

        shape = q_i.shape[:-1]  # [B, K, r]
        start = (
            jnp.full(shape, LOWEST),
            jnp.zeros(shape),
            tuple(jnp.zeros((*shape, value.shape[-1])) for value in values),
        )
        running_max, running_sum, outputs = jax.lax.fori_loop(first, stop, add_key_block, start)

        # A query without visible keys has the sum 0, and the result 0.
        divisor = jnp.where(running_sum > 0, running_sum, 1.0)
        lse = running_max + jnp.log(divisor)
        scaled = (output / divisor[..., None] for output in outputs)
        return tuple(x.astype(v.dtype) for x, v in zip(scaled, values, strict=True)), lse

    spans = _key_block_spans(query, key)
    results = jax.lax.map(attend_query_block, (q, query, *spans))
    outputs, lse = checkpoint_name(results, SAVED)
    return outputs, Residuals(q, k, values, query, key, outputs, lse)


def _flash_backward(
    residuals: Residuals, cotangents: Values
) -> tuple[jax.Array, jax.Array, Values, None, None]:
    """Returns the gradients of q, k and the values in their dtypes, from those of the outputs."""
    q, k, values, query, key, outputs, lse = residuals

    # delta = rowsum(dO * O) + rowsum(dR * R), [i, B, K, r]
    pairs = [
        (x.astype(jnp.float32) for x in pair) for pair in zip(cotangents, outputs, strict=True)
    ]
    delta = sum(exact_einsum("iBKTC,iBKTC->iBKT", *pair) for pair in pairs)

    def add_query_block(sums, args):
        q_i, query_i, lse_i, delta_i, d_outputs, first, stop = args

        def add_key_block(j, carry):
            d_q, d_k, d_values = carry
            logits = _block_logits(q_i, k[j], query_i, _block_of(key, j))

            # P = exp(s - lse) and dP = dO v + dR c, [B, K, r, s]
            weights = jnp.exp(logits - lse_i[..., None])
            d_weights = -delta_i[..., None]
            for d_output, value in zip(d_outputs, values, strict=True):
                d_weights += _product("BKTC,BKSC->BKTS", d_output, value[j], is_exact=True)

            # dS = P (dP - delta); dq = dS k, dk = dS^T q
            d_logits = (weights * d_weights).astype(q.dtype)
            d_q += _product("BKTS,BKSH->BKTH", d_logits, k[j])
            d_k = d_k.at[j].add(_product("BKTH,BKTS->BKHS", q_i, d_logits))

            # dv = P^T dO, dc = P^T dR
            d_values = tuple(
                d_value.at[j].add(_product("BKTC,BKTS->BKCS", d_output, weights, is_exact=True))
                for d_value, d_output in zip(d_values, d_outputs, strict=True)
            )
            return d_q, d_k, d_values

        start = (jnp.zeros(q_i.shape, jnp.float32), *sums)
        d_q, *sums = jax.lax.fori_loop(first, stop, add_key_block, start)
        return tuple(sums), d_q.astype(q.dtype)

    # The sums are transposed, [j, B, K, C, s].
    zeros = [jnp.zeros_like(x, jnp.float32).swapaxes(-1, -2) for x in (k, *values)]
    blocks = (q, query, lse, delta, cotangents, *_key_block_spans(query, key))
    (d_k, d_values), d_q = jax.lax.scan(add_query_block, (zeros[0], tuple(zeros[1:])), blocks)
    d_k, *d_rest = (
        total.swapaxes(-1, -2).astype(x.dtype)
        for total, x in zip((d_k, *d_values), (k, *values), strict=True)
    )
    return d_q, d_k, tuple(d_rest), None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _product(eqn: str, x: jax.Array, y: jax.Array, *, is_exact: bool = False) -> jax.Array:
    """Returns the f32 product of two arrays, of which one may be rounded to the other's dtype.

    With `is_exact` the operands are not rounded to fewer bits, where both are float32.
    """
    dtype = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    precision = "highest" if is_exact and dtype == jnp.float32 else None
    x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(eqn, x, y, precision=precision, preferred_element_type=jnp.float32)


def _block_logits(q: jax.Array, k: jax.Array, query: Visibility, key: Visibility) -> jax.Array:
    """Returns logits f32[B,K,r,s] of one pair of blocks, MASKED where a key is not visible."""
    mask = layout.visible(query, key)[:, None]
    return jnp.where(mask, _product("BKTH,BKSH->BKTS", q, k), MASKED)


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


def _block_length(slots: int, longest: int) -> int:
    """Returns the length of equal blocks of at most `longest` slots, with little padding.

    >>> _block_length(1024, 256), _block_length(64, 256), _block_length(300, 256)
    (256, 64, 160)
    """
    count = -(-slots // longest)
    length = -(-slots // count)
    return min(longest, -(-length // 16) * 16)


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
