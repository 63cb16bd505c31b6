"""One kernel for the main attention's queries, keys and values, in the weights of decoding.

A token's products are so thin that a kernel's launch and the weights it reads are their time. XLA's
GPU compiler therefore makes one product of those that read the same stream, and for that copies
their kernels at every token. Joined once, they are one product without a copy. Training and
checkpoints have the kernels of `PARTS` as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from wings_jax.model.projection import project

PARTS = ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel")
NAME = "qkv"  # parameter of `Attention`, in the place of its PARTS
JOINED = f"attn/{NAME}"  # the same, of a layer


def join_kernels(layer: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns a layer's flat parameters with kernels [D,N,H], [D,K,H] and [D,K,H] as [D,K,G+2,H].

    Each kv head has its G = N / K queries, its key and its value.
    """
    queries, keys, values = (layer[path] for path in PARTS)
    width, kv_heads, size = keys.shape
    # Query head n reads kv head n // G.
    groups = queries.reshape(width, kv_heads, -1, size)
    joined = jnp.concatenate([groups, keys[:, :, None], values[:, :, None]], axis=2)

    others = {path: x for path, x in layer.items() if path not in PARTS}
    return {**others, JOINED: joined}


def split_kernels(layer: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns a layer's flat parameters with PARTS, the inverse of `join_kernels`."""
    others = dict(layer)
    joined = others.pop(JOINED, None)
    if joined is None:
        return others

    width, _, _, size = joined.shape
    parts = (joined[:, :, :-2].reshape(width, -1, size), joined[:, :, -2], joined[:, :, -1])
    return {**others, **dict(zip(PARTS, parts, strict=True))}


def project_joined(h: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the products [B,T,N,H], [B,T,K,H] and [B,T,K,H] of h [B,T,D] with a joined kernel."""
    # The barrier makes this product's operand another one than that of the learners' queries: XLA
    # would join these too, and copy this kernel for it.
    every = project("BTD,DKGH->BTKGH", jax.lax.optimization_barrier(h), kernel)
    rows, slots, _, _, size = every.shape
    return every[:, :, :, :-2].reshape(rows, slots, -1, size), every[..., -2, :], every[..., -1, :]
