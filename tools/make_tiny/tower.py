"""Pretrains the tiny vision tower: patches predict their position and their cell's class and color.

Dense supervision replaces contrastive pretraining on images of the web: 75 drawings of each thing
and 1,400 digits, each time in another variation, color and position. The classes are a
convolutional teacher's probabilities. The linear heads that predict class, color and position from
the last hidden state are not saved.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizer
import teacher
from flax import linen as nn

from wings_jax.model import presets, vision
from wings_jax.scenes import drawings, questions

CELL = drawings.CELL  # height and width of a cell; an image has 2 x 2 of them
SIDE = 2 * CELL
EMPTY = len(teacher.NAMES)  # class of an empty cell
NO_COLOR = len(drawings.COLORS)  # color of an empty cell
HEADS = ("what", "color", "position")


@dataclasses.dataclass(frozen=True)
class TowerRun:
    """How the tower is pretrained.

    arch           the tower
    teacher        how its teacher is trained
    steps          number of updates
    batch          images per update
    learning_rate  peak
    weight_decay   of matrices
    digit_share    expected share of digits among the cells
    empty_share    expected share of empty cells
    seed           of the initialization and the images
    """

    arch: presets.VisionArch
    teacher: teacher.TeacherRun = dataclasses.field(default_factory=teacher.TeacherRun)
    steps: int = 5000
    batch: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    digit_share: float = 0.35
    empty_share: float = 0.15
    seed: int = 0


def compose_images(
    key: jax.Array, shapes: jax.Array, labels: jax.Array, run: TowerRun
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns random images and what their cells contain.

    Returns:
      images: u8[B,64,64,3]
      ink: f32[B*4,32,32], the shape drawn in each cell
      is_empty: bool[B*4], cells in which it is not drawn
      colors: i32[B,4], index of each cell's color, NO_COLOR where empty
    """
    count = run.batch * 4
    keys = jax.random.split(key, 4)
    ink, _ = teacher.draw_shapes(keys[0], shapes, labels, count, run.digit_share)
    is_empty = jax.random.uniform(keys[1], (count,)) < run.empty_share
    colors = jax.random.randint(keys[2], (count,), 0, NO_COLOR)

    # Cells: background, plus ink times the difference of the two colors, plus noise
    ground = jnp.array(drawings.GROUND, jnp.float32)
    contrast = jnp.array(list(drawings.COLORS.values()), jnp.float32)[colors] - ground
    drawn = jnp.where(is_empty[:, None, None], 0.0, ink)
    cells = ground + drawn[..., None] * contrast[:, None, None]
    cells = cells + 6 * jax.random.normal(keys[3], cells.shape)

    # [B*4, 32, 32, 3] -> [B, 2, 32, 2, 32, 3] -> [B, 64, 64, 3]
    images = cells.reshape(run.batch, 2, 2, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    images = jnp.clip(images.reshape(run.batch, SIDE, SIDE, 3), 0, 255).astype(jnp.uint8)
    return images, ink, is_empty, jnp.where(is_empty, NO_COLOR, colors).reshape(run.batch, 4)


def class_targets(
    teacher_params: dict, ink: jax.Array, is_empty: jax.Array, run: TowerRun
) -> jax.Array:
    """Returns f32[N,31]: the teacher's probabilities, or one-hot EMPTY for empty cells."""
    probabilities = jax.nn.softmax(teacher.Teacher(run.teacher.width).apply(teacher_params, ink))
    probabilities = jnp.pad(probabilities, ((0, 0), (0, 1)))
    return jnp.where(is_empty[:, None], jax.nn.one_hot(EMPTY, EMPTY + 1), probabilities)


def cells_of_patches(arch: presets.VisionArch) -> np.ndarray:
    """Returns i32[P], the cell in which each patch is."""
    side = arch.image_size // arch.patch_size
    half = np.arange(side) * 2 // side
    return (half[:, None] * 2 + half).reshape(-1)


def initialize(run: TowerRun) -> dict:
    """Returns newly initialized parameters: the tower's, and zeros for the three heads."""
    tower = vision.VisionTower(run.arch)
    images = jnp.zeros((1, SIDE, SIDE, 3), jnp.uint8)
    params = nn.unbox(tower.init(jax.random.key(run.seed), images)["params"])

    width = run.arch.hidden_size
    outputs = dict(zip(HEADS, (EMPTY + 1, NO_COLOR + 1, run.arch.num_patches), strict=True))
    heads = {
        name: {"w": jnp.zeros((width, size)), "b": jnp.zeros(size)}
        for name, size in outputs.items()
    }
    return {"tower": optimizer.scale_kernels(params), **heads}


def predict(params: dict, images: jax.Array, arch: presets.VisionArch) -> tuple[jax.Array, ...]:
    """Returns logits [B,P,...] of every patch, one array per head."""
    features = vision.VisionTower(arch).apply({"params": params["tower"]}, images)
    return tuple(features @ params[name]["w"] + params[name]["b"] for name in HEADS)


@functools.partial(jax.jit, static_argnames=("run", "tx"), donate_argnums=(0, 1))
def train_step(
    params: dict,
    state: Any,
    step: int,
    shapes: jax.Array,
    labels: jax.Array,
    teacher_params: dict,
    *,
    run: TowerRun,
    tx: optax.GradientTransformation,
) -> tuple[dict, Any, jax.Array]:
    """Returns the updated params and state, and the loss."""
    key = jax.random.fold_in(jax.random.key(run.seed + 1), step)
    images, ink, is_empty, colors = compose_images(key, shapes, labels, run)
    classes = class_targets(teacher_params, ink, is_empty, run).reshape(run.batch, 4, -1)
    cells = cells_of_patches(run.arch)

    def loss_of(params: dict) -> jax.Array:
        what, color, position = predict(params, images, run.arch)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        positions = jnp.broadcast_to(jnp.arange(position.shape[1]), position.shape[:2])

        what_loss = optax.softmax_cross_entropy(what, classes[:, cells]).mean()
        color_loss = cross_entropy(color, colors[:, cells]).mean()
        position_loss = cross_entropy(position, positions).mean()
        return what_loss + 0.3 * color_loss + 0.3 * position_loss

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def score_heads(
    params: dict, arch: presets.VisionArch, split: str, count: int = 600
) -> dict[str, float]:
    """Returns the heads' accuracies on rendered scenes of the split, cell by cell."""
    rng, glyphs = random.Random(7), drawings.load_glyphs(split)
    scenes = [questions.make_objects(rng, glyphs) for _ in range(count)]
    images = np.stack([drawings.render(scene, glyphs) for scene in scenes])
    what, color, position = jax.jit(predict, static_argnames="arch")(params, images, arch=arch)

    # A cell's prediction is the sum over its patches: [B, P, K] -> [B, 4]
    in_cell = np.eye(4)[cells_of_patches(arch)]
    what, color = (np.einsum("bpc,pk->bkc", logits, in_cell).argmax(-1) for logits in (what, color))

    hits: dict[str, list[bool]] = {"digit": [], "thing": [], "colour": [], "empty": []}
    for row, scene in enumerate(scenes):
        for placed in scene:
            group = "digit" if placed.name in drawings.DIGITS else "thing"
            hits[group].append(what[row, placed.cell] == teacher.NAMES.index(placed.name))
            color_index = list(drawings.COLORS).index(placed.color)
            hits["colour"].append(color[row, placed.cell] == color_index)
        for cell in set(range(4)) - {placed.cell for placed in scene}:
            hits["empty"].append(what[row, cell] == EMPTY)

    hits["place"] = list((position.argmax(-1) == np.arange(position.shape[1])).reshape(-1))
    return {group: round(float(np.mean(h)), 4) for group, h in hits.items()}


def pretrain(run: TowerRun, report_every: int = 500) -> dict:
    """Returns the pretrained parameters (tower and heads); prints their held-out accuracies."""
    glyphs = drawings.load_glyphs("train")
    labels = jnp.array([teacher.NAMES.index(name) for name in glyphs.names])
    shapes = jnp.array(glyphs.shapes, jnp.float32) / 255
    teacher_params = teacher.train_teacher(run.teacher, shapes, labels)

    tx = optimizer.make_optimizer(run.learning_rate, run.steps, run.weight_decay)
    params = initialize(run)
    state = tx.init(params)
    start, cpu_start = time.time(), time.process_time()
    for step in range(run.steps):
        params, state, loss = train_step(
            params, state, step, shapes, labels, teacher_params, run=run, tx=tx
        )
        if (step + 1) % report_every == 0:
            test_scores = score_heads(params, run.arch, "test")
            train_scores = score_heads(params, run.arch, "train", 200)
            seconds, cpu_seconds = time.time() - start, time.process_time() - cpu_start
            print(f"{step + 1} loss {loss:.3f} {test_scores} train {train_scores}", end=" ")
            print(f"{seconds:.0f} s, {cpu_seconds:.0f} CPU-s", flush=True)
    return params
