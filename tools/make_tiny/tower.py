"""Pretrains the tiny vision tower: every patch learns its place, and its cell's class and colour.

Dense supervision stands in for contrastive pretraining on the web: 75 drawings of each thing
and 1,400 digits, each time differently warped, thickened, inked and placed. What a cell shows is
learned from a convolutional teacher's opinion. The linear heads that read class, colour and place
off the last hidden state are thrown away.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimiser
import teacher
from flax import linen as nn

from wings_jax.model import presets, vision
from wings_jax.scenes import drawings, questions

CELL = drawings.CELL
EMPTY = len(teacher.NAMES)
NO_COLOUR = len(drawings.COLORS)


@dataclasses.dataclass(frozen=True)
class TowerRun:
    """How the tower is pretrained."""

    arch: presets.VisionArch
    teacher: teacher.TeacherRun = dataclasses.field(default_factory=teacher.TeacherRun)
    steps: int = 5000
    batch: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    digit_share: float = 0.35
    empty_share: float = 0.15
    seed: int = 0


def compose(
    key: jax.Array, shapes: jax.Array, labels: jax.Array, run: TowerRun
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns pictures u8[B,64,64,3], and of their cells ink f32[B*4,32,32], which are empty
    bool[B*4] and colours i32[B,4]."""
    count = run.batch * 4
    keys = jax.random.split(key, 4)
    ink, _ = teacher.draw(keys[0], shapes, labels, count, run.digit_share)
    empty = jax.random.uniform(keys[1], (count,)) < run.empty_share
    colours = jax.random.randint(keys[2], (count,), 0, NO_COLOUR)
    ground = jnp.array(drawings.GROUND, jnp.float32)
    inks = jnp.array(list(drawings.COLORS.values()), jnp.float32)[colours] - ground
    drawn = jnp.where(empty[:, None, None], 0.0, ink)
    cells = ground + drawn[..., None] * inks[:, None, None]
    cells = cells + 6 * jax.random.normal(keys[3], cells.shape)
    pictures = cells.reshape(run.batch, 2, 2, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    pictures = jnp.clip(pictures.reshape(run.batch, 64, 64, 3), 0, 255).astype(jnp.uint8)
    return pictures, ink, empty, jnp.where(empty, NO_COLOUR, colours).reshape(run.batch, 4)


def opinions(params: dict, ink: jax.Array, empty: jax.Array, run: TowerRun) -> jax.Array:
    """Returns f32[N,31], the teacher's probabilities of each name, or certainty of emptiness."""
    named = jax.nn.softmax(teacher.Teacher(run.teacher.width).apply(params, ink))
    named = jnp.pad(named, ((0, 0), (0, 1)))
    return jnp.where(empty[:, None], jax.nn.one_hot(EMPTY, EMPTY + 1), named)


def cells_of_patches(arch: presets.VisionArch) -> np.ndarray:
    """Returns i32[P], the cell that each patch lies in."""
    side = arch.image_size // arch.patch_size
    half = np.arange(side) * 2 // side
    return (half[:, None] * 2 + half).reshape(-1)


def init(run: TowerRun) -> dict:
    """Returns the tower's parameters and those of the three heads."""
    tower = vision.VisionTower(run.arch)
    pictures = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    params = nn.unbox(tower.init(jax.random.key(run.seed), pictures)["params"])
    width = run.arch.hidden_size
    return {
        "tower": optimiser.scale_up(params),
        "what": {"w": jnp.zeros((width, EMPTY + 1)), "b": jnp.zeros(EMPTY + 1)},
        "colour": {"w": jnp.zeros((width, NO_COLOUR + 1)), "b": jnp.zeros(NO_COLOUR + 1)},
        "place": {
            "w": jnp.zeros((width, run.arch.num_patches)),
            "b": jnp.zeros(run.arch.num_patches),
        },
    }


def heads(params: dict, pictures: jax.Array, arch: presets.VisionArch) -> tuple[jax.Array, ...]:
    """Returns logits [B,P,...] of every patch: class, colour, and the patch's own place."""
    features = vision.VisionTower(arch).apply({"params": params["tower"]}, pictures)
    return tuple(
        features @ params[name]["w"] + params[name]["b"] for name in ("what", "colour", "place")
    )


@functools.partial(jax.jit, static_argnames=("run", "tx"), donate_argnums=(0, 1))
def train_step(params, state, step, shapes, labels, taught, *, run: TowerRun, tx):
    """One update; returns params, state and the loss."""
    key = jax.random.fold_in(jax.random.key(run.seed + 1), step)
    pictures, ink, empty, colours = compose(key, shapes, labels, run)
    classes = opinions(taught, ink, empty, run).reshape(run.batch, 4, -1)
    where = cells_of_patches(run.arch)

    def loss_of(params):
        what, colour, place = heads(params, pictures, run.arch)
        loss = optax.softmax_cross_entropy_with_integer_labels
        classed = optax.softmax_cross_entropy(what, classes[:, where]).mean()
        placed = loss(place, jnp.broadcast_to(jnp.arange(place.shape[1]), place.shape[:2])).mean()
        return classed + 0.3 * loss(colour, colours[:, where]).mean() + 0.3 * placed

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def score(params: dict, arch: presets.VisionArch, split: str, count: int = 600) -> dict[str, float]:
    """Returns the heads' accuracy on rendered scenes of the split, cell by cell."""
    rng, glyphs = random.Random(7), drawings.load_glyphs(split)
    scenes = [questions.make_objects(rng, glyphs) for _ in range(count)]
    pictures = np.stack([drawings.render(s, glyphs) for s in scenes])
    what, colour, place = jax.jit(heads, static_argnames="arch")(params, pictures, arch=arch)
    where = cells_of_patches(arch)
    one = np.eye(4)[where]
    what, colour = (np.einsum("bpc,pk->bkc", x, one).argmax(-1) for x in (what, colour))
    hits: dict[str, list[bool]] = {"digit": [], "thing": [], "colour": [], "empty": []}
    for i, scene in enumerate(scenes):
        for o in scene:
            kind = "digit" if o.name in drawings.DIGITS else "thing"
            hits[kind].append(what[i, o.cell] == teacher.NAMES.index(o.name))
            hits["colour"].append(colour[i, o.cell] == list(drawings.COLORS).index(o.color))
        for cell in set(range(4)) - {o.cell for o in scene}:
            hits["empty"].append(what[i, cell] == EMPTY)
    hits["place"] = list((place.argmax(-1) == np.arange(place.shape[1])).reshape(-1))
    return {kind: round(float(np.mean(h)), 4) for kind, h in hits.items()}


def train(run: TowerRun, report_every: int = 500) -> dict:
    """Returns the pretrained parameters (tower and heads)."""
    glyphs = drawings.load_glyphs("train")
    labels = jnp.array([teacher.NAMES.index(n) for n in glyphs.names])
    shapes = jnp.array(glyphs.shapes, jnp.float32) / 255
    taught = teacher.train(run.teacher, shapes, labels)
    tx = optimiser.make(run.learning_rate, run.steps, run.weight_decay)
    params = init(run)
    state = tx.init(params)
    start, cpu = time.time(), time.process_time()
    for step in range(run.steps):
        params, state, loss = train_step(
            params, state, step, shapes, labels, taught, run=run, tx=tx
        )
        if (step + 1) % report_every == 0:
            print(
                step + 1,
                f"loss {loss:.3f}",
                score(params, run.arch, "test"),
                "train",
                score(params, run.arch, "train", 200),
                f"{time.time() - start:.0f} s, {time.process_time() - cpu:.0f} CPU-s",
                flush=True,
            )
    return params
