"""Attention on NVIDIA Hopper and later: tokamax's Mosaic GPU kernels, bfloat16.

Masks are intervals of keys per query, whose blocks outside are skipped, and values may be wider
than keys, so the probes are columns of the values (`columns.py`). tokamax is optional: it is in
the `gpu` extra of the package.

This uses modules below `tokamax._src`: its public function takes no intervals, and its backward
pass skips no block of them. Run on an H100 with tokamax 0.0.17; 0.0.12 has the same functions.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.ad_checkpoint import checkpoint_name

from wings_jax.model.kernels import columns
from wings_jax.model.kernels import intervals as intervals_lib
from wings_jax.model.kernels.intervals import Intervals, KeyMask

# Implementations of tokamax: "mosaic_gpu" on a device, "xla" for tests on any backend.
IMPLEMENTATION = "mosaic_gpu"
QUERIES = 128  # the number of query slots is a multiple of this: two blocks of 64
KEYS = 64  # that of key slots of this, one block
COLUMNS = 16  # that of value columns of this, the narrowest tile in shared memory
# Slots per block of the backward pass on Hopper; larger ones were slower or did not fit.
BLOCKS = {"block_q_dkv": 64, "block_kv_dkv": 64, "block_q_dq": 64, "block_kv_dq": 64}
# Log-sum-exponential of a query without visible keys: its weights exp(logit - lse) are exactly 0
# in the backward pass, and so are all gradients of its row.
NO_KEYS = 1e30
WIDE = 128  # columns of values, above which one warpgroup is faster than two: registers are short


def requirement(device: jax.Device, dtype: jnp.dtype) -> str | None:
    """Returns what is missing for this kernel, in a few words; None where it runs."""
    capability = float(getattr(device, "compute_capability", 0) or 0)
    if device.platform != "gpu" or not 9.0 <= capability < 11.0:
        return "needs an NVIDIA GPU of compute capability 9.0 to 10.x (H100, H200, B200)"
    if dtype != jnp.bfloat16:
        return "computes in bfloat16 (config.compute_dtype)"
    if importlib.util.find_spec("tokamax") is None:
        return "needs tokamax: pip install 'wings_jax[gpu]'"
    return None


def packs_keys(is_causal: bool) -> bool:
    """Returns whether never visible keys must be at the end (`intervals.pack_order`)."""
    return True


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    probes: jax.Array,
    mask: KeyMask | None,
    *,
    implementation: str | None = None,
    out_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns out [B,T,N,H] in q's dtype, and probed f32[B,T,N,C].

    Args:
      q: [B,T,N,H]
      k, v: [B,S,K,H]
      probes: f32[B,S,C]; C may be 0.
      mask: its intervals are the keys that each query attends to; None: all.
      implementation: of tokamax, IMPLEMENTATION by default.
      out_dtype: in which the kernel writes its rows, q's by default. With float32 the probed rows
        are not rounded to bfloat16, and the kernel writes twice as much.
    """
    # Probes are further columns of the values, so one pass computes both.
    (num_queries, width), num_probes = (q.shape[1], q.shape[3]), probes.shape[-1]
    wide = columns.add_columns(v, probes if num_probes else None, COLUMNS if num_probes else 1)

    if mask is None:
        every = jnp.zeros((q.shape[0], num_queries), jnp.int32)
        visible, has_keys = Intervals(every, every + k.shape[1]), None
    else:
        visible = intervals_lib.without_empty(mask.intervals)
        has_keys = jnp.asarray(mask.intervals.has_keys)

    # The kernel reads slots in blocks, so some are added; no query attends to an added key.
    padding, key_padding = -num_queries % QUERIES, -k.shape[1] % KEYS
    # [B,T] -> [B,1,T'], the shape of tokamax's masks
    starts, stops = (
        jnp.pad(x, ((0, 0), (0, padding)), mode="edge")[:, None]
        for x in (visible.start, visible.stop)
    )
    if has_keys is not None:
        # [B,T] -> [B,T']
        has_keys = jnp.pad(has_keys, ((0, 0), (0, padding)))
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    k, wide = (jnp.pad(x, ((0, 0), (0, key_padding), (0, 0), (0, 0))) for x in (k, wide))

    settings = Settings(
        implementation or IMPLEMENTATION,
        jnp.dtype(out_dtype or q.dtype),
        mask is not None and mask.is_triangular,
    )
    out = _attention(settings, q, k, wide, starts, stops, has_keys)
    return columns.split_columns(out[:, :num_queries], width, num_probes, v.dtype)


class Settings(NamedTuple):
    """What a kernel is compiled for.

    implementation  of tokamax
    out_dtype       of the kernel's output
    is_triangular   whether no query attends to a key slot after its own
    """

    implementation: str
    out_dtype: jnp.dtype
    is_triangular: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array,
    stops: jax.Array,
    has_keys: jax.Array | None,
) -> jax.Array:
    """Returns [B,T,N,W] of values [B,S,K,W] and intervals i32[B,1,T].

    Queries without `has_keys` bool[B,T] get 0.
    """
    return _forward(settings, q, k, v, starts, stops, has_keys)[0]


