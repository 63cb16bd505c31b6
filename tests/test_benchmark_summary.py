"""Scores of benchmarks: intervals, and how many questions they are about."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from wings_jax.evaluation.benchmarks import paired, summary, tables
from wings_jax.evaluation.benchmarks.record import Item
from wings_jax.evaluation.benchmarks.records import BENCHMARKS
from wings_jax.evaluation.benchmarks.results import BenchmarkResult
from wings_jax.evaluation.interleaved import report


def credit_line(number: int, credit: float) -> dict:
    return {"id": str(number), "credit": {"ll": credit}}


def test_intervals_of_clusters_are_wider():
    random = np.random.default_rng(0)
    credits = np.repeat(random.integers(0, 2, 20), 10).astype(float)
    alone = [Item(str(n), "") for n in range(200)]
    together = [Item(str(n), "", cluster=str(n // 10)) for n in range(200)]
    widths = []
    for items in (alone, together):
        low, high = summary.score_credits(BENCHMARKS["piqa"], items, credits).micro.interval
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_interval_where_no_item_differs_is_wilsons():
    items = [Item(str(n), "", cluster=str(n // 2)) for n in range(20)]
    micro = summary.score_credits(BENCHMARKS["piqa"], items, np.ones(20)).micro
    assert micro.interval == pytest.approx((0.7224672, 1.0), abs=1e-6)  # 10 of 10

    # The mean of groups too, which has one group for each answer here.
    grouped = [dataclasses.replace(item, group=f"g{item.id}") for item in items]
    macro = summary.score_credits(BENCHMARKS["mmlu"], grouped, np.ones(20)).macro
    assert macro.interval == pytest.approx((0.7224672, 1.0), abs=1e-6)
    lines = [
        {"id": f"{n:05}-mmlu:test:{n}/T", "credit": {"ll": 1.0}, "cluster": item.cluster}
        for n, item in enumerate(items)
    ]
    mean = report.mean_by(lines, "ll", report.source_of)["mmlu"]
    assert mean.interval == pytest.approx((0.7224672, 1.0), abs=1e-6)


def test_interval_of_groups_that_are_all_right_or_all_wrong_is_not_a_point():
    """The items of a group are alike, so that every resampled mean of the groups is the same."""
    items = [Item(str(n), "", group=f"g{n // 2}") for n in range(4)]
    macro = summary.score_credits(BENCHMARKS["mmlu"], items, np.array([0.0, 0.0, 1.0, 1.0])).macro
    width = 0.657620 / 2  # Wilson's of 0 of 2, of one of two groups
    assert macro.interval == pytest.approx((0.5 - width, 0.5 + width), abs=1e-5)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (0, 0), (1, 0), (0, 1)])
def test_interval_of_a_change_that_all_items_share_is_not_a_point(before, after):
    """Ten items of which none differs do not prove that none of all items does."""
    lines = [[credit_line(n, credit) for n in range(10)] for credit in (before, after)]
    (change,) = paired.compare_lines("mmlu", *lines)
    assert change.change == after - before
    bounds = (after - before - 0.2775328, after - before + 0.2775328)  # Wilson's, of 0 of 10
    assert change.interval == pytest.approx(np.clip(bounds, -1, 1), abs=1e-6)


def test_rows_of_a_metric_have_their_own_number():
    """HallusionBench: 3 questions about 2 figures; MMBench: 2 questions with 5 rotations."""
    keys = [("0", "1", "0"), ("0", "1", "1"), ("0", "2", "0")]
    names = ("set_id", "figure_id", "question_id")
    items = [
        Item(str(n), "", ("Yes", "No"), 0, "VD", extra=dict(zip(names, key, strict=True)))
        for n, key in enumerate(keys)
    ]
    scores = summary.score_credits(BENCHMARKS["hallusionbench"], items, np.array([1.0, 0.0, 1.0]))
    assert [(one.name, one.count) for one in scores.metrics] == [
        ("aAcc", 3),
        ("fAcc", 2),
        ("qAcc", 2),
        ("mean", 3),
    ]

    items = [Item(str(n), "", cluster=c, extra={"circular": c}) for n, c in enumerate("aaabb")]
    scores = summary.score_credits(BENCHMARKS["mmbench_en"], items, np.ones(5))
    result = BenchmarkResult(
        "m", BENCHMARKS["mmbench_en"], {}, [], {"generate": scores}, 0.0, "", None
    )
    rows = tables.score_cells({"mmbench_en": [result]})[1:]
    assert [row[1] for row in rows] == ["5", "2", "2"]
