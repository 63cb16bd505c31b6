"""The files of `wings_jax.analyze laws`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from wings_jax import files
from wings_jax.analysis import plots, results, scores

DOTS_PER_INCH = 120


def make_figures(
    measured: Sequence[results.ShiftResult], score: str, by_model: Mapping[str, scores.Score]
) -> dict[str, Figure]:
    """Returns the plots by file name, without those that no model has values for.

    `by_model` holds the score called `score` of some of the models, for the scatter plot.
    """
    figures: dict[str, Figure | None] = {"laws_curves.png": plots.plot_curves(measured)}
    for result in measured:
        figures[f"laws_shares-{result.name}.png"] = plots.plot_shares(result)
    figures["laws_router.png"] = plots.plot_router(measured)
    figures["laws_norms.png"] = plots.plot_norms(measured)

    # A point for each model that has a score.
    points = [
        plots.ShiftPoint(result.name, result.shift, by_model[result.name])
        for result in measured
        if result.name in by_model
    ]
    if points:
        figures["laws_scatter.png"] = plots.plot_scatter(points, score, measured[0].variant)

    return {name: figure for name, figure in figures.items() if figure is not None}


def write_results(
    directory: pathlib.Path,
    measured: Sequence[results.ShiftResult],
    figures: Mapping[str, Figure],
) -> list[pathlib.Path]:
    """Writes curves, summary, arrays and plots, and returns the paths.

    Raises:
      UserError: a file cannot be written.
    """
    summary = json.dumps(results.summary(measured), indent=1, ensure_ascii=False) + "\n"
    paths = [
        files.write_text(directory / "laws.jsonl", results.json_lines(measured)),
        files.write_text(directory / "laws_summary.json", summary),
    ]

    for result in measured:
        paths.append(directory / f"laws_heads-{result.name}.npz")
        with files.replacing(paths[-1]) as temporary:
            arrays: Mapping[str, Any] = results.arrays(result)
            np.savez_compressed(temporary, **arrays)

    for name, figure in figures.items():
        paths.append(directory / name)
        with files.replacing(paths[-1]) as temporary:
            figure.savefig(temporary, dpi=DOTS_PER_INCH, format="png")

    return paths
