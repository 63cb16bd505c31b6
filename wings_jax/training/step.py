"""One update, a pure function of state and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wings_jax import tree
from wings_jax.model.layout import IGNORE, Batch
from wings_jax.model.wings import Wings
from wings_jax.training import loss as loss_lib

Flat = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that one update changes or reads, but the batch."""

    step: jax.Array
    """i32[], updates done or skipped."""
    skipped: jax.Array
    """i32[], how many of them were skipped because loss or gradient was not finite."""
    trained: Flat
    """Flat tree of f32 parameters with gradients and optimizer state."""
    frozen: Flat
    """Flat tree of the other parameters."""
    opt_state: optax.OptState
    """Of `optim.make_optimizer`."""


def split_micro_batches(batch: Batch, count: int) -> Batch:
    """Returns leaves [count, B/count, ...]; every device keeps a share of each micro-batch.

    >>> split_micro_batches(jnp.arange(6), 2).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """

    def split(x: jax.Array) -> jax.Array:
        # [B, ...] -> [B/count, count, ...] -> [count, B/count, ...]
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def make_train_step(
    model: Wings,
    optimizer: optax.GradientTransformation,
    *,
    loss_chunk: int,
    accumulation: int,
    accumulation_dtype: str = "float32",
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns train_step(state, batch) -> (state, metrics).

    The loss is the sum over targets divided by the number of targets in the whole batch, over
    all devices and micro-batches (gradient accumulation), whose gradients are summed in
    `accumulation_dtype`. A step whose loss or gradient is not
    finite changes nothing but the counters. Metrics, f32[]: loss (nats per target), accuracy,
    grad_norm, targets, skipped (in this run so far).
    """

    def sums(trained: Flat, frozen: Flat, batch: Batch) -> tuple[jax.Array, jax.Array]:
        params = tree.nest({**frozen, **trained})
        hidden: Any = model.apply({"params": params}, batch)
        return loss_lib.token_loss(model, params, hidden, jnp.asarray(batch.targets), loss_chunk)

    def gradient(trained: Flat, frozen: Flat, batch: Batch) -> tuple[Flat, jax.Array, jax.Array]:
        (loss, right), grads = jax.value_and_grad(sums, has_aux=True)(trained, frozen, batch)
        return grads, loss, right

    def accumulated(trained: Flat, frozen: Flat, batch: Batch) -> tuple[Flat, jax.Array, jax.Array]:
        # Each sum is computed in float32, and stored in the dtype of the accumulator.
        def add(total, micro_batch):
            new = gradient(trained, frozen, micro_batch)
            return jax.tree.map(lambda x, y: (x + y).astype(x.dtype), total, new), None

        zero = jnp.zeros((), jnp.float32)
        sums = jax.tree.map(lambda x: jnp.zeros_like(x, accumulation_dtype), trained)
        initial = (sums, zero, zero)
        # Sums, which are divided by the targets of the whole batch later.
        return jax.lax.scan(add, initial, split_micro_batches(batch, accumulation))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Sums over the batch, then means over its targets.
        targets = jnp.maximum((batch.targets != IGNORE).sum(), 1).astype(jnp.float32)
        total = (gradient if accumulation == 1 else accumulated)(state.trained, state.frozen, batch)
        grads, loss, accuracy = jax.tree.map(lambda x: x.astype(jnp.float32) / targets, total)

        # The update, which does not happen where something is not finite.
        norm = optax.global_norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        updated = (optax.apply_updates(state.trained, updates), opt_state)
        previous = (state.trained, state.opt_state)
        trained, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old), updated, previous
        )

        skipped = state.skipped + jnp.where(is_finite, 0, 1)
        state = TrainState(state.step + 1, skipped, trained, state.frozen, opt_state)
        metrics = {"loss": loss, "accuracy": accuracy, "grad_norm": norm, "targets": targets}
        return state, {**metrics, "skipped": skipped.astype(jnp.float32)}

    return train_step
