"""The teacher of the tiny tower: a small convolutional network that classifies one shape.

From so few drawings, convolutions learn what a transformer of this size does not. The tower is
then trained on the teacher's probabilities for new variations of the drawings, which contain more
than the labels do. The teacher is not saved.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import warping
from flax import linen as nn

from wings_jax.scenes import drawings

NAMES = [*drawings.DIGITS, *drawings.THINGS]
LAYERS = ((1, 2), (2, 1), (4, 2), (4, 1), (4, 2))  # multiple of the width, stride


@dataclasses.dataclass(frozen=True)
class TeacherRun:
    """How the teacher is trained.

    width          channels of the first layer; the last has four times as many
    steps          number of updates
    batch          shapes per update
    learning_rate  peak
    weight_decay   of all parameters
    digit_share    expected share of digits in a batch
    seed           of the initialization and the variations
    """

    width: int = 24
    steps: int = 4500
    batch: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    digit_share: float = 0.3
    seed: int = 0


class Teacher(nn.Module):
    """Returns logits f32[B,30] over NAMES of ink f32[B,32,32] in 0..1.

    width  see `TeacherRun`
    """

    width: int

    @nn.compact
    def __call__(self, ink: jax.Array) -> jax.Array:
        x = ink[..., None] * 2 - 0.5
        for index, (multiple, stride) in enumerate(LAYERS):
            window = (5, 5) if index == 0 else (3, 3)
            y = nn.Conv(multiple * self.width, window, (stride, stride), use_bias=False)(x)
            y = nn.relu(nn.GroupNorm(num_groups=4)(y))
            x = x + y if x.shape == y.shape else y
        return nn.Dense(len(NAMES))(x.mean((1, 2)))


def draw_shapes(
    key: jax.Array, shapes: jax.Array, labels: jax.Array, count: int, digit_share: float
) -> tuple[jax.Array, jax.Array]:
    """Returns ink f32[count,32,32] of variations of random shapes, and their labels."""
    keys = jax.random.split(key, 5)
    num_digits = jnp.sum(labels < len(drawings.DIGITS))
    is_digit = jax.random.uniform(keys[0], (count,)) < digit_share
    among_digits = jax.random.randint(keys[1], (count,), 0, num_digits)
    among_things = jax.random.randint(keys[2], (count,), num_digits, len(labels))
    index = jnp.where(is_digit, among_digits, among_things)

    ink = jax.vmap(warping.warp)(jax.random.split(keys[3], count), shapes[index], is_digit)
    return warping.thicken(keys[4], ink), labels[index]


@functools.partial(jax.jit, static_argnames=("run", "tx"), donate_argnums=(0, 1))
def train_step(
    params: dict,
    state: Any,
    step: int,
    shapes: jax.Array,
    labels: jax.Array,
    *,
    run: TeacherRun,
    tx: optax.GradientTransformation,
) -> tuple[dict, Any, jax.Array]:
    """Returns the updated params and state, and the share of shapes classified correctly."""
    key, noise = jax.random.split(jax.random.fold_in(jax.random.key(run.seed), step))
    ink, names = draw_shapes(key, shapes, labels, run.batch, run.digit_share)
    ink = jnp.clip(ink + 0.03 * jax.random.normal(noise, ink.shape), 0, 1)

    def loss_of(params: dict) -> tuple[jax.Array, jax.Array]:
        logits = Teacher(run.width).apply(params, ink)
        targets = optax.smooth_labels(jax.nn.one_hot(names, len(NAMES)), 0.1)
        accuracy = jnp.mean(logits.argmax(-1) == names)
        return optax.softmax_cross_entropy(logits, targets).mean(), accuracy

    (_, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, accuracy


def train_teacher(
    run: TeacherRun, shapes: jax.Array, labels: jax.Array, report_every: int = 500
) -> dict:
    """Returns the parameters of a teacher of shapes f32[n,28,28] with labels i32[n]."""
    params = jax.jit(Teacher(run.width).init)(jax.random.key(run.seed), jnp.zeros((1, 32, 32)))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, run.learning_rate, min(100, run.steps // 40), run.steps, 1e-5
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=run.weight_decay)
    )

    state, start = tx.init(params), time.time()
    accuracies: list[jax.Array] = []
    for step in range(run.steps):
        params, state, accuracy = train_step(params, state, step, shapes, labels, run=run, tx=tx)
        accuracies.append(accuracy)
        if (step + 1) % report_every == 0:
            recent = np.mean(accuracies[-report_every:])
            seconds = time.time() - start
            print(f"teacher {step + 1} accuracy {recent:.3f} {seconds:.0f} s", flush=True)
    return params
