"""The loss of next-token prediction, in chunks of slots, without logits of all of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from wings_jax import axes
from wings_jax.model.layout import IGNORE
from wings_jax.model.wings import Wings

# Sums over targets, f32[] each: cross-entropy in nats, and correct predictions.
Sums = tuple[jax.Array, jax.Array]


def token_loss(
    model: Wings, params: Mapping, hidden: jax.Array, targets: jax.Array, chunk: int
) -> Sums:
    """Returns f32[] sums over all targets: cross-entropy in nats, and correct predictions.

    The T slots of hidden [B,T,D] and targets i32[B,T] are taken in chunks of C = `chunk`, so that
    logits exist as f32[B,C,V] only. Their gradient is computed in the same pass.
    """
    # The parameters that logits are computed from.
    decoder = params["decoder"]
    name = "head" if "head" in decoder else "embed"
    output = {"decoder": {name: decoder[name]}}

    slots = targets.shape[1]
    chunk = min(chunk, slots)
    padding = -slots % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=IGNORE)

    def to_chunks(x: jax.Array) -> jax.Array:
        # [B, T, ...] -> [T / C, B, C, ...]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    return _sum_chunks(model, output, to_chunks(hidden), to_chunks(targets))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_chunks(model: Wings, params: Mapping, hidden: jax.Array, targets: jax.Array) -> Sums:
    """Returns the sums of chunks, hidden [T/C,B,C,D] and targets i32[T/C,B,C]."""
    params = _gather_head(model, params)

    def add_chunk(sums, chunk_inputs):
        return jax.tree.map(jnp.add, sums, _chunk_sums(model, params, *chunk_inputs)), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add_chunk, (zero, zero), (hidden, targets))[0]


def _chunk_sums(model: Wings, params: Mapping, hidden: jax.Array, targets: jax.Array) -> Sums:
    """Returns the sums of one chunk, hidden [B,C,D] and targets i32[B,C]."""
    # [B, C, D] -> [B, C, V]
    logits: Any = model.apply({"params": params}, hidden, method=Wings.logits)
    logits = axes.constrain(logits, "BTV")

    # [B, C, V] -> [B, C]: -log p(target) = logsumexp(logits) - logits[target]
    is_target = targets != IGNORE
    index = jnp.where(is_target, targets, 0)[..., None]
    loss = _cross_entropy(logits, index)

    # The first of the largest logits. (argmax takes much longer on CPUs.)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    is_largest = logits == logits.max(-1, keepdims=True)
    predicted = jnp.where(is_largest, ids, logits.shape[-1]).min(-1)

    right = (predicted == targets) & is_target
    return jnp.where(is_target, loss, 0.0).sum(), right.sum().astype(jnp.float32)


@jax.custom_vjp
def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log p(target), f32[B,C], of logits f32[B,C,V] and targets i32[B,C,1].

    Its gradient is p - onehot(target), written out: JAX derives a scatter into an array of zeros,
    for which XLA writes and reads gradients in float32 instead of making the products' operand.
    """
    return _cross_entropy_forward(logits, targets)[0]


def _cross_entropy_forward(
    logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns the loss, and what the backward pass reads."""
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    loss = normalizer - jnp.take_along_axis(logits, targets, axis=-1)
    return loss[..., 0], (logits, normalizer, targets)


def _cross_entropy_backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], d_loss: jax.Array
) -> tuple[jax.Array, None]:
    """Returns the gradient of the logits f32[B,C,V]; targets have none."""
    logits, normalizer, targets = residuals
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    error = jnp.exp(logits - normalizer) - (ids == targets)
    return error * d_loss[..., None], None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _sums_and_gradients(
    model: Wings, params: Mapping, hidden: jax.Array, targets: jax.Array
) -> tuple[Sums, tuple[Mapping, jax.Array]]:
    """Returns the sums, and the gradients of the loss by `params` and `hidden`.

    A chunk's gradients are computed while its logits exist, so that the backward pass does not
    compute them again. XLA removes the gradient of parameters that are frozen.
    """
    gathered = _gather_head(model, params)

    def add_chunk(carry, chunk_inputs):
        sums, totals = carry
        hidden, targets = chunk_inputs

        def sums_of(params: Mapping, hidden: jax.Array) -> Sums:
            return _chunk_sums(model, params, hidden, targets)

        loss, gradient, right = jax.vjp(sums_of, gathered, hidden, has_aux=True)
        grads, d_hidden = gradient(jnp.ones_like(loss))
        grads = jax.tree.map(lambda x, total: x.astype(total.dtype), grads, totals)
        added = jax.tree.map(jnp.add, (sums, totals), ((loss, right), grads))
        return added, d_hidden

    zero = jnp.zeros((), jnp.float32)
    start = ((zero, zero), jax.tree.map(jnp.zeros_like, params))
    (sums, grads), d_hidden = jax.lax.scan(add_chunk, start, (hidden, targets))
    return sums, (grads, d_hidden)


def _gather_head(model: Wings, params: Mapping) -> Mapping:
    """Returns the head [D,V], or the embedding [V,D], in the dtype of the logits' product.

    It is gathered over the devices that share its width: once, not for every chunk.
    """

    def gather(path: tuple, x: jax.Array) -> jax.Array:
        dims = ("V", None) if path[-1].key == "embedding" else (None, "V")
        return axes.constrain(x.astype(model.dtype), dims)

    return jax.tree_util.tree_map_with_path(gather, params)


def _scale_gradients(
    _: Wings, gradients: tuple[Mapping, jax.Array], cotangents: Sums
) -> tuple[Mapping, jax.Array, None]:
    """Returns the gradients of params and hidden times that of the loss; targets have none."""
    grads, d_hidden = jax.tree.map(lambda x: x * cotangents[0].astype(x.dtype), gradients)
    return grads, d_hidden, None


_sum_chunks.defvjp(_sums_and_gradients, _scale_gradients)
