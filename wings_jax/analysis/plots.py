"""The plots of the paper's figures 2b, 2c and 7, and of the router and the learners by layer.

Every function returns a matplotlib figure; a note below its axes names the variant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import patches, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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


def plot_curves(results: Sequence[ShiftResult]) -> Figure:
    """Returns figure 2b: attention on before, image and after by layer, a line per model."""
    figure, axes_grid = _subplots(1, 3, width=4.0, height=3.6)
    titles = {"before": "before the image", "image": "the image", "after": "after the image"}

    for axes, (class_name, title) in zip(axes_grid[0], titles.items(), strict=True):
        class_index = CLASSES.index(class_name)
        for model_index, result in enumerate(results):
            shift = result.shift[0]
            label = f"{result.name}   shift {shift:.2f}, {RHO} {1 - shift:+.2f}"
            # [n, L, C] -> [n, L]
            curves = result.curves()[result.used][..., class_index]
            _plot_mean(axes, curves, model_index, label)
        axes.set_title(title)
        _format_layer_axis(axes)

    _equalize_ranges(axes_grid[0])
    axes_grid[0][0].set_ylabel("share of attention")
    _add_legend(figure, axes_grid[0][0])
    note = f"band: 95 % interval of the mean; {RHO} between before and after, over layers"
    return _with_note(figure, f"{results[0].variant}; {note}")


def _equalize_ranges(axes_row: Sequence[Axes]) -> None:
    """Gives the y axes of all panels the same length, so that slopes can be compared."""
    limits = np.array([axes.get_ylim() for axes in axes_row])
    half_range = np.ptp(limits, axis=1).max() / 2
    for axes, center in zip(axes_row, limits.mean(1), strict=True):
        # Shares are not negative.
        low = max(0.0, center - half_range)
        axes.set_ylim(low, low + 2 * half_range)


def _plot_mean(axes: Axes, values: np.ndarray, model_index: int, label: str) -> None:
    """Draws the mean of curves [n,L] with its 95 % interval, in the color of a model."""
    layers = np.arange(1, values.shape[1] + 1)
    color, marker = COLORS[model_index % len(COLORS)], MARKERS[model_index % len(MARKERS)]
    low, high = laws.mean_interval(values)

    axes.fill_between(layers, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(
        layers, values.mean(0), color=color, marker=marker, markersize=4.5, lw=1.6, label=label
    )


def plot_scatter(points: Sequence[ShiftPoint], score: str, variant: object) -> Figure:
    """Returns figure 2c: a score on text against attention shift, a point per checkpoint."""
    figure, axes_grid = _subplots(1, 1, width=5.6, height=4.2)
    axes = axes_grid[0][0]

    _plot_trend(axes, points)
    for model_index, point in enumerate(points):
        shift, shift_low, shift_high = point.shift
        accuracy, accuracy_low, accuracy_high = point.score
        # Error bars are lengths from the point, not the ends of the interval.
        axes.errorbar(
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

    axes.set_xlabel(f"attention shift (1 - {RHO})")
    axes.set_ylabel(f"accuracy in %: {score}")
    axes.margins(0.12)
    axes.grid(color=LIGHT, lw=0.6)
    figure.legend(loc="outside right upper", frameon=False)
    return _with_note(figure, f"{variant}; bars: 95 % intervals")


def _plot_trend(axes: Axes, points: Sequence[ShiftPoint]) -> None:
    """Draws the least-squares line with the rank correlation, for three points or more."""
    shifts = np.array([point.shift[0] for point in points])
    accuracies = np.array([point.score[0] for point in points])
    if len(points) < 3 or not np.ptp(shifts) or not np.ptp(accuracies):
        return

    ends = np.array([shifts.min(), shifts.max()])
    line = np.polyfit(shifts, accuracies, 1)
    axes.plot(ends, np.polyval(line, ends), color=LIGHT, lw=2, zorder=0)

    rank = stats.spearmanr(shifts, accuracies).statistic
    axes.set_title(f"{len(points)} models, Spearman {rank:+.2f}, line: least squares")


def plot_shares(result: ShiftResult) -> Figure:
    """Returns figure 7: for each layer, the attention on each class by position of the query."""
    masses = _masses_by_position(result)
    num_layers = len(masses)
    columns = min(MAX_COLUMNS, num_layers)
    rows = -(-num_layers // columns)
    figure, axes_grid = _subplots(rows, columns, width=max(1.7, 8 / columns), height=1.9)
    # "excluded" and "between" appear only where the variant and the samples have them.
    shown = [
        class_name
        for class_name in CLASS_COLORS
        if masses[..., CLASSES.index(class_name)].max() > 0
    ]

    for layer, axes in enumerate(np.ravel(axes_grid)):
        if layer >= num_layers:
            axes.axis("off")
            continue
        _plot_stacked_bars(axes, masses[layer], shown)
        axes.set_title(f"layer {layer + 1}", fontsize=9)
        # Tick labels at the left and at the bottom of the figure only.
        if layer % columns:
            axes.set_yticklabels([])
        if layer + columns < num_layers:
            axes.set_xticklabels([])

    figure.supylabel("share of attention on", fontsize=10, color=DARK)
    figure.supxlabel("position of the query", fontsize=10, color=DARK)
    num_samples = int(result.used.sum())
    title = f"{result.name}: mean over {num_samples} samples; {result.variant.without_rows}"
    figure.legend(
        handles=[
            patches.Patch(color=CLASS_COLORS[class_name], label=class_name) for class_name in shown
        ],
        title=title,
        loc="outside upper center",
        ncols=len(shown),
        frameon=False,
    )
    return figure


def _plot_stacked_bars(axes: Axes, masses: np.ndarray, shown: Sequence[str]) -> None:
    """Draws one bar per position of f64[positions,C], stacked by class, with lines at spans."""
    # Bars without gaps: each starts where the one of the class before ends.
    positions = np.arange(len(masses))
    bottom = np.zeros(len(masses))
    for class_name in shown:
        height = masses[:, CLASSES.index(class_name)]
        axes.bar(positions, height, 1.0, bottom, color=CLASS_COLORS[class_name], linewidth=0)
        bottom += height

    for edge in range(BINS, len(positions), BINS):
        axes.axvline(edge - 0.5, color=DARK, lw=0.8)

    # One tick in the middle of each span.
    axes.set(xlim=(-0.5, len(positions) - 0.5), ylim=(0, 1), yticks=[0, 0.5, 1])
    centers = np.arange(len(SPANS)) * BINS + (BINS - 1) / 2
    axes.set_xticks(centers, SPANS, fontsize=8)
    axes.tick_params(axis="x", length=0)


def _masses_by_position(result: ShiftResult) -> np.ndarray:
    """Returns f64[L,spans x BINS,C], the mean over the samples that have a query there."""
    first = GROUPS.index(f"{SPANS[0]}-0")
    masses = result.measurement.masses[result.used][:, :, first:].astype(np.float64)

    # The masses of a group sum to 1, or to 0 where the sample has no query in it.
    has_query = (masses.sum(-1, keepdims=True) > 0.5).astype(np.float64)
    return (masses * has_query).sum(0) / np.maximum(has_query.sum(0), 1)


def plot_router(results: Sequence[ShiftResult]) -> Figure | None:
    """Returns the router's weights by layer and kind of query; None where no model has a router."""
    if all(result.measurement.gates is None for result in results):
        return None

    figure, axes_grid = _subplots(1, len(KINDS), width=4.2, height=3.4)
    for kind_index, (axes, kind) in enumerate(zip(axes_grid[0], KINDS, strict=True)):
        axes.axhline(0.5, color=LIGHT, lw=1)
        for model_index, result in enumerate(results):
            gates = result.measurement.gates
            if gates is not None:
                learner_index = result.learners.index("visual")
                # [n, L, 2, M] -> [n, L]
                gates = gates[result.used][:, :, kind_index, learner_index]
                _plot_mean(axes, gates, model_index, result.name)
        axes.set_title(f"{kind} tokens")
        axes.set_ylim(0, 1)
        _format_layer_axis(axes)

    axes_grid[0][0].set_ylabel("weight of the visual learner")
    _add_legend(figure, axes_grid[0][0])
    note = "weight of the textual learner: 1 - weight of the visual one"
    band = "band: 95 % interval of the mean"
    return _with_note(figure, f"{results[0].variant.without_rows}; {note}; {band}")


