"""Scores of whole benchmarks that are more than the share of right answers.

The inputs are columns: one entry for each question, in any order. Equal to `MME_rating`,
`Hallusion_rating` and `POPE_rating` of VLMEvalKit's `yorn.py`, and to its circular evaluation of
MMBench (`multiple_choice.py`). Percentages are 0-100, as there.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Mapping, Sequence

from wings_jax.evaluation.benchmarks import extraction

MME_PERCEPTION = (
    "OCR",
    "artwork",
    "celebrity",
    "color",
    "count",
    "existence",
    "landmark",
    "position",
    "posters",
    "scene",
)
MME_REASONING = (
    "code_reasoning",
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
)
CIRCULAR_STEP = 1_000_000  # MMBench: an index above this is a rotation of (index % step)


def percent(hits: Sequence[bool | float]) -> float:
    """Returns the mean in percent; nan of nothing.

    >>> percent([True, False])
    50.0
    """
    return 100 * sum(map(float, hits)) / len(hits) if hits else float("nan")


def all_in_group(groups: Sequence[Hashable], hits: Sequence[bool]) -> dict[Hashable, bool]:
    """Returns for each group, in the order of appearance, whether all of its questions are hits.

    >>> all_in_group(["a", "a", "b"], [True, False, True])
    {'a': False, 'b': True}
    """
    right: dict[Hashable, bool] = {}
    for group, hit in zip(groups, hits, strict=True):
        right[group] = right.get(group, True) and bool(hit)
    return right


def rate_mme(
    categories: Sequence[str], images: Sequence[str], hits: Sequence[bool]
) -> dict[str, float]:
    """Returns perception (of 2000), reasoning (of 800), their total, and each sub-task (of 200).

    A sub-task's score is its accuracy plus the share of images with both questions right ("acc+").
    Only sub-tasks that have questions are in the result and in the sums.
    """
    rows: Mapping[str, list[tuple[str, bool]]] = collections.defaultdict(list)
    for category, image, hit in zip(categories, images, hits, strict=True):
        rows[category].append((image, hit))

    # Each image has two questions; "acc+" counts images with both of them right.
    scores = {}
    for category, answers in rows.items():
        category_images = [image for image, _ in answers]
        category_hits = [hit for _, hit in answers]
        both_right = all_in_group(category_images, category_hits)
        scores[category] = percent(category_hits) + percent(list(both_right.values()))

    # Sub-tasks without questions add nothing to the sums.
    perception = sum(scores.get(name, 0.0) for name in MME_PERCEPTION)
    reasoning = sum(scores.get(name, 0.0) for name in MME_REASONING)
    totals = {"perception": perception, "reasoning": reasoning, "total": perception + reasoning}
    return totals | dict(sorted(scores.items()))


def rate_hallusion(
    subcategories: Sequence[str],
    set_ids: Sequence[str],
    figure_ids: Sequence[str],
    question_ids: Sequence[str],
    hits: Sequence[bool],
) -> dict[str, float]:
    """Returns aAcc, fAcc and qAcc of HallusionBench, and their mean.

    aAcc counts questions, fAcc figures with all questions right (subcategory, set, figure), qAcc
    questions that are right for every figure (subcategory, set, question).
    """
    # Figures and questions are numbered within a set.
    figures = list(zip(subcategories, set_ids, figure_ids, strict=True))
    questions = list(zip(subcategories, set_ids, question_ids, strict=True))

    scores = {
        "aAcc": percent(list(hits)),
        "fAcc": percent(list(all_in_group(figures, hits).values())),
        "qAcc": percent(list(all_in_group(questions, hits).values())),
    }
    return scores | {"mean": sum(scores.values()) / len(scores)}


def circular_group(index: int | str) -> int:
    """Returns the base question of an MMBench row.

    >>> circular_group("2000241"), circular_group(241)
    (241, 241)
    """
    return int(index) % CIRCULAR_STEP


def rate_circular(groups: Sequence[Hashable], hits: Sequence[bool]) -> dict[str, float]:
    """Returns `circular`, the share of groups with every rotation right, and `vanilla`, of rows.

    Rows are questions and their rotations. A group must have all its rotations, or its score is
    too good: readers check that.
    """
    right = all_in_group(groups, hits)

    # The first row of each group, as without circular evaluation.
    first_hits: dict[Hashable, bool] = {}
    for group, hit in zip(groups, hits, strict=True):
        first_hits.setdefault(group, bool(hit))

    return {
        "circular": percent(list(right.values())),
        "vanilla": percent(list(first_hits.values())),
    }


def rate_yes_no(truths: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Returns accuracy, precision, recall and F1 of "Yes" (POPE), and the share of "Yes", in %.

    An answer that is neither "Yes" nor "No" is wrong, and no "Yes".
    """
    # (whether the truth is yes, whether the answer is yes) -> count
    pairs = collections.Counter(
        (truth == extraction.YES, answer == extraction.YES)
        for truth, answer in zip(truths, answers, strict=True)
    )
    positives = pairs[True, True] + pairs[False, True]
    true_positives = pairs[True, True]

    # Precision and recall are 0 where nothing is positive.
    precision = true_positives / positives if positives else 0.0

    actual = pairs[True, True] + pairs[True, False]
    recall = true_positives / actual if actual else 0.0

    both = precision + recall
    return {
        "accuracy": percent(
            [truth == answer for truth, answer in zip(truths, answers, strict=True)]
        ),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 200 * precision * recall / both if both else 0.0,
        "yes_ratio": 100 * positives / len(answers) if answers else float("nan"),
    }
