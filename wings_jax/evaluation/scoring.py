"""Counts of right answers, and the 95 % intervals of accuracies and of their changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from wings_jax import formatting
from wings_jax.formatting import Interval

Z = 1.959963984540054  # quantile of the standard normal for a two-sided 95 % interval


@dataclasses.dataclass(frozen=True)
class Score:
    """The number of right answers among the questions of a row."""

    # Answers that are right.
    right: int
    # Questions of the row.
    total: int

    @property
    def accuracy(self) -> float:
        """Returns the share of right answers, NaN where there are no questions.

        >>> Score(right=8, total=10).accuracy
        0.8
        """
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> Interval:
        """Returns the 95 % interval of the accuracy (Wilson 1927, no continuity correction).

        Unlike the normal approximation it stays within [0, 1] and has a positive width where all
        answers are right.
        """
        if not self.total:
            return 0.0, 1.0

        from scipy import stats  # takes a second to import

        interval = stats.binomtest(self.right, self.total).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)


@dataclasses.dataclass(frozen=True)
class PairedScore:
    """Counts of questions that two models answered (or one model at two times)."""

    # Questions that are right both times.
    both: int
    # Questions that are right only before.
    lost: int
    # Questions that are right only after.
    gained: int
    # Questions that are wrong both times.
    neither: int

    @property
    def total(self) -> int:
        """Returns the number of questions."""
        return self.both + self.lost + self.gained + self.neither

    @property
    def before(self) -> Score:
        """Returns the first model's score."""
        return Score(self.both + self.lost, self.total)

    @property
    def after(self) -> Score:
        """Returns the second model's score."""
        return Score(self.both + self.gained, self.total)

    @property
    def change(self) -> float:
        """Returns the difference of the accuracies; negative where something was forgotten.

        >>> PairedScore(both=36, lost=2, gained=12, neither=0).change
        0.19999999999999996
        """
        return self.after.accuracy - self.before.accuracy

    @property
    def interval(self) -> Interval:
        """Returns the 95 % interval of the change (Newcombe 1998, paired proportions, method 10).

        It combines the Wilson intervals of both scores and their correlation. scipy has intervals
        of single proportions only.
        """
        low_before, high_before = self.before.interval
        low_after, high_after = self.after.interval
        before, after = self.before.accuracy, self.after.accuracy

        correlation = self._correlation()
        # The lower end is reached by a lower second and a higher first accuracy, and vice versa.
        below = _combined_width(after - low_after, high_before - before, correlation)
        above = _combined_width(high_after - after, before - low_before, correlation)
        return max(-1.0, self.change - below), min(1.0, self.change + above)

    def _correlation(self) -> float:
        """Returns phi of the 2 x 2 table, with a continuity correction where it is positive.

        scipy's phi (`stats.contingency.association`) has neither the sign nor this correction.
        """
        # Cells of the 2 x 2 table, row by row.
        a, b, c, d = self.both, self.lost, self.gained, self.neither
        margins = (a + b) * (c + d) * (a + c) * (b + d)
        if not margins:
            return 0.0

        # Determinant of the table: positive where the same questions tend to be right.
        excess: float = a * d - b * c
        if excess > 0:
            excess = max(excess - self.total / 2, 0)
        return excess / math.sqrt(margins)


def _combined_width(left: float, right: float, correlation: float) -> float:
    """Returns the distance from a difference to its end, from the distances of both terms."""
    return math.sqrt(max(0.0, left**2 - 2 * correlation * left * right + right**2))


def count_pairs(outcomes: Sequence[tuple[bool, bool]]) -> PairedScore:
    """Returns the paired score of (right before, right after) of every question.

    >>> count_pairs([(True, True), (True, False), (True, False)])
    PairedScore(both=1, lost=2, gained=0, neither=0)
    """
    return PairedScore(
        both=outcomes.count((True, True)),
        lost=outcomes.count((True, False)),
        gained=outcomes.count((False, True)),
        neither=outcomes.count((False, False)),
    )


def score_to_dict(score: Score) -> dict[str, Any]:
    """Returns a score as it is written to JSON."""
    return {
        "right": score.right,
        "total": score.total,
        "accuracy": formatting.round_for_json(score.accuracy),
        "interval95": formatting.round_interval(score.interval),
    }


def paired_to_dict(paired: PairedScore) -> dict[str, Any]:
    """Returns a change as it is written to JSON."""
    return {
        "before": formatting.round_for_json(paired.before.accuracy),
        "after": formatting.round_for_json(paired.after.accuracy),
        "change": formatting.round_for_json(paired.change),
        "interval95": formatting.round_interval(paired.interval),
        "lost": paired.lost,
        "gained": paired.gained,
        "total": paired.total,
    }


def format_score(score: Score) -> str:
    """Returns the accuracy in % and its interval.

    >>> format_score(Score(right=8, total=10))
    '80.0 [49.0, 94.3]'
    """
    return formatting.format_estimate(score.accuracy, score.interval, scale=100)


def format_change(paired: PairedScore) -> str:
    """Returns the change in points, with its interval.

    >>> format_change(PairedScore(both=36, lost=2, gained=12, neither=0))
    '+20.0 [+5.7, +34.0]'
    """
    return formatting.format_estimate(paired.change, paired.interval, scale=100, sign="+")
