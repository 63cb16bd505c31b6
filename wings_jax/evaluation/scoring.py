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


def is_right(answer: str, truth: str) -> bool:
    """Returns whether an answer is exactly the true one, white space around it aside."""
    return answer.strip() == truth.strip()


def count(task: Task, questions: Sequence[Question], answers: Iterable[str]) -> Mapping[str, Score]:
    """Returns row -> score, for the rows of the task that have questions, in its order."""
    right, total = dict.fromkeys(task.rows, 0), dict.fromkeys(task.rows, 0)
    for question, answer in zip(questions, answers, strict=True):
        for label in question.labels:
            total[label] += 1
            right[label] += is_right(answer, question.truth)
    return {row: Score(right[row], total[row]) for row in task.rows if total[row]}
