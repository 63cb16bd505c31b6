"""The loss and one update, pure functions of state and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from wings_jax import axes, tree
from wings_jax.model.layout import IGNORE, Batch
from wings_jax.model.wings import Wings

Flat = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on.

    step      i32[]   updates done or skipped
    skipped   i32[]   of these, the ones that were skipped because something was not finite
    trained   flat tree of float32 parameters with gradients and optimizer state
    frozen    flat tree of the others
    """

    step: jax.Array
    skipped: jax.Array
    trained: Flat
    frozen: Flat
    opt_state: optax.OptState


def token_loss(
    model: Wings, params: Mapping, hidden: jax.Array, targets: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Returns f32 sums over all targets: cross-entropy in nats, and how many were predicted right.

    Works through the T slots of hidden [B,T,D] in chunks, forward and backward, so that logits
    [B,T,V] never exist.
    """
    slots = targets.shape[1]
    chunk = min(chunk, slots)
    short = -slots % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, short), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, short)), constant_values=IGNORE)

    @jax.checkpoint
    def one(h: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, h, method=Wings.logits)
        logits = axes.constrain(logits, "BTV")
        counted = wanted != IGNORE
        picked = jnp.take_along_axis(logits, jnp.where(counted, wanted, 0)[..., None], axis=-1)
        loss = jax.nn.logsumexp(logits, axis=-1) - picked[..., 0]
        right = (logits.argmax(-1) == wanted) & counted
        return jnp.where(counted, loss, 0.0).sum(), right.sum().astype(jnp.float32)

    def body(carry, xs):
        loss, right = one(*xs)
        return (carry[0] + loss, carry[1] + right), None

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, (zero, zero), (chunks(hidden), chunks(targets)))[0]


def micro_batches(batch: Batch, count: int) -> Batch:
    """Returns leaves [count, B/count, ...]; every device keeps a share of each micro-batch."""

    def cut(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(cut, batch)


def make_train_step(
    model: Wings, optimizer: optax.GradientTransformation, *, loss_chunk: int, accumulation: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns train_step(state, batch) -> (state, metrics).

    The loss is the sum over targets divided by the number of targets in the whole batch, over
    all devices and micro-batches. A step whose loss or gradient is not finite changes nothing
    but the counters. Metrics, f32[]: loss (nats per target), accuracy, grad_norm, targets,
    skipped (in this run so far).
    """

    def sums(trained: Flat, frozen: Flat, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params = tree.nest({**frozen, **trained})
        hidden = model.apply({"params": params}, batch)
        return token_loss(model, params, hidden, batch.targets, loss_chunk)

    def gradient(trained: Flat, frozen: Flat, batch: Batch) -> tuple[Flat, jax.Array, jax.Array]:
        (loss, right), grads = jax.value_and_grad(sums, has_aux=True)(trained, frozen, batch)
        return grads, loss, right

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        targets = jnp.maximum((batch.targets != IGNORE).sum(), 1).astype(jnp.float32)
        if accumulation == 1:
            total = gradient(state.trained, state.frozen, batch)
        else:

            def add(total, micro):
                return jax.tree.map(jnp.add, total, gradient(state.trained, state.frozen, micro)), 0

            zero = jnp.zeros((), jnp.float32)
            start = (jax.tree.map(jnp.zeros_like, state.trained), zero, zero)
            total, _ = jax.lax.scan(add, start, micro_batches(batch, accumulation))
        grads, loss, right = jax.tree.map(lambda x: x / targets, total)
        norm = optax.global_norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        fresh = (optax.apply_updates(state.trained, updates), opt_state)
        kept = (state.trained, state.opt_state)
        trained, opt_state = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), fresh, kept)
        skipped = state.skipped + jnp.where(is_finite, 0, 1)
        state = TrainState(state.step + 1, skipped, trained, state.frozen, opt_state)
        metrics = {"loss": loss, "accuracy": right, "grad_norm": norm, "targets": targets}
        return state, {**metrics, "skipped": skipped.astype(jnp.float32)}

    return train_step
