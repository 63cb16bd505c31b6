"""Layer-level attention weights (LAWS) and attention shift (Wings, arXiv 2406.03496, equation 1).

For layer l with attention rows A_h, queries R and the class c of each key:

    mass_c[l, i] = mean_h sum_{j in c} A_h[i, j]
    LAWS_c[l]    = mean_{i in R} mass_c[l, i]                        c: before, image, ..., after
    shift        = 1 - Pearson_l(LAWS_before, LAWS_after)            0 to 2; lower is less shift

The paper sums over i instead; Pearson's correlation is the same for a sum and a mean. Masses are
computed by the main attention as probes (`model.attention`), so no matrix of [T,S] is built and
only [B,L,Q,C] is copied to the host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from wings_jax.analysis.probes import ProbeRows
from wings_jax.analysis.slot_classes import CLASSES, GROUPS, KINDS, ROWS
from wings_jax.errors import UserError
from wings_jax.model import switches
from wings_jax.model.wings import Wings

BEFORE, IMAGE, AFTER = (CLASSES.index(name) for name in ("before", "image", "after"))
MIN_DEVIATION = 1e-6  # standard deviation over the layers; curves below it count as flat
MIN_LAYERS = 3
NUM_RESAMPLES = 2000
MAX_RESAMPLED_VALUES = 2**22  # numbers that the bootstrap holds at once: 32 MB in float64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measurement:
    """Attention of one model on B probes; means are over the queries of a group (`probes.GROUPS`).

    masses       f32[B,L,Q,C]    mean over heads
    head_masses  f32[B,L,2,N,C]  of every head, for the groups ROWS
    gates        f32[B,L,2,M]    router weights, for the groups KINDS; None without a router
    norms        f32[B,L,2,M]    norm of what a learner adds, divided by that of main attention
    """

    masses: np.ndarray
    head_masses: np.ndarray
    gates: np.ndarray | None
    norms: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def measure(model: Wings, params: Mapping[str, Any], rows: ProbeRows) -> Measurement:
    """Returns the measurement of B rows; a row of padding gives zeros."""
    sown = _sown_values(model, params, rows)

    def group_means(values: jax.Array, groups: Sequence[str]) -> jax.Array:
        """Returns [B,L,Q,...] of [L,B,T,...]."""
        columns = jnp.array([GROUPS.index(group) for group in groups])
        return _weighted_sum(values, jnp.asarray(rows.groups)[..., columns])

    # A learner that a model has not got is a norm of zero. [L, B, T, M]
    main_norm = jnp.maximum(sown["main_norm"], 1e-30)
    ratios = [
        sown.get(f"{learner}_norm", 0 * main_norm) / main_norm for learner in model.arch.learners
    ]
    norms = jnp.stack(ratios, -1) if ratios else jnp.zeros((*main_norm.shape, 0))

    # JAX arrays here, numpy arrays once they are fetched.
    fields: dict[str, Any] = {
        "masses": group_means(sown["masses"], GROUPS),
        "head_masses": group_means(sown["head_masses"], ROWS),
        "gates": group_means(sown["gates"], KINDS) if "gates" in sown else None,
        "norms": group_means(norms, KINDS),
    }
    return Measurement(**fields)


@functools.partial(jax.jit, static_argnums=0)
def measure_masses(model: Wings, params: Mapping[str, Any], rows: ProbeRows) -> jax.Array:
    """Returns f32[B,L,Q,C], only the masses of `measure`."""
    return _weighted_sum(_sown_values(model, params, rows)["masses"], jnp.asarray(rows.groups))


def _sown_values(model: Wings, params: Mapping[str, Any], rows: ProbeRows) -> dict[str, jax.Array]:
    """Returns the intermediates of all layers by name, [L,B,T,...] each."""
    # Without this, accelerators round float32 operands to bfloat16.
    with jax.default_matmul_precision("float32"):
        _, variables = model.apply(
            {"params": params}, rows.batch, jnp.asarray(rows.classes), mutable=["intermediates"]
        )
    layers = variables["intermediates"]["decoder"]["layers"]
    return {name: values[0] for name, values in layers.items()}


def _weighted_sum(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns [B,L,Q,...] of values [L,B,T,...] and weights [B,T,Q]."""
    return jnp.einsum("LBT...,BTQ->BLQ...", values, weights, precision="highest")


def measure_batches(
    model: Wings, params: Mapping[str, Any], batches: Iterable[tuple[Sequence[int], ProbeRows]]
) -> Measurement:
    """Returns the measurement of all probes on the host, in the order of their numbers.

    `batches` are those of `probes.batch_probes`. Gates of layers without learners are NaN.
    """
    by_number: dict[int, Measurement] = {}
    for numbers, rows in batches:
        measured = jax.device_get(measure(model, params, rows))
        for row, number in enumerate(numbers):
            by_number[number] = jax.tree.map(lambda values, row=row: values[row], measured)

    # Batches are sorted by length; the result is in the order of the samples.
    in_order = [by_number[number] for number in sorted(by_number)]
    stacked = jax.tree.map(lambda *rows: np.stack(rows), *in_order)
    if stacked.gates is None:
        return stacked

    has_learners = np.asarray(switches.learner_switches(model.arch))[:, None, None] > 0
    return dataclasses.replace(stacked, gates=np.where(has_learners, stacked.gates, np.nan))


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Returns Pearson's correlation of two curves [L]; NaN where one is flat or L < 3.

    >>> round(correlation([0.1, 0.2, 0.4], [0.3, 0.5, 0.9]), 6)
    1.0
    >>> correlation([0.1, 0.2, 0.4], [0.5, 0.5, 0.5])
    nan
    """
    # In float32, small differences between layers would be lost.
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if len(left) < MIN_LAYERS or min(left.std(), right.std()) < MIN_DEVIATION:
        return float("nan")
    return float(stats.pearsonr(left, right).statistic)


def attention_shift(curves: np.ndarray) -> np.ndarray:
    """Returns f64[n], the attention shift of each of the LAWS curves f32[n,L,C].

    It is 0 where "before" and "after" rise and fall together over the layers, 2 where one falls
    as the other rises, NaN where one of them is flat.

    >>> before, after = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])
    >>> curves = np.zeros((1, 3, len(CLASSES)))
    >>> curves[0, :, BEFORE], curves[0, :, AFTER] = before, after
    >>> attention_shift(curves)
    array([2.])
    """
    # [n, L] each.
    pairs = zip(curves[..., BEFORE], curves[..., AFTER], strict=True)
    return np.array([1.0 - correlation(before, after) for before, after in pairs])


def mean_interval(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns [2,...], the bootstrapped 95 % interval of the mean over the first dimension.

    Percentiles of `NUM_RESAMPLES` means. One value has no interval: NaN.

    >>> mean_interval(np.array([1.0, 2.0, 3.0, 4.0])).tolist()
    [1.5, 3.5]
    """
    if len(values) < 2:
        return np.full((2, *values.shape[1:]), np.nan)

    resampled = stats.bootstrap(
        (np.asarray(values, np.float64),),
        np.mean,
        axis=0,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, MAX_RESAMPLED_VALUES // values.size),
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    # [2, ...]
    return np.stack(resampled.confidence_interval)


def check_layers(layers: int, where: str) -> None:
    """Raises UserError for a model with too few layers to correlate over."""
    if layers < MIN_LAYERS:
        raise UserError(
            f"{where}: the model has {layers} layers; attention shift is a correlation over layers "
            f"and needs at least {MIN_LAYERS}"
        )
