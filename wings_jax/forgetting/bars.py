"""Bar charts of the experiment, after figures 5 and 6 of the paper.

Every function returns a matplotlib figure, or None where there is nothing to compare yet.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure, lines

from wings_jax.forgetting import estimates, results, table
from wings_jax.forgetting.estimates import Estimate
from wings_jax.forgetting.methods import (
    BASE,
    CHOICES,
    IMAGES,
    INTERLEAVED,
    NOT_REPLAYED,
    PERPLEXITY,
    REPLAYED,
    BaseLLM,
    Measure,
    find_method,
)
from wings_jax.forgetting.results import RunScores

TEXT_COLOR, GRID_COLOR, MUTED_COLOR = "#24292f", "#d0d7de", "#57606a"
DASHED = (0, (4, 3))
MAX_PERCENT = 104  # of axes in %, so that the end of an interval at 100 is visible
ACCURACY_LABEL = "accuracy (%)"
MEASURE_COLORS = {
    IMAGES: "#bc4c00",
    NOT_REPLAYED: "#0969da",
    REPLAYED: "#a5d6ff",
    CHOICES: "#0969da",
}
# Panels of the interleaved settings, as in figures 5a, 5b, 5c and 6.
RATES, RATES_TITLE = ("lr_smaller", "lr_larger", "wings"), "learning rates of Wings"
RATE_NAMES = {"lr_smaller": "smaller", "lr_larger": "larger", "wings": "partitioned"}
INTERLEAVED_PANELS = {
    "full fine-tuning": ("base", "llava", "wings", "frozen_llm"),
    "few parameters": ("base", "lora", "prefix", "frozen_llm", "wings"),
    "parts of Wings": ("visual_only", "textual_only", "no_router", "gain2", "wings"),
    RATES_TITLE: RATES,
}


@dataclasses.dataclass(frozen=True)
class BarPanel:
    """A panel of `plot_accuracies`: a group of bars per method, a bar per measure."""

    # Above the panel.
    title: str
    # Methods or variants, in their order.
    methods: Sequence[str]
    # Their names below the groups.
    labels: Sequence[str]
    # In each group.
    measures: Sequence[Measure]


def plot_accuracies(runs: Sequence[RunScores], regime: str, base: BaseLLM) -> figure.Figure:
    """Returns bars of accuracy on images and text by method, and by learning rates if tried."""
    measures = [measure for measure in MEASURE_COLORS if measure in base.measures]
    panels = _accuracy_panels(runs, regime, base, measures)
    widths = [len(panel.methods) for panel in panels]

    # The legend needs 7.6 inches.
    size = (max(7.6, 1.15 * sum(widths) + 1.8), 4.4)
    bar_figure = figure.Figure(figsize=size, layout="constrained")
    all_axes = bar_figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]

    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_groups(axes, runs, regime, panel.methods, panel.measures)
        axes.set_title(panel.title)
        axes.set_xticks(range(len(panel.labels)), panel.labels)
        axes.set_xlim(-0.6, len(panel.labels) - 0.4)

        # Perplexity has a scale of its own.
        if PERPLEXITY not in panel.measures:
            axes.set_ylim(0, MAX_PERCENT)
            axes.tick_params(labelleft=axes is all_axes[0])
            _draw_base_line(axes, runs, regime, base)

    all_axes[0].set_ylabel(ACCURACY_LABEL)
    _add_measure_legend(bar_figure, measures, base)
    return bar_figure


def _accuracy_panels(
    runs: Sequence[RunScores], regime: str, base: BaseLLM, measures: Sequence[Measure]
) -> list[BarPanel]:
    """Returns the panel of all methods, of the learning rates, and of perplexity, where known."""
    names = [name for name in table.scored_methods(runs, regime) if name not in RATES[:2]]
    methods = _with_runs(runs, regime, names)
    titles = [_wrap_title(find_method(name).title) for name in methods]
    panels = [BarPanel("methods", methods, titles, measures)]

    rates = _with_runs(runs, regime, RATES)
    if len(rates) > 1:
        panels.append(BarPanel(RATES_TITLE, rates, [RATE_NAMES[name] for name in rates], measures))
    if PERPLEXITY in base.measures:
        title = f"{PERPLEXITY.title} (lower is better)"
        panels.append(BarPanel(title, methods, titles, [PERPLEXITY]))
    return panels


def _with_runs(runs: Sequence[RunScores], regime: str, names: Sequence[str]) -> list[str]:
    return [method_name for method_name in names if results.select_runs(runs, method_name, regime)]


def _wrap_title(title: str) -> str:
    """Returns a method's title in lines.

    >>> _wrap_title("Wings, frozen LLM")
    'Wings,\\nfrozen LLM'
    """
    return re.sub(r"(?<=,) |; | (?=learners)|(?<=[a-z]-)(?=[a-z])", "\n", title)


def _estimates(
    runs: Sequence[RunScores], regime: str, names: Sequence[str], measures: Sequence[Measure]
) -> list[Estimate]:
    """Returns an estimate per method and measure."""
    return [
        estimates.estimate_mean(results.select_runs(runs, method_name, regime), measure)
        for method_name in names
        for measure in measures
    ]


def _draw_groups(
    panel: mpl_axes.Axes,
    runs: Sequence[RunScores],
    regime: str,
    methods: Sequence[str],
    measures: Sequence[Measure],
) -> None:
    """Draws a group of bars per method, a bar per measure, each with its 95 % interval."""
    # The bars of a group touch each other; groups are 1 apart.
    width = 0.8 / len(measures)
    for number, measure in enumerate(measures):
        offset = (number - (len(measures) - 1) / 2) * width
        positions = np.arange(len(methods)) + offset
        color = MEASURE_COLORS.get(measure, MUTED_COLOR)
        values = _estimates(runs, regime, methods, [measure])
        _draw_bars(panel, positions, values, width, color, measure.scale)
    style_axes(panel)


def _draw_bars(
    panel: mpl_axes.Axes,
    positions: np.ndarray,
    values: Sequence[Estimate],
    width: float,
    color: str,
    scale: float = 100.0,
) -> None:
    """Draws bars of one color with the intervals that are known."""
    heights = np.array([scale * value.mean for value in values])
    panel.bar(positions, heights, 0.92 * width, color=color, linewidth=0)

    # [bars, 2] -> [2, bars]: distances below and above the mean.
    distances = np.array([[one.mean - one.low, one.high - one.mean] for one in values]).T * scale
    # Bars without an interval have no error bar.
    known = np.isfinite(heights) & np.isfinite(distances).all(0)
    panel.errorbar(
        positions[known],
        heights[known],
        yerr=np.maximum(distances[:, known], 0),
        linestyle="",
        color=TEXT_COLOR,
        elinewidth=0.9,
        capsize=1.5,
    )


def style_axes(panel: mpl_axes.Axes) -> None:
    """Removes the upper and right border, and draws horizontal grid lines behind the bars."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color=GRID_COLOR, lw=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(axis="x", length=0)


