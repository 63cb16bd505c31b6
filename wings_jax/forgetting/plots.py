"""The experiment in pictures: after figures 2c, 5 and 6 of the paper.

Every function returns a matplotlib figure, or None where there is nothing to compare yet.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure, lines
from scipy import stats

from wings_jax import files
from wings_jax.forgetting import results, table
from wings_jax.forgetting.methods import (
    BASE,
    CHOICES,
    INTERLEAVED,
    NEVER,
    PERPLEXITY,
    PICTURES,
    REGIMES,
    REPLAYED,
    SHIFT,
    BaseLLM,
    Measure,
    find,
)
from wings_jax.forgetting.results import Estimate, Scored

INK, FAINT, PALE = "#24292f", "#d0d7de", "#57606a"
TOP = 104  # of axes in %, so that the end of an interval at 100 can be seen
RATES, RATES_TITLE = ("lr_smaller", "lr_larger", "wings"), "learning rates of Wings"
SHADES = {PICTURES: "#bc4c00", NEVER: "#0969da", REPLAYED: "#a5d6ff", CHOICES: "#0969da"}
MARKERS = dict(zip(REGIMES, "os", strict=True))
# Panels of the interleaved settings, as in figures 5a, 5b, 5c and 6.
COMPARED = {
    "full fine-tuning": ("base", "llava", "wings", "frozen_llm"),
    "few parameters": ("base", "lora", "prefix", "frozen_llm", "wings"),
    "parts of Wings": ("visual_only", "textual_only", "no_router", "gain2", "wings"),
    RATES_TITLE: RATES,
}
RATE_NAMES = {"lr_smaller": "smaller", "lr_larger": "larger", "wings": "partitioned"}


def write_plots(
    out: pathlib.Path, runs: Sequence[Scored], base: BaseLLM, note: str
) -> list[pathlib.Path]:
    """Writes all plots that the runs allow; `note` stands below each. Returns the paths."""
    pages = {"shift.png": ("a point per run; line: least squares", shifts(runs, base.text))}
    for regime in table.regimes(runs):
        told = f"stage 2 on {REGIMES[regime].title}; lines: 95 % intervals"
        pages[f"accuracy-{regime}.png"] = (told, accuracies(runs, regime, base))
        if "iit" in base.tasks:
            pages[f"interleaved-{regime}.png"] = (told, interleaved(runs, regime))
    made = []
    for name, (told, page) in pages.items():
        if page is None:
            continue
        page.supxlabel(f"{told}; {note}", fontsize=8, color=PALE)
        path = out / name
        with files.replacing(path) as temporary:
            page.savefig(temporary, dpi=120, format="png")
        made.append(path)
    return made


def accuracies(runs: Sequence[Scored], regime: str, base: BaseLLM) -> figure.Figure:
    """Returns bars of pictures and text by method, and by learning rates where they were tried."""
    measures = [measure for measure in SHADES if measure in base.measures]
    methods = _there(
        runs, regime, [name for name in table.names(runs, regime) if name not in RATES[:2]]
    )
    rates = _there(runs, regime, RATES)
    rates = rates if len(rates) > 1 else []
    read = methods if PERPLEXITY in base.measures else []
    width = max(7.6, 1.15 * (len(methods) + len(rates) + len(read)) + 1.8)  # the legend needs 7.6
    page = figure.Figure(figsize=(width, 4.4), layout="constrained")
    widths = [len(names) for names in (methods, rates, read) if names]
    panels = page.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    _bars(panels[0], runs, regime, methods, measures)
    panels[0].set_xticks(range(len(methods)), [_wrapped(find(name).title) for name in methods])
    panels[0].set_title("methods")
    if rates:
        _bars(panels[1], runs, regime, rates, measures)
        panels[1].set_xticks(range(len(rates)), [RATE_NAMES[name] for name in rates])
        panels[1].set_title(RATES_TITLE)
    if read:
        _bars(panels[-1], runs, regime, read, [PERPLEXITY])
        panels[-1].set_xlim(-0.6, len(read) - 0.4)
        panels[-1].set_xticks(range(len(read)), [_wrapped(find(name).title) for name in read])
        panels[-1].set_title(f"{PERPLEXITY.title} (lower is better)")
        panels = panels[:-1]
    for panel, names in zip(panels, (methods, rates), strict=False):
        panel.set_xlim(-0.6, len(names) - 0.4)
        panel.set_ylim(0, TOP)
        panel.tick_params(labelleft=panel is panels[0])
    panels[0].set_ylabel("right answers in %")
    before = results.estimate(results.of(runs, BASE, regime), base.text)
    if not math.isnan(before.mean):
        for panel in panels:
            panel.axhline(
                100 * before.mean, color=SHADES[base.text], lw=1, ls=(0, (4, 3)), zorder=0
            )
    handles = [
        lines.Line2D([], [], color=SHADES[measure], lw=7, label=measure.title)
        for measure in measures
    ]
    handles.append(
        lines.Line2D([], [], color=SHADES[base.text], lw=1, ls=(0, (4, 3)), label="the base's text")
    )
    page.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return page


def _there(runs: Sequence[Scored], regime: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if results.of(runs, name, regime)]


def _wrapped(title: str) -> str:
    return re.sub(r"(?<=,) |; | (?=learners)|(?<=[a-z]-)(?=[a-z])", "\n", title)


def _bars(
    panel: mpl_axes.Axes,
    runs: Sequence[Scored],
    regime: str,
    methods: Sequence[str],
    measures: Sequence[Measure],
) -> None:
    """Draws a group of bars per method, a bar per measure, each with its 95 % interval."""
    width = 0.8 / len(measures)
    for number, measure in enumerate(measures):
        found = [results.estimate(results.of(runs, name, regime), measure) for name in methods]
        at = np.arange(len(methods)) + (number - (len(measures) - 1) / 2) * width
        colours = [SHADES.get(measure, PALE)] * len(methods)
        _columns(panel, at, found, width, colours, measure.scale)
    _quiet(panel)


def _columns(
    panel: mpl_axes.Axes,
    at: np.ndarray,
    found: Sequence[Estimate],
    width: float,
    colours: Sequence[str],
    scale: float = 100.0,
) -> None:
    heights = np.array([scale * one.mean for one in found])
    ends = np.array([[one.mean - one.low, one.high - one.mean] for one in found]).T * scale
    panel.bar(at, heights, 0.92 * width, color=colours, linewidth=0)
    shown = np.isfinite(heights) & np.isfinite(ends).all(0)
    panel.errorbar(
        at[shown],
        heights[shown],
        yerr=np.maximum(ends[:, shown], 0),
        linestyle="",
        color=INK,
        elinewidth=0.9,
        capsize=1.5,
    )


def _quiet(panel: mpl_axes.Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color=FAINT, lw=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(axis="x", length=0)


def interleaved(runs: Sequence[Scored], regime: str) -> figure.Figure | None:
    """Returns the interleaved settings by method, a panel for each group that is compared."""
    groups = {title: _there(runs, regime, names) for title, names in COMPARED.items()}
    groups = {title: names for title, names in groups.items() if len(names) > 1}
    if not groups:
        return None
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    page = figure.Figure(figsize=(6.2 * columns, 3.1 * rows + 0.4), layout="constrained")
    panels = page.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.ravel()[len(groups) :]:
        panel.axis("off")
    for panel, (title, names) in zip(panels.ravel(), groups.items(), strict=False):
        width = 0.84 / len(names)
        for number, name in enumerate(names):
            found = [results.estimate(results.of(runs, name, regime), m) for m in INTERLEAVED]
            at = np.arange(len(INTERLEAVED)) + (number - (len(names) - 1) / 2) * width
            _columns(panel, at, found, width, [find(name).colour] * len(at))
        _name(panel, title, names)
        panel.set_xticks(range(len(INTERLEAVED)), [measure.title for measure in INTERLEAVED])
        panel.set_ylim(0, TOP)
        _quiet(panel)
    for row in panels:
        row[0].set_ylabel("right answers in %")
    return page


def _name(panel: mpl_axes.Axes, title: str, methods: Sequence[str]) -> None:
    """Puts the title and a legend of the methods in one row above a panel."""
    short = RATE_NAMES if title == RATES_TITLE else {}
    panel.legend(
        [lines.Line2D([], [], color=find(name).colour, lw=6) for name in methods],
        [short.get(name, find(name).title) for name in methods],
        title=title,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(methods),
        frameon=False,
        fontsize=8,
        handlelength=0.8,
        columnspacing=1.0,
    )


def shifts(runs: Sequence[Scored], text: Measure) -> figure.Figure | None:
    """Returns text against pictures and against attention shift (figure 2c), a point per run."""
    if len(runs) < 2:
        return None
    page = figure.Figure(figsize=(13.5, 4.6), layout="constrained")
    left, right = page.subplots(1, 2, sharey=True)
    _points(left, runs, PICTURES, text)
    _points(right, runs, SHIFT, text)
    left.set_xlabel("pictures, right answers in %")
    left.set_ylabel(f"{text.title}: right answers in %")
    left.set_title("sight and text (better: up and right)", fontsize=11)
    right.set_xlabel(r"attention shift (1 - $\rho$; all queries, prompt and answer)")
    right.set_title(_correlated(right, runs, text), fontsize=11)
    methods = dict.fromkeys(run.method for run in runs)
    handles = [
        lines.Line2D(
            [],
            [],
            color=find(name).colour,
            marker="*" if name == BASE else "o",
            ls="",
            label=find(name).title,
        )
        for name in methods
    ]
    regimes = table.regimes(runs)
    if len(regimes) > 1:
        handles += [
            lines.Line2D(
                [],
                [],
                color=PALE,
                marker=MARKERS[name],
                ls="",
                mfc="none",
                label=REGIMES[name].title,
            )
            for name in regimes
        ]
    page.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    return page


def _points(panel: mpl_axes.Axes, runs: Sequence[Scored], measure: Measure, text: Measure) -> None:
    for run in runs:
        panel.plot(
            measure.scale * run.value(measure),
            100 * run.value(text),
            color=find(run.method).colour,
            marker=MARKERS.get(run.regime, "*"),
            markersize=11 if run.method == BASE else 7,
            alpha=0.85,
            ls="",
        )
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color=FAINT, lw=0.6)
    panel.margins(0.08)


def _correlated(panel: mpl_axes.Axes, runs: Sequence[Scored], text: Measure) -> str:
    """Draws the line of figure 2c; returns its heading, the rank correlation over the runs."""
    pairs = np.array([[run.value(SHIFT), run.value(text)] for run in runs])
    x, y = pairs[np.isfinite(pairs).all(1)].T
    title = "attention shift and text"
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return title
    ends = np.array([x.min(), x.max()])
    fitted = np.polyval(np.polyfit(x, y, 1), ends)
    panel.plot(ends, 100 * fitted, color=FAINT, lw=2, zorder=0)
    rank = stats.spearmanr(x, y).statistic
    return f"{title}: {len(x)} runs, Spearman {rank:+.2f}"
