"""Pictures with a question, the truth and what a model said: green where right, red where wrong."""

from __future__ import annotations

import pathlib
import random
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib import figure
from PIL import Image

from wings_jax import files
from wings_jax.data import images
from wings_jax.evaluation import scoring
from wings_jax.evaluation.tasks import Question

RIGHT, WRONG, INK = "#1a7f37", "#c62828", "#24292f"
COLUMNS, GAP = 4, 6


def choose(questions: Sequence[Question], count: int, seed: int = 0) -> list[int]:
    """Returns the indices of some questions about pictures, each kind in turn.

    What was answered decides nothing: the picture is a sample, not a selection.
    """
    rng = random.Random(seed)
    by_kind: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        if question.images:
            by_kind.setdefault(question.labels[0], []).append(index)
    for indices in by_kind.values():
        rng.shuffle(indices)
    found: list[int] = []
    while len(found) < count and any(by_kind.values()):
        found += [indices.pop() for indices in by_kind.values() if indices]
    return found[:count]


def draw(
    path: pathlib.Path,
    questions: Sequence[Question],
    answers: Sequence[str],
    *,
    count: int = 12,
    title: str = "",
) -> None:
    """Writes a PNG with `count` of the questions."""
    chosen = choose(questions, count)
    rows = -(-len(chosen) // COLUMNS)
    page = figure.Figure(figsize=(3.1 * COLUMNS, 3.9 * rows + 0.5), layout="constrained")
    panels = page.subplots(rows, COLUMNS, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, index in zip(panels, chosen, strict=False):
        question, answer = questions[index], answers[index]
        panel.imshow(_side_by_side(question), interpolation="nearest")
        text = question.text.replace("<image>", "").strip()
        panel.set_title("\n".join(textwrap.wrap(text, 30)), fontsize=11, color=INK)
        is_right = scoring.is_right(answer, question.truth)
        said = f"{'✓' if is_right else '✗'} {answer.strip() or '(nothing)'}"
        below = said if is_right else f"{said}\ntruth: {question.truth}"
        panel.text(
            0.5,
            -0.04,
            below,
            transform=panel.transAxes,
            fontsize=13,
            weight="bold",
            color=RIGHT if is_right else WRONG,
            va="top",
            ha="center",
            multialignment="center",
        )
    right = sum(scoring.is_right(answers[i], questions[i].truth) for i in chosen)
    page.suptitle(f"{title}{right} of these {len(chosen)} right", fontsize=13, color=INK)
    with files.replacing(path) as temporary:
        page.savefig(temporary, dpi=110, format="png")


def _side_by_side(question: Question) -> np.ndarray:
    """Returns the question's pictures next to each other, u8[h,w,3]."""
    pictures = [images.load_image(picture) for picture in question.images]
    height = max(picture.height for picture in pictures)
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    whole = Image.new("RGB", (width, height), "white")
    at = 0
    for picture in pictures:
        whole.paste(picture, (at, (height - picture.height) // 2))
        at += picture.width + GAP
    return np.asarray(whole)