def _forward(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array,
    stops: jax.Array,
    has_keys: jax.Array | None,
) -> tuple[jax.Array, tuple]:
    """Returns the output, and what the backward pass reads.

    Output and log-sum-exponentials are named, so that a rematerialization policy can keep them and
    the backward pass needs no second run of the kernel (`decoder.REMAT`).
    """
    operation, _ = _operations(settings.implementation)
    precision = None
    if settings.out_dtype != q.dtype:
        # The output has the dtype of the queries; they are multiplied in bfloat16 all the same.
        precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    out, (highest, total) = operation(
        q.astype(settings.out_dtype),
        k,
        v,
        mask=_mask(starts, stops),
        logits_scale=_scale(q),
        precision=precision,
        return_residuals=True,
    )

    # What is named is computed from the kernel's results: where XLA saves such a result of each
    # layer, it runs the kernel once for that and once for the layer.
    lse = highest + jnp.log(total)
    if has_keys is not None:
        out = _zero_rows(out, has_keys)
        lse = jnp.where(has_keys[:, None], lse, NO_KEYS)
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return out, (q, k, v, starts, stops, has_keys, out, lse)


def _zero_rows(x: jax.Array, has_keys: jax.Array) -> jax.Array:
    """Returns [B,T,N,H] with 0 for the queries without `has_keys` bool[B,T].

    As an einsum: JAX makes both operands of a `where` as large as x, once for all layers.
    """
    return jnp.einsum("BTNH,BT->BTNH", x, has_keys.astype(x.dtype))


def _backward(settings: Settings, residuals: tuple, d_out: jax.Array) -> tuple:
    """Returns the gradients of q, k and v in their dtypes."""
    q, k, v, starts, stops, has_keys, out, lse = residuals
    d_out = d_out.astype(v.dtype)
    skips_blocks = (
        settings.is_triangular and settings.implementation == "mosaic_gpu" and _is_hopper()
    )
    if has_keys is not None and not skips_blocks:
        # Not every implementation computes its weights from the log-sum-exponential.
        d_out = _zero_rows(d_out, has_keys)

    # exp(logit - highest) / total, with all of it in `highest`
    sums = (lse, jnp.ones_like(lse))
    arrays = (sums, out.astype(v.dtype), d_out, q, k, v)
    if skips_blocks:
        d_q, d_k, d_v = _triangular_gradient(*arrays, starts, stops)
    else:
        operation, gradient = _operations(settings.implementation)
        bound = operation.bind(q, k, v, mask=_mask(starts, stops), logits_scale=_scale(q))
        options = {name: x for name, x in bound.kwargs.items() if name != "return_residuals"}
        grads = gradient(*arrays, **options)
        d_q, d_k, d_v = (grads[name] for name in "qkv")
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, None


_attention.defvjp(_forward, _backward)


def _triangular_gradient(
    sums: tuple[jax.Array, jax.Array],
    out: jax.Array,
    d_out: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array,
    stops: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of q, k and v where no query attends to a key slot after its own.

    The kernel skips blocks after the diagonal, and none by the intervals; tokamax's operation
    gives up the diagonal where there are intervals.
    """
    from tokamax._src.ops.attention import base
    from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm90 as hopper

    kernel = functools.partial(
        hopper.flash_attention_vjp_kernel,
        is_causal=True,
        logits_scale=_scale(q),
        logits_soft_cap=None,
        ds_dtype=None,
        config=hopper.Config(**BLOCKS, num_stages=2, compute_wgs=1 if v.shape[-1] > WIDE else 2),
    )
    by_row = base.vmap_batch_dims(kernel)
    d_q, d_k, d_v, _ = by_row(q, k, v, sums, out, d_out, None, None, starts, stops)
    return d_q, d_k, d_v


def _is_hopper() -> bool:
    from tokamax._src import gpu_utils

    return gpu_utils.is_sm90()


def _scale(q: jax.Array) -> float:
    return 1 / math.sqrt(q.shape[-1])


def _mask(starts: jax.Array, stops: jax.Array) -> Any:
    from tokamax._src.ops.attention import base

    return base.Mask(k_start=starts, k_end=stops)


@functools.cache  # once per process
def _hide_missing_tunings() -> None:
    """Hides tokamax's warning, of a thousand characters, for every shape without tuned block sizes.

    It then takes its default ones.
    """
    logging.getLogger("absl").addFilter(
        lambda record: not str(record.msg).startswith("Autotuning cache miss")
    )


def _operations(implementation: str) -> tuple[Any, Any]:
    """Returns tokamax's forward and backward operation."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])  # else tokamax 0.0.12 reads the program's own arguments

    from tokamax._src.ops.attention import api, base

    _hide_missing_tunings()
    operation = api.IMPLEMENTATIONS[implementation]
    return operation, operation.vjp or base.DotProductAttentionVjp()
