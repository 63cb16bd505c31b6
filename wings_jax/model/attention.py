"""attend(): the one attention, for the LLM, the learners and the vision tower.

Kernels stand behind one signature. `einsum` is the plain reference, which the others must equal;
`chunked` walks over blocks with a running softmax, in forward and backward, so its memory is
O(T x block) and blocks that nobody may see are skipped, whatever made them invisible.

Probes: `attend` also returns what the attention rows give when multiplied with per-key values
shared by all heads. The router's input (values: its weights) and the attention masses of
before/image/after (values: one-hot classes) are such products, so neither ever needs the
T x S matrix.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from wings_jax.model import layout as layout_lib
from wings_jax.model.layout import Visibility

KERNELS = ("auto", "einsum", "chunked")
BLOCK = 256
SMALL = 512  # up to this many query and key slots `auto` takes the plain einsum
FEW = 64  # up to this many query slots read a long cache as it lies
_LOWEST = -1e30


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    query: Visibility | None = None,
    key: Visibility | None = None,
    probes: jax.Array | None = None,
    kernel: str = "auto",
    block: int = BLOCK,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns softmax(q k^T / sqrt(H)) v, and the same rows times the probes.

    Args:
      q: [B,T,N,H]; k, v: [B,S,K,H] with N a multiple of K (query head n reads kv head n // G),
        or [B*K,S,H] as a cache holds them (`merge_heads`).
      query, key: who sees whom (`layout.visible`); without them everyone sees everyone.
      probes: f32[B,S,C], values per key shared by all heads.
      kernel: one of KERNELS.
      block: block length of the chunked kernel, in slots.

    Returns:
      out: [B,T,N,H] in q's dtype; exactly 0 for a query that sees no key.
      probed: f32[B,T,N,C], a row per head, or None without probes. The softmax is float32.
    """
    if k.ndim == 3 and max(q.shape[1], k.shape[1]) > SMALL and q.shape[1] > FEW:
        k, v = (split_heads(x, q.shape[0]) for x in (k, v))
    if k.ndim == 3:
        kernel = "merged"
    elif kernel == "auto":
        kernel = "einsum" if max(q.shape[1], k.shape[1]) <= SMALL else "chunked"
    has_probes = probes is not None
    if not has_probes:
        probes = jnp.zeros((q.shape[0], k.shape[-2 if k.ndim == 3 else 1], 0), jnp.float32)
    if query is None:
        query, key = _everyone(q), _everyone(k)
    if kernel == "merged":
        out, probed = _merged(q, k, v, probes if has_probes else None, query, key)
    elif kernel == "einsum":
        out, probed = _einsum(q, k, v, probes, query, key)
    elif kernel == "chunked":
        out, probed = _chunked(q, k, v, probes, query, key, block)
    else:
        raise ValueError(f"attention kernel {kernel!r} is not one of {KERNELS}")
    return out, probed if has_probes else None


def _everyone(x: jax.Array) -> Visibility:
    zeros = jnp.zeros(x.shape[:2], jnp.int32)
    return Visibility(zeros, zeros)


# Products of float32 with probes: GPUs and TPUs would round their operands to fewer bits.
_exact = functools.partial(jnp.einsum, precision="highest")


def _einsum(
    q: jax.Array, k: jax.Array, v: jax.Array, probes: jax.Array, query: Visibility, key: Visibility
) -> tuple[jax.Array, jax.Array]:
    groups = _grouped(q, k.shape[2])
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", groups, k, preferred_element_type=jnp.float32)
    seen = layout_lib.visible(query, key)[:, None, None]
    logits = jnp.where(seen, logits / math.sqrt(q.shape[-1]), _LOWEST)
    rows = jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0.0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", rows.astype(v.dtype), v)
    probed = _exact("BKGTS,BSC->BTKGC", rows, probes)
    return out.reshape(q.shape), probed.reshape(*q.shape[:3], probes.shape[-1])


def merge_heads(x: jax.Array) -> jax.Array:
    """[B,S,K,H] -> [B*K,S,H], the form of a cache.

    With rows and heads apart, XLA's CPU compiler copies a whole cache at every token that is
    written into it; with them merged it writes in place (benchmarks/decode.py).
    """
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def split_heads(x: jax.Array, rows: int) -> jax.Array:
    """[B*K,S,H] -> [B,S,K,H], the inverse of `merge_heads`."""
    return x.reshape(rows, -1, *x.shape[1:]).swapaxes(1, 2)


