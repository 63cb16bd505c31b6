"""Random variations of a shape: rotated, stretched, bent, drawn with another pen.

A few thousand shapes have to represent all handwriting and all drawings, so each is used many
times, and never twice in the same form.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy import ndimage

from wings_jax.scenes.drawings import CELL


def warp(key: jax.Array, shape: jax.Array, is_digit: jax.Array) -> jax.Array:
    """Returns ink f32[32,32] in 0..1: a shape f32[28,28], varied and moved."""
    keys = jax.random.split(key, 8)

    def uniform(index: int, low: float, high: float, size: tuple[int, ...] = ()) -> jax.Array:
        return jax.random.uniform(keys[index], size, minval=low, maxval=high)

    # One linear map: rotation, shear, stretch, and a mirror image of half of the drawings.
    angle = uniform(0, -0.3, 0.3)
    stretch = uniform(1, 0.82, 1.15, (2,)) * jnp.where(is_digit, 1.1, 1.0)
    shear = uniform(2, -0.2, 0.2)
    mirror = jnp.where(is_digit, 1.0, jnp.sign(uniform(3, -1.0, 1.0)))
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    skew = jnp.array([[1.0, 0.0], [shear, 1.0]])
    matrix = rotation @ skew @ jnp.diag(1 / stretch)
    matrix = matrix * jnp.array([[1.0, 1.0], [mirror, mirror]])

    # Where in the shape each pixel of the cell is read: [2, 32, 32]
    grid = jnp.stack(jnp.meshgrid(jnp.arange(CELL), jnp.arange(CELL), indexing="ij"))
    centered = grid - (CELL - 1) / 2 - uniform(4, -3.0, 3.0, (2,))[:, None, None]
    points = jnp.einsum("ij,jyx->iyx", matrix, centered)

    # Smooth random displacements bend the lines.
    bumps = jax.random.normal(keys[5], (2, 4, 4)) * 1.1
    points = points + jax.image.resize(bumps, (2, CELL, CELL), "cubic")
    ink = ndimage.map_coordinates(shape, list(points + 13.5), order=1)
    return jnp.clip(ink * uniform(6, 0.75, 1.6), 0, 1)


def thicken(key: jax.Array, ink: jax.Array) -> jax.Array:
    """Returns ink [B,32,32], some of it drawn with a broader or a softer pen."""
    wide = jax.lax.reduce_window(ink, 0.0, jax.lax.max, (1, 2, 2), (1, 1, 1), "SAME")

    kernel = jnp.array([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16)[None, None]
    soft = jax.lax.conv_general_dilated(ink[:, None], kernel, (1, 1), "SAME")[:, 0]

    pen = jax.random.uniform(key, (len(ink), 1, 1))
    return jnp.where(pen < 0.2, wide, jnp.where(pen < 0.45, soft, ink))
