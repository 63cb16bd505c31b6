"""How a shape is drawn anew each time: turned, stretched, bent, with another pen.

A few thousand shapes must stand for all handwriting and all drawings; nobody draws a cat twice
alike, and neither does this.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy import ndimage

from wings_jax.scenes.drawings import CELL


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