def _merged(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    probes: jax.Array | None,
    query: Visibility,
    key: Visibility,
) -> tuple[jax.Array, jax.Array | None]:
    """`_einsum` for few queries and a cache: k, v [B*K,S,H]."""
    (rows, slots, heads, width), kv_heads = q.shape, k.shape[0] // q.shape[0]
    groups = _grouped(q, kv_heads).transpose(0, 2, 1, 3, 4).reshape(k.shape[0], -1, width)
    logits = jnp.einsum("ngh,nsh->ngs", groups, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(rows, kv_heads, slots, -1, k.shape[1]) / math.sqrt(width)
    seen = layout_lib.visible(query, key)[:, None, :, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, _LOWEST), axis=-1)
    weights = jnp.where(seen, weights, 0.0)
    merged = weights.reshape(k.shape[0], -1, k.shape[1]).astype(v.dtype)
    out = jnp.einsum("ngs,nsh->ngh", merged, v).reshape(rows, kv_heads, slots, -1, width)
    out = out.transpose(0, 2, 1, 3, 4).reshape(q.shape)
    if probes is None:
        return out, None
    probed = _exact("BKTGS,BSC->BTKGC", weights, probes)
    return out, probed.reshape(rows, slots, heads, -1)


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B,T,N,H] -> [B,T,K,G,H]."""
    return x.reshape(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, x.shape[3])


# --- chunked: running softmax over blocks, forward and backward ------------------------------


def _chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    probes: jax.Array,
    query: Visibility,
    key: Visibility,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    slots = q.shape[1]
    groups = _grouped(q, k.shape[2]) / math.sqrt(q.shape[-1])
    query = _visibility_blocks(query, block, -1)
    key = _visibility_blocks(key, block, -2)
    out, probed = _flash(
        _blocks(groups, block),
        _blocks(k, block),
        _blocks(v, block),
        _blocks(probes, block),
        query,
        key,
    )
    out, probed = _join(out, slots), _join(probed, slots)
    return out.reshape(q.shape), probed.reshape(*q.shape[:3], probes.shape[-1])


def _blocks(x: jax.Array, block: int, fill: int = 0) -> jax.Array:
    """[B,T,...] -> [blocks,B,block,...], filled up at the end."""
    short = -x.shape[1] % block
    x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    x = x.reshape(x.shape[0], x.shape[1] // block, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _visibility_blocks(visibility: Visibility, block: int, segment: int) -> Visibility:
    """Blocks of a visibility; padding gets a segment of its own, so nothing attends to it."""
    order = _blocks(visibility.visible_from, block, layout_lib.NEVER)
    return Visibility(_blocks(visibility.segments, block, segment), order)


def _join(x: jax.Array, slots: int) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :slots]


def _reach(query: Visibility, key: Visibility) -> tuple[jax.Array, jax.Array]:
    """Returns i32[query blocks], twice: the first key block each may see, and one past the last.

    A block is ruled out when its earliest key comes after the last query, or when the ranges of
    segments do not touch: never too narrow, and what it lets through is masked slot by slot.
    """
    q_low, q_high = query.segments.min(2), query.segments.max(2)
    k_low, k_high = key.segments.min(2), key.segments.max(2)
    last = jnp.where(query.visible_from < layout_lib.NEVER, query.visible_from, -1).max(2)
    seen = key.visible_from.min(2)[None] <= last[:, None]
    seen &= (k_low[None] <= q_high[:, None]) & (q_low[:, None] <= k_high[None])
    seen = seen.any(2)
    count = seen.shape[1]
    first = jnp.where(seen, jnp.arange(count), count).min(1)
    past = jnp.where(seen, jnp.arange(count) + 1, 0).max(1)
    return first, past


def _scores(
    q: jax.Array, k: jax.Array, query: Visibility, key: Visibility
) -> tuple[jax.Array, jax.Array]:
    """One block pair: f32[B,K,G,t,s] logits and bool[B,1,1,t,s], where a key is seen."""
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    seen = layout_lib.visible(query, key)[:, None, None]
    return jnp.where(seen, logits, _LOWEST), seen


@jax.custom_vjp
def _flash(q, k, v, probes, query, key):
    return _flash_forward(q, k, v, probes, query, key)[0]


def _flash_forward(q, k, v, probes, query, key):
    def row(args):
        q_i, query_i, first, past = args
        shape = (q_i.shape[0], *q_i.shape[2:4], q_i.shape[1])  # B K G t

        def column(j, carry):
            top, total, out, probed = carry
            key_j = Visibility(key.segments[j], key.visible_from[j])
            logits, seen = _scores(q_i, k[j], query_i, key_j)
            new = jnp.maximum(top, logits.max(-1))
            weights = jnp.where(seen, jnp.exp(logits - new[..., None]), 0.0)
            old = jnp.exp(top - new)
            total = total * old + weights.sum(-1)
            fresh = jnp.einsum(
                "BKGTS,BSKH->BKGTH",
                weights.astype(v.dtype),
                v[j],
                preferred_element_type=jnp.float32,
            )
            out = out * old[..., None] + fresh
            probed = probed * old[..., None] + _exact("BKGTS,BSC->BKGTC", weights, probes[j])
            return new, total, out, probed

        start = (
            jnp.full(shape, _LOWEST),
            jnp.zeros(shape),
            jnp.zeros((*shape, v.shape[-1])),
            jnp.zeros((*shape, probes.shape[-1])),
        )
        top, total, out, probed = jax.lax.fori_loop(first, past, column, start)
        divisor = jnp.where(total > 0, total, 1.0)
        out, probed = (jnp.moveaxis(x / divisor[..., None], 3, 1) for x in (out, probed))
        return out.astype(q.dtype), probed, top + jnp.log(divisor)

    out, probed, lse = jax.lax.map(row, (q, query, *_reach(query, key)))
    return (out, probed), (q, k, v, probes, query, key, out, probed, lse)


def _flash_backward(saved, cotangents):
    q, k, v, probes, query, key, out, probed, lse = saved
    d_out, d_probed = (x.astype(jnp.float32) for x in cotangents)
    delta = (d_out * out.astype(jnp.float32)).sum(-1) + (d_probed * probed).sum(-1)

    def row(carry, args):
        q_i, query_i, lse_i, delta_i, d_out_i, d_probed_i, first, past = args
        delta_i = jnp.moveaxis(delta_i, 1, 3)
        d_out_low = d_out_i.astype(v.dtype)

        def column(j, carry):
            d_q, d_k, d_v, d_probes = carry
            key_j = Visibility(key.segments[j], key.visible_from[j])
            logits, seen = _scores(q_i, k[j], query_i, key_j)
            weights = jnp.where(seen, jnp.exp(logits - lse_i[..., None]), 0.0)
            d_weights = jnp.einsum(
                "BTKGH,BSKH->BKGTS", d_out_low, v[j], preferred_element_type=jnp.float32
            )
            d_weights += _exact("BTKGC,BSC->BKGTS", d_probed_i, probes[j])
            d_logits = (weights * (d_weights - delta_i[..., None])).astype(q.dtype)
            d_q += jnp.einsum("BKGTS,BSKH->BTKGH", d_logits, k[j]).astype(jnp.float32)
            d_k = d_k.at[j].add(jnp.einsum("BKGTS,BTKGH->BSKH", d_logits, q_i))
            low = weights.astype(v.dtype)
            d_v = d_v.at[j].add(jnp.einsum("BKGTS,BTKGH->BSKH", low, d_out_low))
            d_probes = d_probes.at[j].add(_exact("BKGTS,BTKGC->BSC", weights, d_probed_i))
            return d_q, d_k, d_v, d_probes

        start = (jnp.zeros(q_i.shape, jnp.float32), *carry)
        d_q, *carry = jax.lax.fori_loop(first, past, column, start)
        return tuple(carry), d_q.astype(q.dtype)

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v, probes))
    reach = _reach(query, key)
    sums, d_q = jax.lax.scan(row, sums, (q, query, lse, delta, d_out, d_probed, *reach))
    d_k, d_v, d_probes = (s.astype(x.dtype) for s, x in zip(sums, (k, v, probes), strict=True))
    return d_q, d_k, d_v, d_probes, None, None


_flash.defvjp(_flash_forward, _flash_backward)