def _draw_base_line(
    panel: mpl_axes.Axes, runs: Sequence[RunScores], regime: str, base: BaseLLM
) -> None:
    """Draws the accuracy of the base on text as a dashed line, if the base has been run."""
    (before,) = _estimates(runs, regime, [BASE], [base.text_measure])
    if not math.isnan(before.mean):
        color = MEASURE_COLORS[base.text_measure]
        panel.axhline(100 * before.mean, color=color, lw=1, ls=DASHED, zorder=0)


def _add_measure_legend(
    bar_figure: figure.Figure, measures: Sequence[Measure], base: BaseLLM
) -> None:
    handles = [
        lines.Line2D([], [], color=MEASURE_COLORS[measure], lw=7, label=measure.title)
        for measure in measures
    ]
    color = MEASURE_COLORS[base.text_measure]
    handles.append(lines.Line2D([], [], color=color, lw=1, ls=DASHED, label="text, base"))
    bar_figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), frameon=False
    )


def plot_interleaved(runs: Sequence[RunScores], regime: str) -> figure.Figure | None:
    """Returns the interleaved settings by method, a panel for each group that is compared."""
    groups = {title: _with_runs(runs, regime, names) for title, names in INTERLEAVED_PANELS.items()}
    # A panel needs two methods to compare.
    groups = {title: names for title, names in groups.items() if len(names) > 1}
    if not groups:
        return None

    # At most two panels side by side.
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    bar_figure = figure.Figure(figsize=(6.2 * columns, 3.1 * rows + 0.4), layout="constrained")
    panels = bar_figure.subplots(rows, columns, squeeze=False, sharey=True)

    for panel in panels.ravel()[len(groups) :]:
        panel.axis("off")
    for panel, (title, names) in zip(panels.ravel(), groups.items(), strict=False):
        _draw_settings(panel, runs, regime, names)
        _add_method_legend(panel, title, names)
    for row in panels:
        row[0].set_ylabel(ACCURACY_LABEL)
    return bar_figure


def _draw_settings(
    panel: mpl_axes.Axes, runs: Sequence[RunScores], regime: str, methods: Sequence[str]
) -> None:
    """Draws a group of bars per interleaved setting, a bar per method."""
    # The bars of a group touch each other; groups are 1 apart.
    width = 0.84 / len(methods)
    for number, method_name in enumerate(methods):
        positions = np.arange(len(INTERLEAVED)) + (number - (len(methods) - 1) / 2) * width
        values = _estimates(runs, regime, [method_name], INTERLEAVED)
        _draw_bars(panel, positions, values, width, find_method(method_name).color)

    panel.set_xticks(range(len(INTERLEAVED)), [measure.title for measure in INTERLEAVED])
    panel.set_ylim(0, MAX_PERCENT)
    style_axes(panel)


def _add_method_legend(panel: mpl_axes.Axes, title: str, methods: Sequence[str]) -> None:
    """Adds the title and a legend of the methods in one row above a panel."""
    # The panel of the learning rates has shorter names.
    names = RATE_NAMES if title == RATES_TITLE else {}

    # A line as wide as a bar stands for it.
    panel.legend(
        [
            lines.Line2D([], [], color=find_method(method_name).color, lw=6)
            for method_name in methods
        ],
        [names.get(method_name, find_method(method_name).title) for method_name in methods],
        title=title,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(methods),
        frameon=False,
        fontsize=8,
        handlelength=0.8,
        columnspacing=1.0,
    )
