"""The optimizer of both pretrainings: Muon for the layers' matrices, AdamW for the rest."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from optax import contrib

# How many axes of a parameter (behind the leading layer axis) a matrix product sums over.
SUMMED = {"q": 1, "k": 1, "v": 1, "o": 2, "up": 1, "down": 1, "gate": 1}


def matrix_axes(params: Any) -> Any:
    """Returns, for every parameter, which axes make it a matrix; None where it is none."""

    def spec(path: tuple, value: jax.Array) -> contrib.MuonDimensionNumbers | None:
        names = [getattr(key, "key", "") for key in path]
        if "layers" not in names or names[-1] != "kernel":
            return None
        summed = SUMMED[names[-2]]
        return contrib.MuonDimensionNumbers(
            reduction_axis=tuple(range(1, 1 + summed)),
            output_axis=tuple(range(1 + summed, value.ndim)),
        )

    return jax.tree_util.tree_map_with_path(spec, params)


def make(learning_rate: float, steps: int, weight_decay: float) -> optax.GradientTransformation:
    """Returns the optimizer with warm-up and cosine decay over `steps`."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(200, steps // 10), steps, learning_rate / 100
    )

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda value: value.ndim > 1, params)

    tx = contrib.muon(
        schedule,
        weight_decay=weight_decay,
        weight_decay_mask=decays,
        adam_weight_decay=weight_decay,
        adam_b2=0.98,
        muon_weight_dimension_numbers=matrix_axes,
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def scale_up(params: Any) -> Any:
    """Returns parameters whose matrices keep the variance of what they multiply.

    The model's own initialisation (0.02) suits widths of thousands, not of a hundred.
    """

    def scaled(path: tuple, value: jax.Array) -> jax.Array:
        names = [getattr(key, "key", "") for key in path]
        if "layers" not in names or names[-1] != "kernel":
            return value
        fan_in = math.prod(value.shape[1 : 1 + SUMMED[names[-2]]])
        depth = 0.2 if names[-2] in ("o", "down") else 1.0
        return value * (depth * fan_in**-0.5 / 0.02)

    return jax.tree_util.tree_map_with_path(scaled, params)
