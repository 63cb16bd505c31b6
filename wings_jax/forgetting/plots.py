"""The plots of the experiment: bar charts (`bars`), and text against images (figure 2c)."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure, lines
from scipy import stats

from wings_jax import files
from wings_jax.forgetting import bars, table
from wings_jax.forgetting.bars import GRID_COLOR, MUTED_COLOR
from wings_jax.forgetting.methods import (
    BASE,
    IMAGES,
    REGIMES,
    SHIFT,
    BaseLLM,
    Measure,
    find_method,
)
from wings_jax.forgetting.results import RunScores

MARKERS = dict(zip(REGIMES, "os", strict=True))
BASE_MARKER = "*"


def write_plots(
    out: pathlib.Path, runs: Sequence[RunScores], base: BaseLLM, note: str
) -> list[pathlib.Path]:
    """Writes all plots that the runs allow, with `note` below each; returns the paths."""
    figures = {"shift.png": plot_shifts(runs, base.text_measure)}
    captions = {"shift.png": "a point per run; line: least squares"}
    for regime in table.scored_regimes(runs):
        figures[f"accuracy-{regime}.png"] = bars.plot_accuracies(runs, regime, base)
        if "iit" in base.tasks:
            figures[f"interleaved-{regime}.png"] = bars.plot_interleaved(runs, regime)
        for file_name in (f"accuracy-{regime}.png", f"interleaved-{regime}.png"):
            captions[file_name] = f"stage 2 on {REGIMES[regime].title}; lines: 95 % intervals"

    paths = []
    for file_name, plot_figure in figures.items():
        if plot_figure is None:
            continue
        plot_figure.supxlabel(f"{captions[file_name]}; {note}", fontsize=8, color=MUTED_COLOR)
        paths.append(out / file_name)
        # A reader never finds half of an image.
        with files.replacing(paths[-1]) as temporary:
            plot_figure.savefig(temporary, dpi=120, format="png")
    return paths


def plot_shifts(runs: Sequence[RunScores], text: Measure) -> figure.Figure | None:
    """Returns text against images and against attention shift (figure 2c), a point per run.

    None where there are fewer than two runs.
    """
    if len(runs) < 2:
        return None

    plot_figure = figure.Figure(figsize=(13.5, 4.6), layout="constrained")
    left, right = plot_figure.subplots(1, 2, sharey=True)

    _draw_points(left, runs, IMAGES, text)
    left.set_title("images and text (better: up and right)", fontsize=11)
    left.set_xlabel(f"{IMAGES.title}: {bars.ACCURACY_LABEL}")
    left.set_ylabel(f"{text.title}: {bars.ACCURACY_LABEL}")

    _draw_points(right, runs, SHIFT, text)
    right.set_title(_draw_trend(right, runs, text), fontsize=11)
    right.set_xlabel(r"attention shift (1 - $\rho$; all queries, prompt and answer)")

    _add_legend(plot_figure, runs)
    return plot_figure


def _draw_points(
    panel: mpl_axes.Axes, runs: Sequence[RunScores], measure: Measure, text: Measure
) -> None:
    """Draws a point per run: `measure` to the right, text accuracy upwards."""
    for run in runs:
        panel.plot(
            measure.scale * run.value(measure),
            100 * run.value(text),
            color=find_method(run.method).color,
            marker=MARKERS.get(run.regime, BASE_MARKER),
            # The base is one run, easily hidden by others.
            markersize=11 if run.method == BASE else 7,
            alpha=0.85,
            ls="",
        )

    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color=GRID_COLOR, lw=0.6)
    panel.margins(0.08)


def _draw_trend(panel: mpl_axes.Axes, runs: Sequence[RunScores], text: Measure) -> str:
    """Draws the least-squares line of text by shift; returns the title, with the correlation."""
    title = "attention shift and text"
    pairs = np.array([[run.value(SHIFT), run.value(text)] for run in runs])
    # Runs that have both.
    shifts, accuracies = pairs[np.isfinite(pairs).all(1)].T
    if len(shifts) < 3 or not np.ptp(shifts) or not np.ptp(accuracies):
        return title

    # A straight line needs two points.
    ends = np.array([shifts.min(), shifts.max()])
    fitted = np.polyval(np.polyfit(shifts, accuracies, 1), ends)
    panel.plot(ends, 100 * fitted, color=GRID_COLOR, lw=2, zorder=0)

    # By rank, as a few methods are far from the others.
    rank = stats.spearmanr(shifts, accuracies).statistic
    return f"{title}: {len(shifts)} runs, Spearman {rank:+.2f}"


def _add_legend(plot_figure: figure.Figure, runs: Sequence[RunScores]) -> None:
    """Adds the colors of the methods and, where there are several, the markers of the regimes."""
    handles = [
        lines.Line2D(
            [],
            [],
            color=find_method(regime_name).color,
            marker=BASE_MARKER if regime_name == BASE else "o",
            ls="",
            label=find_method(regime_name).title,
        )
        for regime_name in dict.fromkeys(run.method for run in runs)
    ]

    regimes = table.scored_regimes(runs)
    # Markers are explained only where there are two.
    if len(regimes) > 1:
        handles += [
            lines.Line2D(
                [],
                [],
                color=MUTED_COLOR,
                marker=MARKERS[regime_name],
                ls="",
                mfc="none",
                label=REGIMES[regime_name].title,
            )
            for regime_name in regimes
        ]
    plot_figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
