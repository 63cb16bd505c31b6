"""Right or wrong, counted, with the interval that the count leaves open."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from wings_jax.evaluation.tasks import Question, Task

Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclasses.dataclass(frozen=True)
class Score:
    """So many right answers of so many."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """Returns the share of right answers."""
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Returns the 95 % interval of the accuracy (Wilson 1927, without continuity correction).

        Unlike the textbook p +- 2 sd it stays within [0, 1] and has a width where all are right.
        """
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.accuracy
        centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclasses.dataclass(frozen=True)
class Paired:
    """The same questions answered twice: right both times, before only, after only, never."""

    both: int
    lost: int
    gained: int
    neither: int

    @property
    def total(self) -> int:
        """Returns the number of questions."""
        return self.both + self.lost + self.gained + self.neither

    @property
    def before(self) -> Score:
        """Returns the first score."""
        return Score(self.both + self.lost, self.total)

    @property
    def after(self) -> Score:
        """Returns the second score."""
        return Score(self.both + self.gained, self.total)

    @property
    def change(self) -> float:
        """Returns how much the accuracy rose; below 0 something was forgotten."""
        return self.after.accuracy - self.before.accuracy

    @property
    def interval(self) -> tuple[float, float]:
        """Returns the 95 % interval of the change (Newcombe 1998, paired proportions, method 10).

        It joins the Wilson intervals of both scores, and takes account of their correlation.
        """
        (low, high), (low_before, high_before) = self.after.interval, self.before.interval
        after, before, phi = self.after.accuracy, self.before.accuracy, self._correlation()
        below = _joined(after - low, high_before - before, phi)
        above = _joined(high - after, before - low_before, phi)
        return max(-1.0, self.change - below), min(1.0, self.change + above)

    def _correlation(self) -> float:
        """Returns phi of the 2 x 2 table, with a continuity correction where it is positive."""
        a, b, c, d = self.both, self.lost, self.gained, self.neither
        sides = (a + b) * (c + d) * (a + c) * (b + d)
        excess = a * d - b * c
        if not sides:
            return 0.0
        return (max(excess - self.total / 2, 0) if excess > 0 else excess) / math.sqrt(sides)


def _joined(left: float, right: float, phi: float) -> float:
    return math.sqrt(max(0.0, left**2 - 2 * phi * left * right + right**2))


def is_right(answer: str, truth: str) -> bool:
    """Returns whether an answer is exactly the true one, white space around it aside."""
    return answer.strip() == truth.strip()


def score_answers(
    task: Task, questions: Sequence[Question], answers: Iterable[str]
) -> Mapping[str, Score]:
    """Returns row -> score, for the rows of the task that have questions, in its order."""
    right, total = dict.fromkeys(task.rows, 0), dict.fromkeys(task.rows, 0)
    for question, answer in zip(questions, answers, strict=True):
        for label in question.labels:
            total[label] += 1
            right[label] += is_right(answer, question.truth)
    return {row: Score(right[row], total[row]) for row in task.rows if total[row]}


def score_pairs(
    task: Task, questions: Sequence[Question], before: Sequence[str], after: Sequence[str]
) -> Mapping[str, Paired]:
    """Returns row -> both answers compared, for the rows that have questions."""
    counts = {row: [0, 0, 0, 0] for row in task.rows}
    for question, first, second in zip(questions, before, after, strict=True):
        was, now = (is_right(answer, question.truth) for answer in (first, second))
        for label in question.labels:
            counts[label][2 * (not was) + (not now)] += 1
    return {row: Paired(*found) for row, found in counts.items() if sum(found)}
