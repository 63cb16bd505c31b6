"""Layer-level attention weights (LAWS) and attention shift (Wings, arXiv 2406.03496, equation 1).

For layer l with attention rows A_h, queries R and the class c of each key:

    mass_c[l, i] = mean_h sum_{j in c} A_h[i, j]
    LAWS_c[l]    = mean_{i in R} mass_c[l, i]                        c: before, image, ..., after
    shift        = 1 - Pearson_l(LAWS_before, LAWS_after)            0 to 2; lower is less shift

The paper sums over i instead, which Pearson cannot tell from a mean. Masses come out of the main
attention as probes (`model.attention`), and what leaves the device is as small as [B,L,Q,C].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wings_jax.analysis.probes import CLASSES, GROUPS, KINDS, ROWS, ProbeRows
from wings_jax.errors import UserError
from wings_jax.model import decoder
from wings_jax.model.wings import Wings

BEFORE, IMAGE, AFTER = (CLASSES.index(name) for name in ("before", "image", "after"))
FLATTEST = 1e-6  # standard deviation over the layers below which nothing can be correlated
FEWEST_LAYERS = 3
DRAWS = 2000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one model does on B probes; means are over the queries of a group (`probes.GROUPS`).

    masses  f32[B,L,Q,C]   mean over heads
    heads   f32[B,L,2,N,C] of every head, for the groups ROWS
    gates   f32[B,L,2,M]   router weights, for the groups KINDS; None without a router
    norms   f32[B,L,2,M]   length of what a learner adds to the stream, of the main attention's 1
    """

    masses: np.ndarray
    heads: np.ndarray
    gates: np.ndarray | None
    norms: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def measure(model: Wings, params: Mapping[str, Any], rows: ProbeRows) -> Measurement:
    """Returns the reading of B rows; one of padding only gives zeros."""
    sown = _sow(model, params, rows)

    def mean(x: jax.Array, groups: Sequence[str]) -> jax.Array:
        """[L,B,T,...] -> [B,L,Q,...]."""
        chosen = [GROUPS.index(name) for name in groups]
        return _mean(x, jnp.asarray(rows.groups)[..., jnp.array(chosen)])

    main = jnp.maximum(sown["main_norm"], 1e-30)
    norms = [sown.get(f"{name}_norm", 0 * main) / main for name in model.arch.learners]
    return Measurement(
        masses=mean(sown["masses"], GROUPS),
        heads=mean(sown["head_masses"], ROWS),
        gates=mean(sown["gates"], KINDS) if "gates" in sown else None,
        norms=mean(jnp.stack(norms, -1) if norms else jnp.zeros((*main.shape, 0)), KINDS),
    )


@functools.partial(jax.jit, static_argnums=0)
def measure_masses(model: Wings, params: Mapping[str, Any], rows: ProbeRows) -> jax.Array:
    """Returns f32[B,L,Q,C], the masses of a reading alone."""
    return _mean(_sow(model, params, rows)["masses"], jnp.asarray(rows.groups))


def _sow(model: Wings, params: Mapping[str, Any], rows: ProbeRows) -> dict[str, jax.Array]:
    """Returns what the layers sow, by name, [L,B,T,...] each."""
    with jax.default_matmul_precision("float32"):  # float32 operands are not to be rounded
        _, seen = model.apply(
            {"params": params}, rows.batch, jnp.asarray(rows.classes), mutable=["intermediates"]
        )
    return {name: x[0] for name, x in seen["intermediates"]["decoder"]["layers"].items()}


def _mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[L,B,T,...] with weights [B,T,Q] -> [B,L,Q,...]."""
    return jnp.einsum("LBT...,BTQ->BLQ...", x, weights, precision="highest")


def measure_batches(
    model: Wings, params: Mapping[str, Any], batches: Iterable[tuple[Sequence[int], ProbeRows]]
) -> Measurement:
    """Returns the reading of all probes on the host, in the order of their numbers.

    `batches` are those of `probes.in_batches`. Gates of layers that carry no learners are NaN.
    """
    found: dict[int, Measurement] = {}
    for numbers, rows in batches:
        reading = jax.device_get(measure(model, params, rows))
        for row, number in enumerate(numbers):
            found[number] = jax.tree.map(lambda x, row=row: x[row], reading)
    whole = jax.tree.map(lambda *rows: np.stack(rows), *(found[i] for i in sorted(found)))
    if whole.gates is None:
        return whole
    carries = np.asarray(decoder.learner_switches(model.arch))[:, None, None] > 0
    return dataclasses.replace(whole, gates=np.where(carries, whole.gates, np.nan))


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Returns Pearson's correlation of two curves [L]; NaN where one is flat or L < 3."""
    left, right = (np.asarray(x, np.float64) for x in (left, right))
    if len(left) < FEWEST_LAYERS or min(left.std(), right.std()) < FLATTEST:
        return float("nan")
    left, right = left - left.mean(), right - right.mean()
    return float(np.clip(left @ right / np.sqrt((left @ left) * (right @ right)), -1.0, 1.0))


def shifts(curves: np.ndarray) -> np.ndarray:
    """Returns f64[n], the attention shift of each of the LAWS curves f32[n,L,C]; NaN for none."""
    pairs = zip(curves[..., BEFORE], curves[..., AFTER], strict=True)
    return np.array([1.0 - correlation(*pair) for pair in pairs])


def interval(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns [2,...], the bootstrapped 95 % interval of the mean over the first dimension.

    A single value leaves it open: NaN.
    """
    if len(values) < 2:
        return np.full((2, *values.shape[1:]), np.nan)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(values), (DRAWS, len(values)))
    counts = np.stack([np.bincount(row, minlength=len(values)) for row in chosen])
    means = np.tensordot(counts / len(values), np.asarray(values, np.float64), 1)
    return np.percentile(means, [2.5, 97.5], axis=0)


def check_layers(layers: int, where: str) -> None:
    """Raises UserError for a model with too few layers to correlate over."""
    if layers < FEWEST_LAYERS:
        raise UserError(
            f"{where}: {layers} layers; attention shift correlates over {FEWEST_LAYERS} at least"
        )
