"""What was measured, by model: the numbers behind the plots, as text, JSON and arrays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from wings_jax.analysis import laws
from wings_jax.analysis.laws import Measurement
from wings_jax.analysis.probes import CLASSES, KINDS, ROWS, Variant
from wings_jax.data import samples

FLAT = "a curve is flat over the layers"


@dataclasses.dataclass(frozen=True)
class ShiftResult:
    """One model's attention on n probes.

    name, origin, step   how it is called, where it comes from, its steps (None for a base)
    learners             of the model, in the order of M
    ids                  of the probes
    reading              of all of them, on the host: f32[n,L,...]
    tally                samples read, and those that are no probes by cause
    """

    name: str
    origin: str
    step: int | None
    variant: Variant
    learners: tuple[str, ...]
    ids: Sequence[str]
    reading: Measurement
    tally: samples.Tally

    def curves(self, rows: str | None = None) -> np.ndarray:
        """Returns f32[n,L,C], the LAWS curves over the variant's rows, or over others."""
        return self.reading.masses[:, :, ROWS.index(rows or self.variant.rows)]

    def shifts(self, rows: str | None = None) -> np.ndarray:
        """Returns f64[n], NaN where a curve is flat."""
        return laws.shifts(self.curves(rows))

    @property
    def used(self) -> np.ndarray:
        """Returns bool[n], where there is a shift."""
        return np.isfinite(self.shifts())

    @property
    def skipped(self) -> samples.Tally:
        """Returns all that is not used, by cause: no probes, or curves that are flat."""
        whole = samples.Tally.from_dict(self.tally.as_dict())
        flat = [self.ids[i] for i in np.flatnonzero(~self.used)]
        whole.add(0, [(name, samples.BadSample(FLAT, "no correlation")) for name in flat])
        return whole

    @property
    def shift(self) -> tuple[float, float, float]:
        """Returns the mean shift and its 95 % interval, NaN if no probe is used."""
        return _mean(self.shifts())


def _mean(values: np.ndarray) -> tuple[float, float, float]:
    """Returns the mean of the finite values and its bootstrapped 95 % interval."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return (float("nan"),) * 3
    return (float(finite.mean()), *map(float, laws.interval(finite)))


def as_json(results: Sequence[ShiftResult]) -> dict[str, Any]:
    """Returns every model's means over its samples, with 95 % intervals, for machines."""
    return {"models": [_model(result) for result in results]}


def _model(result: ShiftResult) -> dict[str, Any]:
    used, skipped = result.used, result.skipped
    curves = result.curves()[used]
    ends = laws.interval(curves) if len(curves) else None
    return {
        "name": result.name,
        "origin": result.origin,
        "step": result.step,
        "variant": _variant(result),
        "layers": curves.shape[1],
        "n_used": int(used.sum()),
        "n_skipped": skipped.bad,
        "skipped": skipped.as_dict()["causes"],
        "shift": _interval(*result.shift),
        "rho": _plain(1 - result.shift[0]),
        "shift_by_rows": {rows: _by_rows(result, rows) for rows in ROWS},
        "curves": {
            name: {"mean": _plain(curves[..., c].mean(0)), "interval95": _plain(ends[..., c])}
            for c, name in enumerate(CLASSES)
            if len(curves)
        },
        "router": _by_learner(result, result.reading.gates),
        "norm_ratio": _by_learner(result, result.reading.norms),
    }


def _by_rows(result: ShiftResult, rows: str) -> dict[str, Any]:
    shifts = result.shifts(rows)
    return {**_interval(*_mean(shifts)), "n_used": int(np.isfinite(shifts).sum())}


def _by_learner(result: ShiftResult, values: np.ndarray | None) -> dict[str, Any]:
    """Returns learner -> kind of query -> mean by layer, of f32[n,L,2,M], over the used probes."""
    if values is None:
        return {}
    means = values[result.used].mean(0)
    return {
        name: {kind: _plain(means[:, k, m]) for k, kind in enumerate(KINDS)}
        for m, name in enumerate(result.learners)
    }


def _variant(result: ShiftResult) -> dict[str, Any]:
    return dataclasses.asdict(result.variant)


def _interval(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"mean": _plain(mean), "interval95": _plain(np.array([low, high]))}


def _plain(values: Any) -> Any:
    """Returns numbers as nested lists, rounded; None where not finite, for JSON knows no NaN."""
    if np.ndim(values):
        return [_plain(value) for value in values]
    return round(float(values), 6) if np.isfinite(values) else None


def as_lines(results: Sequence[ShiftResult]) -> str:
    """Returns JSON lines: the curves, rho and shift of every probe, null where a curve is flat."""
    lines = []
    for result in results:
        head = {"model": result.name, "variant": _variant(result)}
        shifts, curves = result.shifts(), result.curves()
        for number, identity in enumerate(result.ids):
            shift = shifts[number]
            named = {name: _plain(curves[number, :, c]) for c, name in enumerate(CLASSES)}
            lines.append(
                {
                    **head,
                    "id": identity,
                    "rho": _plain(1 - shift),
                    "shift": _plain(shift),
                    "curves": named,
                }
            )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def heads(result: ShiftResult) -> dict[str, np.ndarray]:
    """Returns the dump by sample, and what its dimensions are called.

    masses       f32[n,L,N,C] of every head, over the variant's rows
    gates, norms f32[n,L,2,M] as in `laws.Reading`, over queries of each kind
    """
    reading = result.reading
    return {
        "masses": reading.heads[:, :, ROWS.index(result.variant.rows)],
        **({} if reading.gates is None else {"gates": reading.gates}),
        "norms": reading.norms,
        "ids": np.array(result.ids),
        "classes": np.array(CLASSES),
        "kinds": np.array(KINDS),
        "learners": np.array(result.learners, str),
        "variant": np.array(json.dumps(_variant(result))),
    }


def as_text(results: Sequence[ShiftResult]) -> str:
    """Returns a table for a terminal."""
    variant = results[0].variant
    other = next(rows for rows in ROWS if rows != variant.rows)
    shift = ("shift [95 % interval]", f"with rows: {other}")
    rows = [("", "used", "skipped", *shift, "before", "image", "after")]
    for result in results:
        shares = result.curves()[result.used].mean((0, 1))[[laws.BEFORE, laws.IMAGE, laws.AFTER]]
        rows.append(
            (
                result.name,
                str(int(result.used.sum())),
                str(result.skipped.bad),
                *(_shown(_mean(result.shifts(r))) for r in (variant.rows, other)),
                *(f"{share:.3f}" for share in shares),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"Attention shift over layers ({variant}), and share of attention on"]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _shown(ends: tuple[float, float, float]) -> str:
    mean, low, high = ends
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
