"""Results and plots of the analysis."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest

from wings_jax.analysis import laws, plots, results
from wings_jax.analysis.probes import Variant
from wings_jax.analysis.slot_classes import CLASSES, GROUPS
from wings_jax.data import samples

BEFORE, AFTER = CLASSES.index("before"), CLASSES.index("after")


def make_result(name: str, masses: np.ndarray, **changes) -> results.ShiftResult:
    """Returns a result with these curves f32[n,L,C] for every group."""
    count, layers = masses.shape[:2]
    reading = laws.Measurement(
        masses=np.repeat(masses[:, :, None], len(GROUPS), 2),
        head_masses=np.repeat(np.repeat(masses[:, :, None, None], 2, 2), 3, 3),
        gates=None,
        norms=np.zeros((count, layers, 2, 0)),
    )
    tally = samples.Tally(seen=count)
    values = {"origin": name, "step": 1, "variant": Variant(), "learners": (), **changes}
    return results.ShiftResult(
        name=name, ids=[str(i) for i in range(count)], measurement=reading, tally=tally, **values
    )


def test_flat_curves_are_counted_and_skipped():
    rng = np.random.default_rng(0)
    masses = rng.dirichlet(np.ones(5), (4, 6)).astype(np.float32)
    masses[2, :, AFTER] = 0.25
    result = make_result("some", masses)
    (actual,) = results.summary([result])["models"]
    assert (actual["n_used"], actual["n_skipped"]) == (3, 1)
    assert actual["skipped"][results.FLAT] == {"count": 1, "first": ["2: no correlation"]}
    expected = [1 - np.corrcoef(m[:, BEFORE], m[:, AFTER])[0, 1] for m in masses[[0, 1, 3]]]
    assert actual["shift"]["mean"] == pytest.approx(np.mean(expected), abs=1e-5)
    lines = [json.loads(line) for line in results.json_lines([result]).splitlines()]
    assert [line["shift"] is None for line in lines] == [False, False, True, False]
    assert all(line["variant"]["rows"] == "all" for line in lines)


def test_router_and_norms_are_means_over_used_probes():
    masses = np.random.default_rng(0).dirichlet(np.ones(5), (3, 4)).astype(np.float32)
    masses[1, :, AFTER] = 0.25  # flat, so it is skipped
    result = make_result("some", masses, learners=("visual", "textual"))
    values = np.array([1.0, 100.0, 3.0])[:, None, None, None] * np.ones((3, 4, 2, 2))
    reading = dataclasses.replace(result.measurement, gates=values, norms=values)
    (actual,) = results.summary([dataclasses.replace(result, measurement=reading)])["models"]
    assert actual["n_used"] == 2
    for name in ("router", "norm_ratio"):
        assert actual[name]["textual"]["text"] == [2.0] * 4


def test_interval_of_one_probe_is_null():
    masses = np.random.default_rng(0).dirichlet(np.ones(5), (1, 4)).astype(np.float32)
    result = make_result("some", masses)
    (actual,) = results.summary([result])["models"]
    assert actual["shift"]["mean"] is not None
    assert actual["shift"]["interval95"] == [None, None]
    assert "nan" not in results.text_table([result])
    point = plots.ShiftPoint("some", result.shift, (50.0, 40.0, 60.0))
    for page in (plots.plot_curves([result]), plots.plot_scatter([point], "score", result.variant)):
        page.savefig(io.BytesIO())


def test_scatter_of_one_and_three_points():
    for count in (1, 3):
        points = [
            plots.ShiftPoint(
                str(i), (0.1 * i, 0.1 * i - 0.05, 0.1 * i + 0.05), (9.0 - i, 8 - i, 10 - i)
            )
            for i in range(count)
        ]
        page = plots.plot_scatter(points, "text", Variant())
        title = page.axes[0].get_title()
        assert ("Spearman -1.00" in title) == (count == 3)
