"""attend(): the one attention, for the LLM, the learners and the vision tower.

Several kernels have one signature. `einsum` is the reference, whose results the others must equal;
`chunked` is a flash attention (`flash.py`), whose memory is O(T x block). `merged` is `einsum` for
few queries, and for keys that are in a KV cache. `splash`, `tokamax` and `cudnn` are kernels of
accelerators (`kernels/`).

Probes: `attend` also returns the products of the attention rows with per-key values that are
shared by all heads. The router's input (values: its weights) and the attention masses of
before/image/after (values: one-hot classes) are such products, so neither ever needs the
T x S matrix.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from wings_jax.model import flash
from wings_jax.model import layout as layout_lib
from wings_jax.model.flash import INPUTS, MASKED, exact_einsum
from wings_jax.model.kernels import choice
from wings_jax.model.kernels import intervals as intervals_lib
from wings_jax.model.kernels.intervals import KeyMask
from wings_jax.model.kernels.sharding import over_mesh
from wings_jax.model.layout import Visibility

# What a caller may choose.
KERNELS = ("auto", *choice.PORTABLE, *choice.ACCELERATED)
ACCELERATED = tuple(choice.ACCELERATED)  # kernels that need an accelerator
BLOCK = 256  # slots per block of the chunked kernel, at most
# On CPUs a pair of blocks of narrow heads is then in the cache (benchmarks/attention.py).
CPU_BLOCK, CPU_BLOCK_WIDTH = 128, 64  # slots per block, for heads up to this width
SMALL = 256  # `auto` takes the einsum up to this many query and key slots
WITH_BRANCHES = ("einsum", "merged")  # kernels for conversations that continue in several ways
FEW = 64  # `auto` takes the merged kernel up to this many query slots of a long KV cache


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    query: Visibility | None = None,
    key: Visibility | None = None,
    probes: jax.Array | None = None,
    kernel: str = "auto",
    block: int | None = None,
    mask: KeyMask | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns softmax(q k^T / sqrt(H)) v, and the same attention rows times the probes.

    Args:
      q: [B,T,N,H]
      k, v: [B,S,K,H] with N = K G (query head n reads kv head n // G), or a cache [B*K,S,H].
      query, key: the two sides of the attention mask (`layout.visible`), [B,T] and [B,S]; without
        them every query attends to every key.
      probes: f32[B,S,C], per-key values, shared by all heads.
      kernel: one of KERNELS, or 'merged'; 'auto' chooses by shape (`choose_kernel`).
      block: block length of the chunked kernel, in slots; by default that of `choose_block`.
      mask: `query` and `key` as the kernels of accelerators read them (`prepare_keys`), with the
        keys and values in that order; made from them where it is not given.

    Returns:
      out: [B,T,N,H] in q's dtype; exactly 0 for a query without visible keys.
      probed: f32[B,T,N,C], or None without probes. The softmax is float32.

    Raises:
      ValueError: the kernel does not exist, or does not support `Visibility.branches`.
    """
    q, k, v = (checkpoint_name(x, INPUTS) for x in (q, k, v))
    is_cache = k.ndim == 3
    num_queries, num_keys = q.shape[1], k.shape[1]
    kernel = choose_kernel(kernel, num_queries, num_keys, is_cache=is_cache, dtype=q.dtype)
    _check_branches(kernel, query)
    if kernel in choice.ACCELERATED:
        return _accelerated(kernel, q, k, v, probes, query, key, mask)

    if query is None or key is None:
        query = _all_visible(q.shape[0], num_queries)
        key = _all_visible(q.shape[0], num_keys)
    if kernel == "merged":
        return _merged(q, k, v, probes, query, key)

    if is_cache:
        # [B*K, S, H] -> [B, S, K, H]
        k, v = (split_heads(x, q.shape[0]) for x in (k, v))

    has_probes = probes is not None
    if probes is None:
        probes = jnp.zeros((q.shape[0], num_keys, 0), jnp.float32)

    # Query heads by the kv head that they read: [B, T, N, H] -> [B, T, K, G, H]
    groups = q.reshape(*q.shape[:2], k.shape[2], q.shape[2] // k.shape[2], q.shape[3])
    if kernel == "chunked":
        block = block or choose_block(q.shape[-1])
        out, probed = flash.attend_in_blocks(groups, k, v, probes, query, key, block)
    else:
        out, probed = _einsum(groups, k, v, probes, query, key)

    # [B, T, K, G, H] -> [B, T, N, H]
    out, probed = out.reshape(q.shape), probed.reshape(*q.shape[:3], probes.shape[-1])
    return out, probed if has_probes else None


def _check_branches(kernel: str, query: Visibility | None) -> None:
    if query is not None and query.branches is not None and kernel not in WITH_BRANCHES:
        raise ValueError(f"attention kernel {kernel!r} does not support branches")


def choose_kernel(
    kernel: str,
    num_queries: int,
    num_keys: int,
    *,
    is_cache: bool,
    dtype: jnp.dtype = jnp.float32,
) -> str:
    """Returns the kernel that `attend` runs: one of KERNELS but 'auto', or 'merged'.

    An explicit choice is always followed. 'auto' reads a KV cache in its own form ('merged')
    where that is small or the queries are few, and else chooses by the number of slots; for many
    it takes the best kernel of the device (`choice.best_kernel`), but 'chunked' for a KV cache.

    >>> choose_kernel("auto", 200, 200, is_cache=False)
    'einsum'
    >>> choose_kernel("auto", 2048, 2048, is_cache=False)
    'chunked'
    >>> choose_kernel("auto", 1, 4096, is_cache=True)
    'merged'
    >>> choose_kernel("chunked", 1, 4096, is_cache=True)
    'chunked'

    Raises:
      ValueError: `kernel` is neither one of KERNELS nor 'merged'.
    """
    if kernel not in (*KERNELS, "merged"):
        raise ValueError(f"attention kernel {kernel!r} is not one of {KERNELS}")
    if kernel != "auto":
        return kernel

    is_small = max(num_queries, num_keys) <= SMALL
    if is_cache and (is_small or num_queries <= FEW):
        return "merged"
    if is_small:
        return "einsum"
    return "chunked" if is_cache else choice.best_kernel(jnp.dtype(dtype))


def choose_block(width: int) -> int:
    """Returns the block length of the chunked kernel for heads of this width, in slots."""
    is_narrow = width <= CPU_BLOCK_WIDTH
    return CPU_BLOCK if is_narrow and choice.target_device().platform == "cpu" else BLOCK


def prepare_keys(
    kernel: str,
    query: Visibility,
    key: Visibility,
    *,
    is_causal: bool,
    is_triangular: bool = False,
) -> tuple[KeyMask, jax.Array | None]:
    """Returns the mask in the form of a kernel of accelerators, and the order of its keys.

    The order i32[B,S] is what keys and values are to be taken in (`intervals.take_slots`); None:
    as they are.

    Args:
      kernel: one of `choice.ACCELERATED`.
      query, key: the two sides of the attention mask, [B,T] and [B,S].
      is_causal: whether the keys are the slots of the queries, each visible from its own on.
      is_triangular: whether they are some of these slots, in their order (`KeyMask`).
    """
    is_triangular = is_triangular or is_causal
    if not choice.ACCELERATED[kernel].packs_keys(is_causal):
        intervals = intervals_lib.key_intervals(query, key)
        return KeyMask(query, key, intervals, is_causal, is_triangular), None

    order = intervals_lib.pack_order(key)
    key = jax.tree.map(lambda x: intervals_lib.take_slots(x, order), key)
    intervals = intervals_lib.key_intervals(query, key)
    return KeyMask(query, key, intervals, is_triangular=is_triangular), order


def _accelerated(
    kernel: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    probes: jax.Array | None,
    query: Visibility | None,
    key: Visibility | None,
    mask: KeyMask | None,
) -> tuple[jax.Array, jax.Array | None]:
    """`attend` with a kernel of `choice.ACCELERATED`."""
    if k.ndim == 3:
        # [B*K, S, H] -> [B, S, K, H]
        k, v = (split_heads(x, q.shape[0]) for x in (k, v))

    has_probes = probes is not None
    if probes is None:
        probes = jnp.zeros((*k.shape[:2], 0), jnp.float32)

    if mask is None and query is not None and key is not None:
        mask, order = prepare_keys(kernel, query, key, is_causal=False)
        if order is not None:
            k, v, probes = (intervals_lib.take_slots(x, order) for x in (k, v, probes))

    run = over_mesh(choice.ACCELERATED[kernel].attend)
    out, probed = run(q, k, v, probes, mask)
    return out, probed if has_probes else None


def merge_heads(x: jax.Array) -> jax.Array:
    """Returns [B*K,S,H] of [B,S,K,H], the form of a KV cache.

    With rows and heads apart, XLA's CPU compiler copies a whole cache for every token that is
    written into it; with them merged it writes in place (benchmarks/decode.py).
    """
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def split_heads(x: jax.Array, rows: int) -> jax.Array:
    """Returns [B,S,K,H] of [B*K,S,H], the inverse of `merge_heads`; `rows` is B."""
    return x.reshape(rows, -1, *x.shape[1:]).swapaxes(1, 2)


def _all_visible(rows: int, slots: int) -> Visibility:
    zeros = jnp.zeros((rows, slots), jnp.int32)
    return Visibility(zeros, zeros)


def _einsum(
    q: jax.Array, k: jax.Array, v: jax.Array, probes: jax.Array, query: Visibility, key: Visibility
) -> tuple[jax.Array, jax.Array]:
    """The reference: q [B,T,K,G,H] -> out [B,T,K,G,H] and probed f32[B,T,K,G,C]."""
    # [B, K, G, T, S]
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    # [B, T, S] -> [B, 1, 1, T, S]
    mask = layout_lib.visible(query, key)[:, None, None]
    logits = jnp.where(mask, logits / math.sqrt(q.shape[-1]), MASKED)

    # The second mask makes the rows of queries without visible keys 0.
    weights = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0.0)

    # [B, K, G, T, S] -> [B, T, K, G, H], and the probed rows [B, T, K, G, C]
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v.dtype), v)
    probed = exact_einsum("BKGTS,BSC->BTKGC", weights, probes)
    return out, probed


