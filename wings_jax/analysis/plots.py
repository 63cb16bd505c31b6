"""The plots of the paper's figures 2b, 2c and 7, and of the router and the learners by layer.

Every function returns a matplotlib figure; a note below its axes names the variant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure, patches, ticker
from scipy import stats

from wings_jax.analysis import laws
from wings_jax.analysis.results import MeanInterval, ShiftResult
from wings_jax.analysis.slot_classes import BINS, CLASSES, GROUPS, KINDS, SPANS

COLORS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#57606a", "#bf3989", "#9a6700", "#0e8a8a")
MARKERS = "osD^vPX*"
CLASS_COLORS = {
    "excluded": "#d8dee4",
    "before": "#f2c230",
    "image": "#d1383d",
    "between": "#8c959f",
    "after": "#2f9e55",
}
RHO = r"$\rho$"
DARK, MEDIUM, LIGHT = "#24292f", "#57606a", "#d0d7de"  # grays of text, notes and grid lines
MAX_COLUMNS = 8  # of small multiples


@dataclasses.dataclass(frozen=True)
class ShiftPoint:
    """A checkpoint in figure 2c.

    name   of the checkpoint, for the legend
    shift  mean attention shift and the ends of its 95 % interval
    score  accuracy on text in % and the ends of its 95 % interval
    """

    name: str
    shift: MeanInterval
    score: tuple[float, float, float]


def plot_curves(results: Sequence[ShiftResult]) -> figure.Figure:
    """Returns figure 2b: attention on before, image and after by layer, a line per model."""
    page, panels = _subplots(1, 3, width=4.0, height=3.6)
    titles = {"before": "before the image", "image": "the image", "after": "after the image"}

    for panel, (class_name, title) in zip(panels[0], titles.items(), strict=True):
        class_index = CLASSES.index(class_name)
        for model_index, result in enumerate(results):
            shift = result.shift[0]
            label = f"{result.name}   shift {shift:.2f}, {RHO} {1 - shift:+.2f}"
            # [n, L, C] -> [n, L]
            curves = result.curves()[result.used][..., class_index]
            _plot_mean(panel, curves, model_index, label)
        panel.set_title(title)
        _format_layer_axis(panel)

    _equalize_ranges(panels[0])
    panels[0][0].set_ylabel("share of attention")
    _add_legend(page, panels[0][0])
    note = f"band: 95 % interval of the mean; {RHO} between before and after, over layers"
    return _with_note(page, f"{results[0].variant}; {note}")


def _equalize_ranges(panels: Sequence[mpl_axes.Axes]) -> None:
    """Gives the y axes of all panels the same length, so that slopes can be compared."""
    limits = np.array([panel.get_ylim() for panel in panels])
    half_range = np.ptp(limits, axis=1).max() / 2
    for panel, center in zip(panels, limits.mean(1), strict=True):
        low = max(0.0, center - half_range)
        panel.set_ylim(low, low + 2 * half_range)


def _plot_mean(panel: mpl_axes.Axes, values: np.ndarray, model_index: int, label: str) -> None:
    """Draws the mean of curves [n,L] with its 95 % interval, in the color of a model."""
    layers = np.arange(1, values.shape[1] + 1)
    color, marker = COLORS[model_index % len(COLORS)], MARKERS[model_index % len(MARKERS)]
    low, high = laws.mean_interval(values)

    panel.fill_between(layers, low, high, color=color, alpha=0.18, linewidth=0)
    panel.plot(
        layers, values.mean(0), color=color, marker=marker, markersize=4.5, lw=1.6, label=label
    )


def plot_scatter(points: Sequence[ShiftPoint], score: str, variant: object) -> figure.Figure:
    """Returns figure 2c: a score on text against attention shift, a point per checkpoint."""
    page, panels = _subplots(1, 1, width=5.6, height=4.2)
    panel = panels[0][0]

    _plot_trend(panel, points)
    for model_index, point in enumerate(points):
        shift, shift_low, shift_high = point.shift
        accuracy, accuracy_low, accuracy_high = point.score
        # Error bars are lengths from the point, not the ends of the interval.
        panel.errorbar(
            shift,
            accuracy,
            xerr=[[shift - shift_low], [shift_high - shift]],
            yerr=[[accuracy - accuracy_low], [accuracy_high - accuracy]],
            color=COLORS[model_index % len(COLORS)],
            marker=MARKERS[model_index % len(MARKERS)],
            markersize=7,
            lw=1,
            linestyle="",
            label=point.name,
        )

    panel.set_xlabel(f"attention shift (1 - {RHO})")
    panel.set_ylabel(f"accuracy in %: {score}")
    panel.margins(0.12)
    panel.grid(color=LIGHT, lw=0.6)
    page.legend(loc="outside right upper", frameon=False)
    return _with_note(page, f"{variant}; bars: 95 % intervals")


def _plot_trend(panel: mpl_axes.Axes, points: Sequence[ShiftPoint]) -> None:
    """Draws the least-squares line with the rank correlation, for three points or more."""
    shifts = np.array([point.shift[0] for point in points])
    accuracies = np.array([point.score[0] for point in points])
    if len(points) < 3 or not np.ptp(shifts) or not np.ptp(accuracies):
        return

    ends = np.array([shifts.min(), shifts.max()])
    line = np.polyfit(shifts, accuracies, 1)
    panel.plot(ends, np.polyval(line, ends), color=LIGHT, lw=2, zorder=0)
    rank = stats.spearmanr(shifts, accuracies).statistic
    panel.set_title(f"{len(points)} models, Spearman {rank:+.2f}, line: least squares")


def plot_shares(result: ShiftResult) -> figure.Figure:
    """Returns figure 7: for each layer, the attention on each class by position of the query."""
    masses = _masses_by_position(result)
    num_layers = len(masses)
    columns = min(MAX_COLUMNS, num_layers)
    rows = -(-num_layers // columns)
    page, panels = _subplots(rows, columns, width=max(1.7, 8 / columns), height=1.9)
    shown = [name for name in CLASS_COLORS if masses[..., CLASSES.index(name)].max() > 0]

    for layer, panel in enumerate(np.ravel(panels)):
        if layer >= num_layers:
            panel.axis("off")
            continue
        _plot_stacked_bars(panel, masses[layer], shown)
        panel.set_title(f"layer {layer + 1}", fontsize=9)
        # Tick labels at the left and at the bottom of the page only.
        if layer % columns:
            panel.set_yticklabels([])
        if layer + columns < num_layers:
            panel.set_xticklabels([])

    page.supylabel("share of attention on", fontsize=10, color=DARK)
    page.supxlabel("position of the query", fontsize=10, color=DARK)
    num_samples = int(result.used.sum())
    title = f"{result.name}: mean over {num_samples} samples; {result.variant.without_rows}"
    page.legend(
        handles=[patches.Patch(color=CLASS_COLORS[name], label=name) for name in shown],
        title=title,
        loc="outside upper center",
        ncols=len(shown),
        frameon=False,
    )
    return page


def _plot_stacked_bars(panel: mpl_axes.Axes, masses: np.ndarray, shown: Sequence[str]) -> None:
    """Draws one bar per position of f64[positions,C], stacked by class, with lines at spans."""
    positions = np.arange(len(masses))
    bottom = np.zeros(len(masses))
    for name in shown:
        height = masses[:, CLASSES.index(name)]
        panel.bar(positions, height, 1.0, bottom, color=CLASS_COLORS[name], linewidth=0)
        bottom += height

    for edge in range(BINS, len(positions), BINS):
        panel.axvline(edge - 0.5, color=DARK, lw=0.8)

    panel.set(xlim=(-0.5, len(positions) - 0.5), ylim=(0, 1), yticks=[0, 0.5, 1])
    centers = np.arange(len(SPANS)) * BINS + (BINS - 1) / 2
    panel.set_xticks(centers, SPANS, fontsize=8)
    panel.tick_params(axis="x", length=0)


def _masses_by_position(result: ShiftResult) -> np.ndarray:
    """Returns f64[L,spans x BINS,C], the mean over the samples that have a query there."""
    first = GROUPS.index(f"{SPANS[0]}-0")
    masses = result.measurement.masses[result.used][:, :, first:].astype(np.float64)

    # The masses of a group sum to 1, or to 0 where the sample has no query in it.
    has_query = (masses.sum(-1, keepdims=True) > 0.5).astype(np.float64)
    return (masses * has_query).sum(0) / np.maximum(has_query.sum(0), 1)


def plot_router(results: Sequence[ShiftResult]) -> figure.Figure | None:
    """Returns the router's weights by layer and kind of query; None where no model has a router."""
    if all(result.measurement.gates is None for result in results):
        return None

    page, panels = _subplots(1, len(KINDS), width=4.2, height=3.4)
    for kind_index, (panel, kind) in enumerate(zip(panels[0], KINDS, strict=True)):
        panel.axhline(0.5, color=LIGHT, lw=1)
        for model_index, result in enumerate(results):
            gates = result.measurement.gates
            if gates is not None:
                learner_index = result.learners.index("visual")
                # [n, L, 2, M] -> [n, L]
                gates = gates[result.used][:, :, kind_index, learner_index]
                _plot_mean(panel, gates, model_index, result.name)
        panel.set_title(f"{kind} tokens")
        panel.set_ylim(0, 1)
        _format_layer_axis(panel)

    panels[0][0].set_ylabel("weight of the visual learner")
    _add_legend(page, panels[0][0])
    note = "weight of the textual learner: 1 - weight of the visual one"
    band = "band: 95 % interval of the mean"
    return _with_note(page, f"{results[0].variant.without_rows}; {note}; {band}")


