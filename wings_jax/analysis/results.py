"""What was measured, by model: the numbers behind the plots, as text, JSON and arrays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from wings_jax import formatting
from wings_jax.analysis import laws
from wings_jax.analysis.laws import Measurement
from wings_jax.analysis.probes import Variant
from wings_jax.analysis.slot_classes import CLASSES, KINDS, ROWS
from wings_jax.data import samples

FLAT = "a curve is flat over the layers"

MeanInterval = tuple[float, float, float]  # mean, and the ends of its 95 % interval


@dataclasses.dataclass(frozen=True)
class ShiftResult:
    """One model's attention on n probes.

    name         of the model, in tables and file names
    origin       where the model comes from: its directory, or what a base was put together from
    step         optimizer steps of its stage, None for a base
    variant      how attention is averaged
    learners     of the model, in the order of M
    ids          of the n probes
    measurement  of all probes, on the host: f32[n,L,...]
    tally        samples that were read, and those skipped by cause
    """

    name: str
    origin: str
    step: int | None
    variant: Variant
    learners: tuple[str, ...]
    ids: Sequence[str]
    measurement: Measurement
    tally: samples.Tally

    def curves(self, rows: str | None = None) -> np.ndarray:
        """Returns f32[n,L,C], the LAWS curves over the queries `rows`, by default the variant's."""
        return self.measurement.masses[:, :, ROWS.index(rows or self.variant.rows)]

    def shifts(self, rows: str | None = None) -> np.ndarray:
        """Returns f64[n], the attention shift of each probe, NaN where a curve is flat."""
        return laws.attention_shift(self.curves(rows))

    @property
    def used(self) -> np.ndarray:
        """Returns bool[n], whether a probe has an attention shift."""
        return np.isfinite(self.shifts())

    @property
    def skipped(self) -> samples.Tally:
        """Returns all samples without an attention shift by cause, those with flat curves too."""
        # A copy: the tally of the samples themselves is not changed.
        tally = samples.Tally.from_dict(self.tally.as_dict())
        flat_ids = [self.ids[number] for number in np.flatnonzero(~self.used).tolist()]
        reason = samples.BadSample(FLAT, "no correlation")
        tally.add(0, [(probe_id, reason) for probe_id in flat_ids])
        return tally

    @property
    def shift(self) -> MeanInterval:
        """Returns the mean shift and its 95 % interval, NaN if no probe has one."""
        return _mean_interval(self.shifts())


def _mean_interval(values: np.ndarray) -> MeanInterval:
    """Returns the mean of the finite values and its bootstrapped 95 % interval."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return (float("nan"),) * 3

    low, high = laws.mean_interval(finite)
    return float(finite.mean()), float(low), float(high)


def summary(results: Sequence[ShiftResult]) -> dict[str, Any]:
    """Returns every model's means over its samples, with 95 % intervals, ready for JSON."""
    return {"models": [_model_summary(result) for result in results]}


def _model_summary(result: ShiftResult) -> dict[str, Any]:
    skipped = result.skipped
    # Means are over the probes that have a shift, so that all numbers are of the same probes.
    curves = result.curves()[result.used]

    return {
        "name": result.name,
        "origin": result.origin,
        "step": result.step,
        "variant": dataclasses.asdict(result.variant),
        "layers": curves.shape[1],
        "n_used": len(curves),
        "n_skipped": skipped.bad,
        "skipped": skipped.as_dict()["causes"],
        "shift": _interval_json(result.shift),
        "rho": _rounded(1 - result.shift[0]),
        "shift_by_rows": {query_rows: _shift_json(result, query_rows) for query_rows in ROWS},
        "curves": _curves_json(curves),
        "router": _by_learner(result, result.measurement.gates),
        "norm_ratio": _by_learner(result, result.measurement.norms),
    }


def _shift_json(result: ShiftResult, rows: str) -> dict[str, Any]:
    shifts = result.shifts(rows)
    return {**_interval_json(_mean_interval(shifts)), "n_used": int(np.isfinite(shifts).sum())}


