"""Means of methods over seeds, their differences from the reference, and 95 % intervals."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Sequence

import numpy as np

from wings_jax.evaluation import scoring
from wings_jax.forgetting.methods import REFERENCE, Measure
from wings_jax.forgetting.results import RunScores, select_runs
from wings_jax.forgetting.settings import reading
from wings_jax.formatting import Interval


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval over seeds; over the questions if there is one seed."""

    # Mean over seeds, NaN where there is no run.
    mean: float
    # Lower end of the interval, NaN where it is not known.
    low: float
    # Upper end of the interval, NaN where it is not known.
    high: float
    # Number of seeds.
    runs: int
    # Interval of a difference over the questions, None where it is not known.
    questions: Interval | None = None


NO_ESTIMATE = Estimate(math.nan, math.nan, math.nan, 0)


def estimate_mean(runs: Sequence[RunScores], measure: Measure) -> Estimate:
    """Returns the mean over runs of different seeds, with its interval.

    The interval is Student's t over the seeds; of one seed it is the run's own interval over its
    questions.
    """
    runs = [run for run in runs if not math.isnan(run.value(measure))]
    if not runs:
        return NO_ESTIMATE

    values = [run.value(measure) for run in runs]
    if len(values) > 1:
        return mean_over_seeds(values)

    # A measure without an interval has null or two nulls.
    interval = runs[0].scores[measure.task][measure.row]["interval95"] or (None, None)
    low, high = (math.nan if end is None else end for end in interval)
    return Estimate(values[0], low, high, 1)


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Returns the mean of two values or more, with the 95 % interval of Student's t.

    >>> estimate = mean_over_seeds([0.4, 0.6])
    >>> round(estimate.low, 3), round(estimate.high, 3)
    (-0.771, 1.771)
    """
    from scipy import stats  # takes a second to import

    mean, count = statistics.mean(values), len(values)
    standard_error = statistics.stdev(values) / math.sqrt(count)
    half_width = float(stats.t.ppf(0.975, count - 1)) * standard_error
    return Estimate(mean, mean - half_width, mean + half_width, count)


def estimate_difference(
    runs: Sequence[RunScores], method: str, regime: str, measure: Measure
) -> Estimate:
    """Returns the mean difference of a method from the reference, paired by seed.

    One seed gives a difference without an interval over seeds.
    """
    references = {run.seed: run for run in select_runs(runs, REFERENCE, regime)}
    pairs = [
        (run, references[run.seed])
        for run in select_runs(runs, method, regime)
        if run.seed in references
    ]
    pairs = [
        (scored, reference)
        for scored, reference in pairs
        if not math.isnan(scored.value(measure) - reference.value(measure))
    ]
    if not pairs:
        return NO_ESTIMATE

    # Of the seeds that both methods have.
    differences = [run.value(measure) - reference.value(measure) for run, reference in pairs]
    if len(differences) > 1:
        over_seeds = mean_over_seeds(differences)
    else:
        over_seeds = Estimate(differences[0], math.nan, math.nan, 1)
    return dataclasses.replace(over_seeds, questions=interval_over_questions(pairs, measure))


def interval_over_questions(
    pairs: Sequence[tuple[RunScores, RunScores]], measure: Measure
) -> Interval | None:
    """Returns the 95 % interval of a mean difference over the questions, for these trainings.

    Questions of the same words and answer count together, as they are right or wrong together:
    with the sums s_g of the deviations from the mean in G groups of n questions,

        variance = G / (G - 1) * sum_g s_g^2 / n^2

    (cluster-robust, normal approximation; scipy has none). None where answers are missing or the
    questions of the runs differ.
    """
    graded = [
        [read_graded(run.directory, measure.task, measure.row) for run in pair] for pair in pairs
    ]
    questions = {answers and answers[0] for pair in graded for answers in pair}
    question_texts = questions.pop()
    if questions or not question_texts:  # not the same questions, or no answers
        return None

    # [runs, questions] -> [questions]
    by_run = [np.subtract(run[1], ref[1]) for run, ref in graded if run is not None and ref]
    by_question = np.mean(by_run, axis=0)
    mean = by_question.mean()

    # Sum of the deviations from the mean per group of equal questions.
    _, group_index = np.unique(question_texts, return_inverse=True)
    group_sums = np.bincount(group_index, by_question - mean)
    if len(group_sums) < 2:
        return None

    groups, count = len(group_sums), len(question_texts)
    variance = groups / (groups - 1) * (group_sums**2).sum() / count**2
    half_width = scoring.Z * math.sqrt(variance)
    return mean - half_width, mean + half_width


@functools.cache
def read_graded(
    directory: pathlib.Path | None, task: str, row: str
) -> tuple[tuple[str, ...], tuple[float, ...]] | None:
    """Returns a run's questions with the true answers in a row of a task, and 1.0 where right.

    None where the run has no file of answers.
    """
    paths = list((directory / "scores").glob("answers-*.jsonl")) if directory else []
    if len(paths) != 1:
        return None

    with reading(paths[0]):
        records = list(map(json.loads, paths[0].read_text(encoding="utf-8").splitlines()))
        # A question counts in several rows.
        chosen = [x for x in records if x["task"] == task and row in x.get("rows", ())]
        question_texts = tuple(f"{record['question']}\n{record['truth']}" for record in chosen)
        return question_texts, tuple(float(record["right"]) for record in chosen)
