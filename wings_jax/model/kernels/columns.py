"""Probes as further columns of the values, for kernels that have no place for them.

The products of the attention rows with per-key probes c_j are what the kernel computes anyway,
for values [v_j, c_j] of H + C columns. In bfloat16 a probe takes two columns, its value rounded
and the rest of it, so that the sum of both products is as exact as a float32 probe.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def add_columns(v: jax.Array, probes: jax.Array | None, multiple: int = 1) -> jax.Array:
    """Returns [B,S,K,W], the values [B,S,K,H], the probes f32[B,S,C] and zeros.

    W is a multiple of `multiple`. Every kv head has the same probes. The gradient of a probe is
    that of its rounded column, summed over the kv heads in float32.
    """
    parts = [v]
    if probes is not None:
        # [B, S, C] -> [B, S, K, C]
        shape = (*v.shape[:3], probes.shape[-1])
        columns = jnp.broadcast_to(probes[:, :, None].astype(jnp.float32), shape)
        rounded = columns.astype(v.dtype)
        parts.append(rounded)
        if v.dtype != jnp.float32:
            rest = columns - rounded.astype(jnp.float32)
            parts.append(jax.lax.stop_gradient(rest.astype(v.dtype)))

    width = sum(part.shape[-1] for part in parts)
    padding = jnp.zeros((*v.shape[:3], -width % multiple), v.dtype)
    return jnp.concatenate([*parts, padding], axis=-1)


def split_columns(
    out: jax.Array, width: int, num_probes: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B,T,N,H] in `dtype`, and probed f32[B,T,N,C], of [B,T,N,W].

    Args:
      width: H, columns of the values.
      num_probes: C
      dtype: of the values that had the columns, and of the output.
    """
    probed = out[..., width : width + num_probes].astype(jnp.float32)
    if dtype != jnp.float32:
        probed += out[..., width + num_probes : width + 2 * num_probes].astype(jnp.float32)
    return out[..., :width].astype(dtype), probed