def _curves_json(curves: np.ndarray) -> dict[str, Any]:
    """Returns class -> mean and interval by layer, of curves f32[n,L,C]."""
    if not len(curves):
        return {}

    # [L, C] and [2, L, C]
    means, intervals = curves.mean(0), laws.mean_interval(curves)
    return {
        class_name: {"mean": _rounded(means[:, c]), "interval95": _rounded(intervals[..., c])}
        for c, class_name in enumerate(CLASSES)
    }


def _by_learner(result: ShiftResult, values: np.ndarray | None) -> dict[str, Any]:
    """Returns learner -> kind of query -> mean by layer, of f32[n,L,2,M], over the used probes."""
    if values is None:
        return {}

    # [n, L, 2, M] -> [L, 2, M]
    means = values[result.used].mean(0)
    return {
        learner: {kind: _rounded(means[:, k, m]) for k, kind in enumerate(KINDS)}
        for m, learner in enumerate(result.learners)
    }


def _interval_json(interval: MeanInterval) -> dict[str, Any]:
    mean, low, high = interval
    return {"mean": _rounded(mean), "interval95": _rounded([low, high])}


def _rounded(values: Any) -> Any:
    """Returns numbers as nested lists, rounded; None where not finite: JSON has no NaN.

    >>> _rounded([0.12345678, float("nan")])
    [0.123457, None]
    """
    if np.ndim(values):
        return [_rounded(value) for value in values]
    return round(float(values), 6) if np.isfinite(values) else None


def json_lines(results: Sequence[ShiftResult]) -> str:
    """Returns JSON lines: the curves, rho and shift of every probe, null where a curve is flat."""
    lines = []
    for result in results:
        shifts, curves = result.shifts(), result.curves()
        for number, probe_id in enumerate(result.ids):
            by_class = dict(zip(CLASSES, curves[number].T, strict=True))
            line = {
                "model": result.name,
                "variant": dataclasses.asdict(result.variant),
                "id": probe_id,
                "rho": _rounded(1 - shifts[number]),
                "shift": _rounded(shifts[number]),
                "curves": {class_name: _rounded(curve) for class_name, curve in by_class.items()},
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")

    return "".join(lines)


def arrays(result: ShiftResult) -> dict[str, np.ndarray]:
    """Returns the measurement by sample, and the names of its dimensions.

    masses       f32[n,L,N,C] of every head, over the variant's queries
    gates, norms f32[n,L,2,M] as in `laws.Measurement`, over queries of each kind
    """
    measurement = result.measurement
    named = {"masses": measurement.head_masses[:, :, ROWS.index(result.variant.rows)]}
    # Without a router there are no gates.
    if measurement.gates is not None:
        named["gates"] = measurement.gates

    return {
        **named,
        "norms": measurement.norms,
        "ids": np.array(result.ids),
        "classes": np.array(CLASSES),
        "kinds": np.array(KINDS),
        "learners": np.array(result.learners, str),
        "variant": np.array(json.dumps(dataclasses.asdict(result.variant))),
    }


def text_table(results: Sequence[ShiftResult]) -> str:
    """Returns a table for a terminal: shift with its interval, and where attention goes."""
    variant = results[0].variant
    # The shift over the other group of queries has a column too.
    other_rows = next(query_rows for query_rows in ROWS if query_rows != variant.rows)
    shown = {"before": laws.BEFORE, "image": laws.IMAGE, "after": laws.AFTER}

    heading = ["", "used", "skipped", "shift [95 % interval]", f"with rows: {other_rows}", *shown]
    cells = [heading]
    for result in results:
        # Mean over probes and layers: [n, L, C] -> [C]
        shares = result.curves()[result.used].mean((0, 1))
        shifts = [
            _mean_interval(result.shifts(query_rows)) for query_rows in (variant.rows, other_rows)
        ]
        cells.append(
            [
                result.name,
                str(int(result.used.sum())),
                str(result.skipped.bad),
                *(_format_interval(shift) for shift in shifts),
                *(f"{shares[c]:.3f}" for c in shown.values()),
            ]
        )

    title = f"Attention shift over layers ({variant}), and share of attention on"
    return f"{title}\n{formatting.text_table(cells)}"


def _format_interval(interval: MeanInterval) -> str:
    """Returns the mean and its interval, only the mean where there is no interval.

    >>> _format_interval((1.5, 1.25, 1.75))
    '1.500 [1.250, 1.750]'
    """
    mean, low, high = interval
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
