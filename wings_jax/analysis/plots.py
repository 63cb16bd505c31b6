"""The plots of the paper's figures 2b, 2c and 7, and what the wings do by layer.

Every function returns a matplotlib figure; each says below the axes which variant it shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure, patches, ticker
from scipy import stats

from wings_jax.analysis import laws
from wings_jax.analysis.probes import BINS, CLASSES, GROUPS, KINDS, SPANS
from wings_jax.analysis.results import ShiftResult

COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#57606a", "#bf3989", "#9a6700", "#0e8a8a")
MARKERS = "osD^vPX*"
SHARES = {
    "excluded": "#d8dee4",
    "before": "#f2c230",
    "image": "#d1383d",
    "between": "#8c959f",
    "after": "#2f9e55",
}
RHO = r"$\rho$"
INK, FAINT = "#24292f", "#d0d7de"
COLUMNS = 8  # of small multiples, at most


@dataclasses.dataclass(frozen=True)
class ShiftPoint:
    """A checkpoint in figure 2c: its attention shift and its score on text, each with ends."""

    name: str
    shift: tuple[float, float, float]
    score: tuple[float, float, float]


def curves(results: Sequence[ShiftResult]) -> figure.Figure:
    """Returns figure 2b: attention on before, image and after by layer, a line per model."""
    page, panels = _page(1, 3, width=4.0, height=3.6)
    titles = {"before": "before the image", "image": "the image", "after": "after the image"}
    for panel, (name, title) in zip(panels[0], titles.items(), strict=True):
        c = CLASSES.index(name)
        for number, result in enumerate(results):
            shift = result.shift[0]
            label = f"{result.name}   shift {shift:.2f}, {RHO} {1 - shift:+.2f}"
            _line(panel, result.curves()[result.used][..., c], number, label)
        panel.set_title(title)
        _over_layers(panel)
    _same_span(panels[0])
    panels[0][0].set_ylabel("share of attention")
    _legend(page, panels[0][0])
    note = f"band: 95 % interval of the mean; {RHO} between before and after, over layers"
    return _noted(page, f"{results[0].variant}; {note}")


def _same_span(panels: Sequence[mpl_axes.Axes]) -> None:
    """Gives all panels as long a piece of the y axis, so that slopes can be compared."""
    ends = np.array([panel.get_ylim() for panel in panels])
    half = np.ptp(ends, axis=1).max() / 2
    for panel, middle in zip(panels, ends.mean(1), strict=True):
        low = max(0.0, middle - half)
        panel.set_ylim(low, low + 2 * half)


def _line(panel: mpl_axes.Axes, values: np.ndarray, number: int, label: str) -> None:
    """Draws the mean of curves [n,L] with its 95 % interval."""
    layers = np.arange(1, values.shape[1] + 1)
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    low, high = laws.interval(values)
    panel.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
    panel.plot(
        layers, values.mean(0), color=colour, marker=marker, markersize=4.5, lw=1.6, label=label
    )


def scatter(points: Sequence[ShiftPoint], score: str, variant: object) -> figure.Figure:
    """Returns figure 2c: a score on text against attention shift, a point per checkpoint."""
    page, panels = _page(1, 1, width=5.6, height=4.2)
    panel = panels[0][0]
    x, y = (np.array([getattr(point, of)[0] for point in points]) for of in ("shift", "score"))
    if len(points) > 2 and np.ptp(x) and np.ptp(y):
        ends = np.array([x.min(), x.max()])
        panel.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color=FAINT, lw=2, zorder=0)
        rank = stats.spearmanr(x, y).statistic
        panel.set_title(f"{len(points)} models, Spearman {rank:+.2f}, line: least squares")
    for number, point in enumerate(points):
        (a, a_low, a_high), (b, b_low, b_high) = point.shift, point.score
        panel.errorbar(
            a,
            b,
            xerr=[[a - a_low], [a_high - a]],
            yerr=[[b - b_low], [b_high - b]],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=7,
            lw=1,
            linestyle="",
            label=point.name,
        )
    panel.set_xlabel(f"attention shift (1 - {RHO})")
    panel.set_ylabel(f"right answers in %: {score}")
    panel.margins(0.12)
    panel.grid(color=FAINT, lw=0.6)
    page.legend(loc="outside right upper", frameon=False)
    return _noted(page, f"{variant}; bars: 95 % intervals")


def shares(result: ShiftResult) -> figure.Figure:
    """Returns figure 7: for each layer, whom the queries attend to, from first to last."""
    masses = _by_position(result)
    count = len(masses)
    columns = min(COLUMNS, count)
    page, panels = _page(-(-count // columns), columns, width=max(1.7, 8 / columns), height=1.9)
    shown = [name for name in SHARES if masses[..., CLASSES.index(name)].max() > 0]
    bars = np.arange(masses.shape[1])
    for layer, panel in enumerate(np.ravel(panels)):
        if layer >= count:
            panel.axis("off")
            continue
        floor = np.zeros(len(bars))
        for name in shown:
            height = masses[layer, :, CLASSES.index(name)]
            panel.bar(bars, height, 1.0, floor, color=SHARES[name], linewidth=0)
            floor += height
        for edge in range(BINS, len(bars), BINS):
            panel.axvline(edge - 0.5, color=INK, lw=0.8)
        panel.set(xlim=(-0.5, len(bars) - 0.5), ylim=(0, 1), yticks=[0, 0.5, 1])
        panel.set_title(f"layer {layer + 1}", fontsize=9)
        panel.set_xticks(np.arange(len(SPANS)) * BINS + (BINS - 1) / 2, SPANS, fontsize=8)
        panel.tick_params(axis="x", length=0)
        if layer % columns:
            panel.set_yticklabels([])
        if layer + columns < count:
            panel.set_xticklabels([])
    page.supylabel("share of attention on", fontsize=10, color=INK)
    page.supxlabel("where the query stands", fontsize=10, color=INK)
    handles = [patches.Patch(color=SHARES[name], label=name) for name in shown]
    title = f"{result.name}: mean over {result.used.sum()} samples; {result.variant.beside_rows}"
    page.legend(
        handles=handles,
        title=title,
        loc="outside upper center",
        ncols=len(shown),
        frameon=False,
    )
    return page


def _by_position(result: ShiftResult) -> np.ndarray:
    """Returns f64[L,spans x BINS,C], the mean over the samples that have a query there."""
    first = GROUPS.index(f"{SPANS[0]}-0")
    masses = result.reading.masses[result.used][:, :, first:].astype(np.float64)
    has_query = (masses.sum(-1, keepdims=True) > 0.5).astype(np.float64)
    return (masses * has_query).sum(0) / np.maximum(has_query.sum(0), 1)


def router(results: Sequence[ShiftResult]) -> figure.Figure | None:
    """Returns the router's weight by layer and kind of query; None where no model has a router."""
    routed = [(i, result) for i, result in enumerate(results) if result.reading.gates is not None]
    if not routed:
        return None
    page, panels = _page(1, len(KINDS), width=4.2, height=3.4)
    for k, (panel, kind) in enumerate(zip(panels[0], KINDS, strict=True)):
        panel.axhline(0.5, color=FAINT, lw=1)
        for number, result in routed:
            visual = result.reading.gates[result.used][:, :, k, result.learners.index("visual")]
            _line(panel, visual, number, result.name)
        panel.set_title(f"{kind} tokens")
        panel.set_ylim(0, 1)
        _over_layers(panel)
    panels[0][0].set_ylabel("weight of the visual learner")
    _legend(page, panels[0][0])
    note = "the textual learner has the rest; band: 95 % interval of the mean"
    return _noted(page, f"{results[0].variant.beside_rows}; {note}")


