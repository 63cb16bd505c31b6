"""Scores of a benchmark with intervals, from the credits of its items. Pure functions.

Intervals are percentile bootstraps with a fixed seed, and Wilson's where no item differs. Items of
one cluster (questions about one article or image) are drawn together, since they are not
independent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wings_jax import formatting
from wings_jax.evaluation.benchmarks import metrics
from wings_jax.evaluation.benchmarks.passes import PERPLEXITY
from wings_jax.evaluation.benchmarks.record import Benchmark, Item, MetricValue
from wings_jax.evaluation.benchmarks.text_likelihood import TextLikelihood
from wings_jax.evaluation.scoring import Score
from wings_jax.formatting import Interval

RESAMPLES, SEED = 1000, 0  # of the bootstrap
STEP = 50  # resamples that are drawn at a time
ACCURACY = "accuracy"


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean credit with its interval."""

    # Mean, NaN without items.
    value: float
    # 95 % interval, None for fewer than two items or clusters.
    interval: Interval | None
    # How many items.
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as they are written to JSON."""
        return {
            "value": formatting.round_for_json(self.value),
            "interval95": formatting.round_interval(self.interval),
            "n": self.count,
        }


@dataclasses.dataclass(frozen=True)
class ProtocolScore:
    """The scores of one benchmark under one protocol."""

    # Mean over items.
    micro: Mean
    # Mean of the groups' means; None without groups.
    macro: Mean | None
    # Group -> mean, in the order of the items.
    groups: Mapping[str, Mean]
    # Numbers of the benchmark's own metric; () if it is accuracy.
    metrics: Sequence[MetricValue]
    # Whether the means are shares, which tables have in %; a perplexity is none.
    is_share: bool = True

    def headline(self, benchmark: Benchmark) -> Mean:
        """Returns the number that stands for the benchmark, 0 to 1; the perplexity of a text.

        It is the first of its own metric, or else the benchmark's macro or micro mean.
        """
        if self.metrics and self.is_share:
            first = self.metrics[0]
            return Mean(first.value / first.scale, None, first.count)
        return self.macro if benchmark.average == "macro" and self.macro else self.micro

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as they are written to JSON."""
        return {
            "micro": self.micro.to_dict(),
            "macro": self.macro.to_dict() if self.macro else None,
            "groups": {name: mean.to_dict() for name, mean in self.groups.items()},
            "metrics": [
                {**dataclasses.asdict(value), "value": formatting.round_for_json(value.value)}
                for value in self.metrics
            ],
        }


def score_protocols(
    benchmark: Benchmark, items: Sequence[Item], lines: Sequence[Mapping[str, Any]]
) -> dict[str, ProtocolScore]:
    """Returns protocol -> scores, of the result line of every item.

    Items whose answers are withheld do not count; a protocol without any scored item is left out.
    """
    scores = {}
    protocols = lines[0]["credit"] if lines else {}
    for protocol in protocols:
        credits = [line["credit"][protocol] for line in lines]
        scored = [
            (item, float(credit))
            for item, credit in zip(items, credits, strict=True)
            if credit is not None
        ]

        if scored:
            kept, values = zip(*scored, strict=True)
            scores[protocol] = score_credits(benchmark, kept, np.array(values))

    # A text has a likelihood in place of credits.
    if lines and PERPLEXITY in lines[0]:
        scores[PERPLEXITY] = score_text(lines)
    return scores


def score_text(lines: Sequence[Mapping[str, Any]]) -> ProtocolScore:
    """Returns the perplexity of all passages, with its interval, and bits per byte."""
    likelihood = TextLikelihood.from_lines(lines)
    perplexity = Mean(likelihood.perplexity, likelihood.interval, len(lines))
    bits = MetricValue("bits per byte", likelihood.bits_per_byte, 0.0, len(lines))
    return ProtocolScore(perplexity, None, {}, [bits], is_share=False)


