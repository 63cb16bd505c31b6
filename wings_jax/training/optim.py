"""A table of parameter groups becomes an optimizer: AdamW per group, cosine with warm-up."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import optax
from optax import contrib

from wings_jax import config as config_lib
from wings_jax import tree
from wings_jax.errors import UserError

Labels = dict[str, str]


def label_groups(paths: Mapping[str, object], optimizer: config_lib.OptimizerConfig) -> Labels:
    """Returns path -> group for all parameters. Raises UserError as `tree.label` does."""
    return tree.match_table(paths, optimizer.groups, name="config.optimizer.groups")


def is_trained(labels: Labels, optimizer: config_lib.OptimizerConfig, path: str) -> bool:
    """Returns whether the group of `path` has a learning rate."""
    return optimizer.learning_rates[labels[path]] > 0


def schedule(peak: float, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Returns the learning rate by step: linear from 0 to `peak`, then a cosine to 0."""
    warmup = min(max(1, round(steps * warmup_ratio)), max(1, steps - 1))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), 0.0)


def schedules(optimizer: config_lib.OptimizerConfig, steps: int) -> dict[str, optax.Schedule]:
    """Returns the schedule of each group that trains."""
    rates = optimizer.learning_rates
    return {g: schedule(r, steps, optimizer.warmup_ratio) for g, r in rates.items() if r > 0}


def make_optimizer(
    trained: Mapping[str, object], labels: Labels, optimizer: config_lib.OptimizerConfig, steps: int
) -> optax.GradientTransformation:
    """Returns the optimizer of a flat tree of trained parameters.

    The gradient is clipped by its global norm over these parameters only. Norm scales, biases
    and embeddings (`no_decay`) are not decayed.

    Raises:
      UserError: nothing trains, or `no_decay` is no regular expression.
    """
    if not trained:
        raise UserError("config.optimizer.learning_rates: every group is frozen")
    try:
        no_decay = re.compile(optimizer.no_decay)
    except re.error as error:
        raise UserError(f"config.optimizer.no_decay: {error}") from error
    rates = schedules(optimizer, steps)
    kinds = {
        path: f"{labels[path]}{'' if no_decay.fullmatch(path) else '+decay'}" for path in trained
    }
    transforms = {
        kind: _transform(
            rates[kind.removesuffix("+decay")],
            optimizer,
            optimizer.weight_decay if kind.endswith("+decay") else 0.0,
        )
        for kind in set(kinds.values())
    }
    clip = [optax.clip_by_global_norm(optimizer.clip)] if optimizer.clip > 0 else []
    return optax.chain(*clip, optax.partition(transforms, kinds))


def _transform(
    rate: optax.Schedule, optimizer: config_lib.OptimizerConfig, decay: float
) -> optax.GradientTransformation:
    """Returns AdamW, or Muon for matrices with AdamW for the rest (optax.contrib.muon)."""
    if optimizer.kind == "adamw":
        return optax.adamw(
            rate, b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps, weight_decay=decay
        )
    return contrib.muon(
        rate,
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        weight_decay=decay,
        adam_weight_decay=decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )


def _matrices(params: Mapping[str, jax.Array]) -> dict[str, object]:
    """Returns, by path, which axes of a projection make a matrix; None for what is none."""

    def axes_of(path: tuple, value: jax.Array) -> object:
        *parents, name, leaf = path[-1].key.split("/")
        if leaf not in ("kernel", "a", "b") or name in ("router", "head", "patch"):
            return None
        first = int("layers" in parents)
        summed = 2 if name == "o" and leaf != "b" else 1
        rows = tuple(range(first, first + summed))
        columns = tuple(range(first + summed, value.ndim))
        return contrib.MuonDimensionNumbers(reduction_axis=rows, output_axis=columns)

    return jax.tree_util.tree_map_with_path(axes_of, params)