def norms(results: Sequence[ShiftResult]) -> figure.Figure | None:
    """Returns the learners' share of the stream by layer; None where no model has learners."""
    names = [n for n in ("visual", "textual") if any(n in result.learners for result in results)]
    if not names:
        return None
    page, panels = _page(len(names), len(KINDS), width=4.2, height=3.0)
    for row, name in zip(panels, names, strict=True):
        for k, (panel, kind) in enumerate(zip(row, KINDS, strict=True)):
            for number, result in enumerate(results):
                if name in result.learners:
                    m = result.learners.index(name)
                    _line(panel, result.reading.norms[result.used][:, :, k, m], number, result.name)
            panel.set_title(f"{name} learner, {kind} tokens")
            _over_layers(panel)
        top = max(panel.get_ylim()[1] for panel in row)
        for panel in row:
            panel.set_ylim(0, top)
        row[0].set_ylabel("|learner| / |main attention|")
    _legend(page, *panels[:, 0])
    note = "what is added to the residual stream, gates applied; band: 95 % interval of the mean"
    return _noted(page, f"{results[0].variant.beside_rows}; {note}")


def _page(rows: int, columns: int, *, width: float, height: float):
    size = (width * columns + 0.4, height * rows + 0.9)
    page = figure.Figure(figsize=size, layout="constrained")
    panels = page.subplots(rows, columns, squeeze=False)
    for panel in panels.ravel():
        panel.spines[["top", "right"]].set_visible(False)
    return page, panels


def _over_layers(panel: mpl_axes.Axes) -> None:
    panel.set_xlabel("layer")
    panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=8))
    panel.grid(axis="y", color=FAINT, lw=0.6)


def _legend(page: figure.Figure, *panels: mpl_axes.Axes) -> None:
    """Puts one legend of all lines of the panels above them."""
    found = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    columns = min(3, len(found))
    where = {"loc": "outside upper center", "ncols": columns, "frameon": False}
    page.legend(found.values(), found.keys(), **where)


def _noted(page: figure.Figure, note: str) -> figure.Figure:
    """Returns the page with a small note under its panels."""
    page.supxlabel(note, fontsize=8, color="#57606a")
    return page
