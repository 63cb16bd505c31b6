"""A figure of images with a question, the truth and a model's answer: green where right."""

from __future__ import annotations

import pathlib
import random
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from wings_jax import files
from wings_jax.data import images
from wings_jax.evaluation import scoring
from wings_jax.evaluation.tasks import Question

if TYPE_CHECKING:
    from matplotlib import axes as mpl_axes

RIGHT_COLOR, WRONG_COLOR, TEXT_COLOR = "#1a7f37", "#c62828", "#24292f"
COLUMNS = 4
GAP = 6  # pixels between the images of a question
LINE = 28  # characters of a line of text


def choose_questions(questions: Sequence[Question], count: int, seed: int = 0) -> list[int]:
    """Returns the indices of some questions about images, each kind in turn.

    The answers have no influence: the figure is a sample, not a selection.
    """
    rng = random.Random(seed)
    by_kind: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        if question.images:
            by_kind.setdefault(question.labels[0], []).append(index)

    for indices in by_kind.values():
        rng.shuffle(indices)

    # One of each kind, again and again until there are enough.
    chosen: list[int] = []
    while len(chosen) < count and any(by_kind.values()):
        chosen += [indices.pop() for indices in by_kind.values() if indices]
    return chosen[:count]


def draw_answers(
    path: pathlib.Path,
    questions: Sequence[Question],
    answers: Sequence[str],
    *,
    count: int = 12,
    title: str = "",
) -> None:
    """Writes a PNG with `count` of the questions that have images, and their answers."""
    from matplotlib import figure  # takes seconds to import

    chosen = choose_questions(questions, count)
    row_count = -(-len(chosen) // COLUMNS)
    answer_page = figure.Figure(
        figsize=(3.1 * COLUMNS, 3.6 * row_count + 0.5), layout="constrained"
    )
    panels = answer_page.subplots(row_count, COLUMNS, squeeze=False).ravel()

    for panel in panels:
        panel.set_visible(False)
    for panel, index in zip(panels, chosen, strict=False):
        _draw_question(panel, questions[index], answers[index])

    # The title counts the right answers of the figure, not of the whole task.
    right_count = sum(scoring.is_right(answers[index], questions[index].truth) for index in chosen)
    answer_page.suptitle(
        f"{title}{right_count} of these {len(chosen)} right", fontsize=13, color=TEXT_COLOR
    )
    with files.replacing(path) as temporary:
        answer_page.savefig(temporary, dpi=110, format="png")


def _draw_question(panel: mpl_axes.Axes, question: Question, answer: str) -> None:
    """Draws the images with the question above, the answer and the truth below them."""
    panel.imshow(_join_images(question), interpolation="nearest")
    text = question.text.replace("<image>", "").strip()
    panel.set_title(_wrap(text), fontsize=11, color=TEXT_COLOR)

    is_right = scoring.is_right(answer, question.truth)
    caption = _wrap(f"{'✓' if is_right else '✗'} {answer.strip() or '(nothing)'}")
    if not is_right:
        caption += "\n" + _wrap(f"truth: {question.truth}")

    # The label of the x axis: the layout reserves space for it, as for the title.
    color = RIGHT_COLOR if is_right else WRONG_COLOR
    panel.set_xlabel(caption, fontsize=11, weight="bold", color=color)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    panel.set_visible(True)


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, LINE))


def _join_images(question: Question) -> np.ndarray:
    """Returns the question's images side by side, u8[h,w,3]."""
    loaded = [images.load_image(image) for image in question.images]
    height = max(image.height for image in loaded)
    width = sum(image.width for image in loaded) + GAP * (len(loaded) - 1)
    joined = Image.new("RGB", (width, height), "white")

    left = 0
    for image in loaded:
        # Centered vertically.
        joined.paste(image, (left, (height - image.height) // 2))
        left += image.width + GAP
    return np.asarray(joined)