def plot_norms(results: Sequence[ShiftResult]) -> Figure | None:
    """Returns the learners' norm by layer, relative to main attention; None without learners."""
    used_learners = {learner for result in results for learner in result.learners}
    learners = [learner for learner in ("visual", "textual") if learner in used_learners]
    if not learners:
        return None

    figure, axes_grid = _subplots(len(learners), len(KINDS), width=4.2, height=3.0)
    for axes_row, learner in zip(axes_grid, learners, strict=True):
        for kind_index, (axes, kind) in enumerate(zip(axes_row, KINDS, strict=True)):
            for model_index, result in enumerate(results):
                if learner in result.learners:
                    learner_index = result.learners.index(learner)
                    # [n, L, 2, M] -> [n, L]
                    norms = result.measurement.norms[result.used][:, :, kind_index, learner_index]
                    _plot_mean(axes, norms, model_index, result.name)
            axes.set_title(f"{learner} learner, {kind} tokens")
            _format_layer_axis(axes)

        # Both kinds of tokens on the same scale.
        top = max(axes.get_ylim()[1] for axes in axes_row)
        for axes in axes_row:
            axes.set_ylim(0, top)
        axes_row[0].set_ylabel("|learner| / |main attention|")

    _add_legend(figure, *axes_grid[:, 0])
    note = "norm of what is added to the residual stream, router applied"
    band = "band: 95 % interval of the mean"
    return _with_note(figure, f"{results[0].variant.without_rows}; {note}; {band}")


def _subplots(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Returns a figure and its axes [rows,columns] of this size in inches."""
    size = (width * columns + 0.4, height * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes_grid = figure.subplots(rows, columns, squeeze=False)
    for axes in axes_grid.ravel():
        axes.spines[["top", "right"]].set_visible(False)
    return figure, axes_grid


def _format_layer_axis(axes: Axes) -> None:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=8))
    axes.grid(axis="y", color=LIGHT, lw=0.6)


def _add_legend(figure: Figure, *all_axes: Axes) -> None:
    """Adds one legend above the axes with every label once."""
    # One handle for each label: all axes show the same models.
    handles: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)

    columns = min(3, len(handles))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=columns,
        frameon=False,
    )


def _with_note(figure: Figure, note: str) -> Figure:
    """Returns the figure with a small note under its axes."""
    figure.supxlabel(note, fontsize=8, color=MEDIUM)
    return figure
