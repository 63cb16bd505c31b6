"""The optimizer of a table of parameter groups: AdamW or Muon, cosine schedule with warm-up."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import optax
from optax import contrib

from wings_jax import config as config_lib
from wings_jax import tree
from wings_jax.errors import UserError

Labels = Mapping[str, str]


def label_groups(paths: Mapping[str, object], optimizer: config_lib.OptimizerConfig) -> Labels:
    """Returns path -> group for all parameters. Raises UserError as `tree.match_table` does."""
    return tree.match_table(paths, optimizer.groups, name="config.optimizer.groups")


def is_trained(labels: Labels, optimizer: config_lib.OptimizerConfig, path: str) -> bool:
    """Returns whether the group of `path` has a learning rate."""
    return optimizer.learning_rates[labels[path]] > 0


def schedule(peak: float, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Returns the learning rate by step: linear from 0 to `peak`, then a cosine to 0.

    >>> rate = schedule(1.0, steps=100, warmup_ratio=0.1)
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    warmup = min(max(1, round(steps * warmup_ratio)), max(1, steps - 1))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), 0.0)


def schedules(optimizer: config_lib.OptimizerConfig, steps: int) -> dict[str, optax.Schedule]:
    """Returns the schedule of each group that trains."""
    rates = optimizer.learning_rates
    return {
        group: schedule(peak, steps, optimizer.warmup_ratio)
        for group, peak in rates.items()
        if peak > 0
    }


def make_optimizer(
    trained: Mapping[str, object], labels: Labels, optimizer: config_lib.OptimizerConfig, steps: int
) -> optax.GradientTransformation:
    """Returns the optimizer of a flat tree of trained parameters.

    The gradient is clipped by its global norm over these parameters only. Norm scales, biases
    and embeddings (`no_decay`) are not decayed.

    Raises:
      UserError: nothing trains, or `no_decay` is not a regular expression.
    """
    if not trained:
        raise UserError("config.optimizer.learning_rates: every group is frozen")
    try:
        no_decay = re.compile(optimizer.no_decay)
    except re.error as error:
        raise UserError(f"config.optimizer.no_decay: {error}") from error

    # Label of a parameter: its group, and whether its weights decay.
    rates = schedules(optimizer, steps)
    decay_labels = {
        path: labels[path] if no_decay.fullmatch(path) else f"{labels[path]}+decay"
        for path in trained
    }

    transforms = {
        label: _make_transform(
            rates[label.removesuffix("+decay")],
            optimizer,
            optimizer.weight_decay if label.endswith("+decay") else 0.0,
        )
        for label in set(decay_labels.values())
    }

    # The norm is taken over all groups, so clipping comes before the partition.
    by_label = optax.partition(transforms, decay_labels)
    if optimizer.max_grad_norm > 0:
        return optax.chain(optax.clip_by_global_norm(optimizer.max_grad_norm), by_label)
    return optax.chain(by_label)


def _make_transform(
    rate: optax.Schedule, optimizer: config_lib.OptimizerConfig, decay: float
) -> optax.GradientTransformation:
    """Returns AdamW, or Muon for matrices with AdamW for the rest (optax.contrib.muon)."""
    if optimizer.name == "adamw":
        return optax.adamw(
            rate,
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            mu_dtype=optimizer.moment_dtype,
            weight_decay=decay,
        )

    # consistent_rms gives the updates AdamW's size, so AdamW's learning rates fit.
    return contrib.muon(
        rate,
        mu_dtype=optimizer.moment_dtype,
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        weight_decay=decay,
        adam_weight_decay=decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )


def _matrices(params: Mapping[str, jax.Array]) -> dict[str, object]:
    """Returns, by path, the axes of a projection that form a matrix; None where none do."""

    def axes_of(path: tuple, value: jax.Array) -> object:
        *parents, name, leaf = path[-1].key.split("/")
        # Embeddings, the head, routers, the patch convolution, norms and biases stay with AdamW.
        if leaf not in ("kernel", "a", "b") or name in ("router", "head", "patch"):
            return None

        # The layers are stacked along the first axis: each has a matrix of its own.
        first = int("layers" in parents)

        # [D,N,H] and [D,F] have one input axis, the output projection [N,H,D] has two.
        summed = 2 if name == "o" and leaf != "b" else 1
        rows = tuple(range(first, first + summed))
        columns = tuple(range(first + summed, value.ndim))
        return contrib.MuonDimensionNumbers(reduction_axis=rows, output_axis=columns)

    return jax.tree_util.tree_map_with_path(axes_of, params)
