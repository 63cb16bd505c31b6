"""Pretrains the tiny vision tower: every patch learns its place, and its cell's class and colour.

Dense supervision stands in for contrastive pretraining on the web: 75 drawings of each thing
and 1,400 digits, each time differently warped, thickened, inked and placed. The linear heads
that read them off the last hidden state are thrown away.
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
from flax import linen as nn
from jax.scipy import ndimage

from wings_jax.data import drawings, questions
from wings_jax.model import presets, vision

CELL = drawings.CELL
NAMES = [*drawings.DIGITS, *drawings.THINGS]
EMPTY = len(NAMES)
NO_COLOUR = len(drawings.COLOURS)


@dataclasses.dataclass(frozen=True)
class TowerRun:
    """How the tower is pretrained."""

    arch: presets.VisionArch
    steps: int = 2600
    batch: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    digit_share: float = 0.35
    empty_share: float = 0.15
    seed: int = 0


def warp(key: jax.Array, shape: jax.Array, is_digit: jax.Array) -> jax.Array:
    """Returns ink f32[32,32] in 0..1: a shape f32[28,28] differently drawn and placed."""
    keys = jax.random.split(key, 8)

    def uniform(i: int, low: float, high: float, size: tuple[int, ...] = ()) -> jax.Array:
        return jax.random.uniform(keys[i], size, minval=low, maxval=high)

    angle = uniform(0, -0.3, 0.3)
    stretch = uniform(1, 0.82, 1.15, (2,)) * jnp.where(is_digit, 1.1, 1.0)
    shear = uniform(2, -0.2, 0.2)
    mirrored = jnp.where(is_digit, 1.0, jnp.sign(uniform(3, -1.0, 1.0)))
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    skew = jnp.array([[1.0, 0.0], [shear, 1.0]])
    matrix = turn @ skew @ jnp.diag(1 / stretch * jnp.array([1.0, 1.0])) * 28 / 28
    matrix = matrix * jnp.array([[1.0, 1.0], [mirrored, mirrored]])
    grid = jnp.stack(jnp.meshgrid(jnp.arange(CELL), jnp.arange(CELL), indexing="ij"))
    centred = grid - (CELL - 1) / 2 - uniform(4, -3.0, 3.0, (2,))[:, None, None]
    places = jnp.einsum("ij,jyx->iyx", matrix, centred)
    bumps = jax.random.normal(keys[5], (2, 4, 4)) * 1.1
    places = places + jax.image.resize(bumps, (2, CELL, CELL), "cubic")
    ink = ndimage.map_coordinates(shape, list(places + 13.5), order=1)
    return jnp.clip(ink * uniform(6, 0.75, 1.6), 0, 1)


def thicken(key: jax.Array, ink: jax.Array) -> jax.Array:
    """Returns ink [B,32,32], some of it drawn with a broader or a softer pen."""
    wide = jax.lax.reduce_window(ink, 0.0, jax.lax.max, (1, 2, 2), (1, 1, 1), "SAME")
    kernel = jnp.array([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16)[None, None]
    soft = jax.lax.conv_general_dilated(ink[:, None], kernel, (1, 1), "SAME")[:, 0]
    pen = jax.random.uniform(key, (len(ink), 1, 1))
    return jnp.where(pen < 0.2, wide, jnp.where(pen < 0.45, soft, ink))


def compose(
    key: jax.Array, shapes: jax.Array, labels: jax.Array, run: TowerRun
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns pictures u8[B,64,64,3], classes i32[B,4] and colours i32[B,4] of their cells."""
    count = run.batch * 4
    keys = jax.random.split(key, 8)
    num_digits = jnp.sum(labels < 10)
    digit = jax.random.uniform(keys[0], (count,)) < run.digit_share
    among_digits = jax.random.randint(keys[1], (count,), 0, num_digits)
    among_things = jax.random.randint(keys[2], (count,), num_digits, len(labels))
    picked = jnp.where(digit, among_digits, among_things)
    ink = jax.vmap(warp)(jax.random.split(keys[3], count), shapes[picked], digit)
    ink = thicken(keys[4], ink)
    empty = jax.random.uniform(keys[5], (count,)) < run.empty_share
    colours = jax.random.randint(keys[6], (count,), 0, NO_COLOUR)
    ground = jnp.array(drawings.GROUND, jnp.float32)
    inks = jnp.array(list(drawings.COLOURS.values()), jnp.float32)[colours] - ground
    ink = jnp.where(empty[:, None, None], 0.0, ink)
    cells = ground + ink[..., None] * inks[:, None, None]
    cells = cells + 6 * jax.random.normal(keys[7], cells.shape)
    pictures = cells.reshape(run.batch, 2, 2, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    pictures = jnp.clip(pictures.reshape(run.batch, 64, 64, 3), 0, 255).astype(jnp.uint8)
    classes = jnp.where(empty, EMPTY, labels[picked]).reshape(run.batch, 4)
    return pictures, classes, jnp.where(empty, NO_COLOUR, colours).reshape(run.batch, 4)


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
def train_step(params, state, step, shapes, labels, *, run: TowerRun, tx):
    """One update; returns params, state and the loss."""
    pictures, classes, colours = compose(
        jax.random.fold_in(jax.random.key(run.seed + 1), step), shapes, labels, run
    )
    where = cells_of_patches(run.arch)

    def loss_of(params):
        what, colour, place = heads(params, pictures, run.arch)
        loss = optax.softmax_cross_entropy_with_integer_labels
        smooth = optax.smooth_labels(jax.nn.one_hot(classes[:, where], EMPTY + 1), 0.05)
        classed = optax.softmax_cross_entropy(what, smooth).mean()
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
            hits[kind].append(what[i, o.cell] == NAMES.index(o.name))
            hits["colour"].append(colour[i, o.cell] == list(drawings.COLOURS).index(o.colour))
        for cell in set(range(4)) - {o.cell for o in scene}:
            hits["empty"].append(what[i, cell] == EMPTY)
    hits["place"] = list((place.argmax(-1) == np.arange(place.shape[1])).reshape(-1))
    return {kind: round(float(np.mean(h)), 4) for kind, h in hits.items()}


def train(run: TowerRun, report_every: int = 500) -> dict:
    """Returns the pretrained parameters (tower and heads)."""
    glyphs = drawings.load_glyphs("train")
    labels = jnp.array([NAMES.index(n) for n in glyphs.names])
    shapes = jnp.array(glyphs.shapes, jnp.float32) / 255
    tx = optimiser.make(run.learning_rate, run.steps, run.weight_decay)
    params = init(run)
    state = tx.init(params)
    start, cpu = time.time(), time.process_time()
    for step in range(run.steps):
        params, state, loss = train_step(params, state, step, shapes, labels, run=run, tx=tx)
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