def _merged(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    probes: jax.Array | None,
    query: Visibility,
    key: Visibility,
) -> tuple[jax.Array, jax.Array | None]:
    """`_einsum` for few queries [B,T,N,H] and a KV cache [B*K,S,H], which is not rearranged.

    Batch and kv heads stay one dimension (`n`), and queries and groups become one (`g`). Keys and
    values [B,S,K,H] are rearranged; without gradients it takes half of `_einsum`'s time on CPUs.
    """
    if k.ndim == 4:
        k, v = merge_heads(k), merge_heads(v)

    (rows, slots, heads, width), kv_heads = q.shape, k.shape[0] // q.shape[0]

    # [B, T, N, H] -> [B, T, K, G, H] -> [B, K, T, G, H] -> [B*K, T*G, H]
    groups = q.reshape(rows, slots, kv_heads, heads // kv_heads, width)
    groups = groups.transpose(0, 2, 1, 3, 4).reshape(k.shape[0], -1, width)

    # [B*K, T*G, S]
    logits = jnp.einsum("ngh,nsh->ngs", groups, k, preferred_element_type=jnp.float32)
    # [B, T, S] -> [B, K, T, G, S] -> [B*K, T*G, S]
    mask = layout_lib.visible(query, key)[:, None, :, None]
    mask = jnp.broadcast_to(mask, (rows, kv_heads, slots, heads // kv_heads, k.shape[1]))
    mask = mask.reshape(logits.shape)
    weights = jax.nn.softmax(jnp.where(mask, logits / math.sqrt(width), MASKED), axis=-1)
    weights = jnp.where(mask, weights, 0.0)

    # [B*K, T*G, H] -> [B, K, T, G, H] -> [B, T, K, G, H] -> [B, T, N, H]
    out = jnp.einsum("ngs,nsh->ngh", weights.astype(v.dtype), v)
    out = out.reshape(rows, kv_heads, slots, -1, width)
    out = out.transpose(0, 2, 1, 3, 4).reshape(q.shape)
    weights = weights.reshape(rows, kv_heads, slots, -1, k.shape[1])
    if probes is None:
        return out, None

    probed = exact_einsum("BKTGS,BSC->BTKGC", weights, probes)
    return out, probed.reshape(rows, slots, heads, -1)
