"""Scores of a benchmark from the credits of its items, by the name in `Benchmark.metric`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from wings_jax.evaluation.benchmarks import extraction, ratings
from wings_jax.evaluation.benchmarks.record import Item, MetricValue

Metric = Callable[[Sequence[Item], Sequence[float]], list[MetricValue]]


def _mean(name: str, credits: Sequence[float]) -> MetricValue:
    return MetricValue(name, ratings.percent(credits) / 100, 1.0, len(credits))


def score_accuracy(items: Sequence[Item], credits: Sequence[float]) -> list[MetricValue]:
    """Returns the mean credit."""
    return [_mean("accuracy", credits)]


def score_vqa(items: Sequence[Item], credits: Sequence[float]) -> list[MetricValue]:
    """Returns the mean VQA accuracy."""
    return [_mean("VQA accuracy", credits)]


def score_with_image(items: Sequence[Item], credits: Sequence[float]) -> list[MetricValue]:
    """Returns the accuracy of all items, and of those that have an image (ScienceQA)."""
    with_image = [credit for item, credit in zip(items, credits, strict=True) if item.images]
    return [_mean("accuracy", credits), _mean("accuracy with image", with_image)]


def score_circular(items: Sequence[Item], credits: Sequence[float]) -> list[MetricValue]:
    """Returns MMBench's share of questions with every rotation right, and that of base rows."""
    groups = [item.extra["circular"] for item in items]
    scores = ratings.rate_circular(groups, _hits(credits))
    # `n` counts questions, not their rotations.
    count = len(set(groups))
    return [MetricValue(name, value / 100, 1.0, count) for name, value in scores.items()]


def score_mme(items: Sequence[Item], credits: Sequence[float]) -> list[MetricValue]:
    """Returns MME's perception (of 2000), reasoning (of 800), total, and sub-tasks (of 200)."""
    categories = [item.group for item in items]
    scores = ratings.rate_mme(categories, [item.cluster for item in items], _hits(credits))

    # A sub-task has accuracy and acc+ of 100 each; the sums have those of their sub-tasks.
    scales = {"perception": 2000.0, "reasoning": 800.0, "total": 2800.0}

    members = {
        "perception": ratings.MME_PERCEPTION,
        "reasoning": ratings.MME_REASONING,
        "total": (*ratings.MME_PERCEPTION, *ratings.MME_REASONING),
    }

    return [
        MetricValue(
            name,
            value,
            scales.get(name, 200.0),
            sum(category in members.get(name, (name,)) for category in categories),
        )
        for name, value in scores.items()
    ]


def score_hallusion(items: Sequence[Item], credits: Sequence[float]) -> list[MetricValue]:
    """Returns HallusionBench's aAcc, fAcc, qAcc and their mean."""
    keys = ("set_id", "figure_id", "question_id")
    set_ids, figure_ids, question_ids = ([item.extra[key] for item in items] for key in keys)

    groups = [item.group for item in items]
    scores = ratings.rate_hallusion(groups, set_ids, figure_ids, question_ids, _hits(credits))

    # `n` counts what each of them is a share of: questions, figures, questions over figures.
    keyed = list(zip(groups, set_ids, figure_ids, question_ids, strict=True))
    counts = {
        "fAcc": len({(group, own, figure) for group, own, figure, _ in keyed}),
        "qAcc": len({(group, own, question) for group, own, _, question in keyed}),
    }
    return [
        MetricValue(name, value / 100, 1.0, counts.get(name, len(items)))
        for name, value in scores.items()
    ]


def score_pope(items: Sequence[Item], credits: Sequence[float]) -> list[MetricValue]:
    """Returns POPE's accuracy, precision, recall, F1 and share of yes, over all categories.

    POPE's answers are yes or no, nothing else: a wrong one is the other.
    """
    names = (extraction.YES, extraction.NO)
    truths = [names[int(item.answer)] for item in items if isinstance(item.answer, int)]

    # A credit determines the answer: right, or the other of two.
    answers = [
        names[int(item.answer) if hit else 1 - int(item.answer)]
        for item, hit in zip(items, _hits(credits), strict=True)
        if isinstance(item.answer, int)
    ]

    scores = ratings.rate_yes_no(truths, answers)
    return [MetricValue(name, value / 100, 1.0, len(truths)) for name, value in scores.items()]


def _hits(credits: Sequence[float]) -> list[bool]:
    return [credit > 0.5 for credit in credits]


# By the name in `Benchmark.metric`; the first value is the headline score.
METRICS: Mapping[str, Metric] = {
    "accuracy": score_accuracy,
    "vqa": score_vqa,
    "with_image": score_with_image,
    "circular": score_circular,
    "mme": score_mme,
    "hallusion": score_hallusion,
    "pope": score_pope,
}