def plot_norms(results: Sequence[ShiftResult]) -> figure.Figure | None:
    """Returns the learners' norm by layer, relative to main attention; None without learners."""
    used_learners = {name for result in results for name in result.learners}
    learners = [learner for learner in ("visual", "textual") if learner in used_learners]
    if not learners:
        return None

    page, panels = _subplots(len(learners), len(KINDS), width=4.2, height=3.0)
    for panel_row, learner in zip(panels, learners, strict=True):
        for kind_index, (panel, kind) in enumerate(zip(panel_row, KINDS, strict=True)):
            for model_index, result in enumerate(results):
                if learner in result.learners:
                    learner_index = result.learners.index(learner)
                    # [n, L, 2, M] -> [n, L]
                    norms = result.measurement.norms[result.used][:, :, kind_index, learner_index]
                    _plot_mean(panel, norms, model_index, result.name)
            panel.set_title(f"{learner} learner, {kind} tokens")
            _format_layer_axis(panel)

        # Both kinds of tokens on the same scale.
        top = max(panel.get_ylim()[1] for panel in panel_row)
        for panel in panel_row:
            panel.set_ylim(0, top)
        panel_row[0].set_ylabel("|learner| / |main attention|")

    _add_legend(page, *panels[:, 0])
    note = "norm of what is added to the residual stream, router applied"
    band = "band: 95 % interval of the mean"
    return _with_note(page, f"{results[0].variant.without_rows}; {note}; {band}")


def _subplots(
    rows: int, columns: int, *, width: float, height: float
) -> tuple[figure.Figure, np.ndarray]:
    """Returns a figure and its panels [rows,columns] of this size in inches."""
    size = (width * columns + 0.4, height * rows + 0.9)
    page = figure.Figure(figsize=size, layout="constrained")
    panels = page.subplots(rows, columns, squeeze=False)
    for panel in panels.ravel():
        panel.spines[["top", "right"]].set_visible(False)
    return page, panels


def _format_layer_axis(panel: mpl_axes.Axes) -> None:
    panel.set_xlabel("layer")
    panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=8))
    panel.grid(axis="y", color=LIGHT, lw=0.6)


def _add_legend(page: figure.Figure, *panels: mpl_axes.Axes) -> None:
    """Adds one legend above the panels with every label once."""
    # One handle for each label: all panels show the same models.
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)

    columns = min(3, len(handles))
    page.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=columns,
        frameon=False,
    )


def _with_note(page: figure.Figure, note: str) -> figure.Figure:
    """Returns the page with a small note under its panels."""
    page.supxlabel(note, fontsize=8, color=MEDIUM)
    return page