def score_credits(
    benchmark: Benchmark, items: Sequence[Item], credits: np.ndarray
) -> ProtocolScore:
    """Returns the scores of credits f64[n]."""
    # An item without a cluster is a cluster of its own.
    clusters = [item.cluster or f"\0{index}" for index, item in enumerate(items)]
    groups = group_members(benchmark, items)

    # Each group has draws of its own, so that they can be averaged.
    means, draws = {}, []
    for number, (name, members) in enumerate(groups.items()):
        cluster_names = [clusters[i] for i in members]
        resampled = resample_means(credits[members], cluster_names, seed=SEED + number)
        interval = mean_interval(credits[members], cluster_names, resampled)
        means[name] = Mean(float(credits[members].mean()), interval, len(members))
        draws.append(resampled if resampled is not None else np.full(RESAMPLES, means[name].value))

    # The macro mean gives every group the same weight, whatever its size; rows are no partition.
    macro = None
    if len(groups) > 1 and not benchmark.rows:
        macro_draws = np.mean(draws, axis=0)
        macro_value = float(np.mean([mean.value for mean in means.values()]))
        macro_interval = mean_interval(credits, clusters, macro_draws)
        # A group in which no item differs has draws without spread.
        if any(np.ptp(one) == 0 for one in draws) and credits.min() != credits.max():
            macro_interval = combine_intervals(list(means.values()))
        macro = Mean(macro_value, macro_interval, len(items))

    micro_draws = resample_means(credits, clusters, seed=SEED)
    micro_interval = mean_interval(credits, clusters, micro_draws)
    micro = Mean(float(credits.mean()), micro_interval, len(items))

    own = (
        []
        if benchmark.metric == ACCURACY
        else metrics.METRICS[benchmark.metric](items, credits.tolist())
    )

    return ProtocolScore(micro, macro, means if len(groups) > 1 else {}, own)


def group_members(benchmark: Benchmark, items: Sequence[Item]) -> dict[str, list[int]]:
    """Returns group -> positions of its items, in the order of reports."""
    # Rows have an order of their own; a row without items is left out.
    groups: dict[str, list[int]] = {row: [] for row in benchmark.rows}
    for index, item in enumerate(items):
        for name in item.rows or (item.group,):
            groups.setdefault(name, []).append(index)
    return {name: members for name, members in groups.items() if members}


def resample_means(values: np.ndarray, clusters: Sequence[str], *, seed: int) -> np.ndarray | None:
    """Returns f64[RESAMPLES], means of resampled clusters; None for fewer than two clusters."""
    _, cluster_of = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    count = int(cluster_of.max()) + 1 if len(values) else 0
    if count < 2:
        return None

    # A mean is the ratio of two sums over clusters, drawn together.
    sums = np.bincount(cluster_of, weights=values, minlength=count)
    sizes = np.bincount(cluster_of, minlength=count)

    random = np.random.default_rng(seed)
    # [STEP, clusters] drawn clusters -> [STEP] means, in several steps to save memory.
    means = []
    for _ in range(RESAMPLES // STEP):
        drawn = random.integers(0, count, (STEP, count))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return np.concatenate(means)


def mean_interval(
    credits: np.ndarray, clusters: Sequence[str], draws: np.ndarray | None
) -> Interval | None:
    """Returns the 95 % interval of the mean of credits f64[n]: that of its resampled values.

    Where all items are right, or all wrong, every resampled mean is the same: the interval is then
    Wilson's, of as many trials as there are clusters.
    """
    if draws is None or credits.min() != credits.max() or credits[0] not in (0.0, 1.0):
        return percentile_interval(draws)
    count = len(set(clusters))
    return Score(count * int(credits[0]), count).interval


def combine_intervals(means: Sequence[Mean]) -> Interval:
    """Returns the 95 % interval of the mean of independent means, from their own intervals.

    The distances of their ends add up as variances do (MOVER, Zou and Donner 2008). A mean without
    an interval, of one cluster, may be anything.

    >>> one, other = Mean(0.0, (0.0, 0.6), 2), Mean(1.0, (0.2, 1.0), 2)
    >>> low, high = combine_intervals([one, other])
    >>> round(low, 3), round(high, 3)
    (0.1, 0.8)
    """
    middle = float(np.mean([mean.value for mean in means]))
    ends = np.array([mean.interval or (0.0, 1.0) for mean in means])
    values = np.array([[mean.value] for mean in means])
    below, above = np.sqrt(((ends - values) ** 2).sum(0)) / len(means)
    return max(middle - float(below), 0.0), min(middle + float(above), 1.0)


def change_interval(
    changes: np.ndarray, clusters: Sequence[str], draws: np.ndarray | None
) -> Interval | None:
    """Returns the 95 % interval of the mean of paired differences f64[n] of credits.

    Where all of them are the same, so is every resampled mean: the interval then ends where
    Wilson's says how many other differences may have been missed.
    """
    if draws is None or changes.min() != changes.max():
        return percentile_interval(draws)
    missed = Score(0, len(set(clusters))).interval[1]
    change = float(changes[0])
    return max(change - missed, -1.0), min(change + missed, 1.0)


def percentile_interval(draws: np.ndarray | None) -> Interval | None:
    """Returns the 95 % percentile interval of resampled values."""
    if draws is None:
        return None
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def format_mean(mean: Mean) -> str:
    """Returns a mean in % with its interval.

    >>> format_mean(Mean(0.5, (0.4, 0.6), 10)), format_mean(Mean(math.nan, None, 0))
    ('50.0 [40.0, 60.0]', '-')
    """
    if math.isnan(mean.value):
        return "-"
    return formatting.format_estimate(mean.value, mean.interval, scale=100)
