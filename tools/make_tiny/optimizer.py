"""The optimizer of both pretrainings: Muon for the layers' matrices, AdamW for the rest."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from optax import contrib

# Projection -> how many axes of its kernel (after the leading layer axis) are contracted.
CONTRACTED = {"q": 1, "k": 1, "v": 1, "o": 2, "up": 1, "down": 1, "gate": 1}


def make_optimizer(
    learning_rate: float, steps: int, weight_decay: float
) -> optax.GradientTransformation:
    """Returns the optimizer with warm-up and cosine decay over `steps`."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(200, steps // 10), steps, learning_rate / 100
    )

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda value: value.ndim > 1, params)

    muon = contrib.muon(
        schedule,
        weight_decay=weight_decay,
        weight_decay_mask=decays,
        adam_weight_decay=weight_decay,
        adam_b2=0.98,
        muon_weight_dimension_numbers=matrix_axes,
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def matrix_axes(params: Any) -> Any:
    """Returns, for every parameter, which axes make it a matrix; None where it is not one."""

    def axes_of(path: tuple, value: jax.Array) -> contrib.MuonDimensionNumbers | None:
        names = [getattr(key, "key", "") for key in path]
        if not _is_layer_kernel(names):
            return None
        contracted = CONTRACTED[names[-2]]
        return contrib.MuonDimensionNumbers(
            reduction_axis=tuple(range(1, 1 + contracted)),
            output_axis=tuple(range(1 + contracted, value.ndim)),
        )

    return jax.tree_util.tree_map_with_path(axes_of, params)


def scale_kernels(params: Any) -> Any:
    """Returns parameters whose layers' kernels preserve the variance of their inputs.

    The model's own initialization (standard deviation 0.02) is for widths of thousands, not of
    a hundred. Kernels that write into the residual stream get a fifth of that scale.
    """

    def scale(path: tuple, value: jax.Array) -> jax.Array:
        names = [getattr(key, "key", "") for key in path]
        if not _is_layer_kernel(names):
            return value
        fan_in = math.prod(value.shape[1 : 1 + CONTRACTED[names[-2]]])
        depth_scale = 0.2 if names[-2] in ("o", "down") else 1.0
        return value * (depth_scale * fan_in**-0.5 / 0.02)

    return jax.tree_util.tree_map_with_path(scale, params)


def _is_layer_kernel(names: list[str]) -> bool:
    return "layers" in names and names[-1] == "kernel"
