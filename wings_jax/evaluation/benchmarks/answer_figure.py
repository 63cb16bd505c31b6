"""A figure of images with a question, the truth and a model's answer: green where right."""

from __future__ import annotations

import pathlib
import random
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from wings_jax import files
from wings_jax.data import images
from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks.passes import GENERATE
from wings_jax.evaluation.benchmarks.record import LETTERS, Item
from wings_jax.evaluation.benchmarks.results import BenchmarkResult
from wings_jax.evaluation.benchmarks.runner import BenchmarkTask

if TYPE_CHECKING:
    from matplotlib import axes as mpl_axes

RIGHT_COLOR, WRONG_COLOR, TEXT_COLOR = "#1a7f37", "#c62828", "#24292f"
COLUMNS = 4
GAP = 6  # pixels between the images of a question
LINE = 28  # characters of a line of text


def find_task(path: pathlib.Path, asked: Sequence[BenchmarkTask]) -> BenchmarkTask:
    """Returns the first task whose questions about images are answered in words.

    Raises:
      UserError: there is none, or the figure could not be written.
    """
    # matplotlib chooses the format by the suffix; only PNG is documented.
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--figure: {path} does not end in .png")
    files.check_writable(path.parent, "--figure")

    for task in asked:
        if GENERATE in task.protocols and any(item.images for item in task.data.items):
            return task
    names = ", ".join(task.benchmark.name for task in asked)
    raise UserError(f"--figure: no question of {names} has an image and a generated answer")


def draw_result(path: pathlib.Path, task: BenchmarkTask, result: BenchmarkResult) -> None:
    """Writes a PNG with some questions of a task and one model's answers."""
    draw_answers(path, task.data.items, result.lines, title=f"{result.model}: ")


def choose_questions(items: Sequence[Item], count: int, seed: int = 0) -> list[int]:
    """Returns the indices of some questions about images, each group in turn.

    The answers have no influence: the figure is a sample, not a selection.
    """
    rng = random.Random(seed)
    by_kind: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if item.images:
            by_kind.setdefault(item.group, []).append(index)

    for indices in by_kind.values():
        rng.shuffle(indices)

    # One of each kind, again and again until there are enough.
    chosen: list[int] = []
    while len(chosen) < count and any(by_kind.values()):
        chosen += [indices.pop() for indices in by_kind.values() if indices]
    return chosen[:count]


def draw_answers(
    path: pathlib.Path,
    items: Sequence[Item],
    lines: Sequence[Mapping[str, Any]],
    *,
    count: int = 12,
    title: str = "",
) -> None:
    """Writes a PNG with `count` of the items that have images, and their answers.

    Args:
      lines: the result line of each item.
    """
    from matplotlib import figure  # takes seconds to import

    chosen = choose_questions(items, count)
    row_count = -(-len(chosen) // COLUMNS)
    answer_page = figure.Figure(
        figsize=(3.1 * COLUMNS, 3.6 * row_count + 0.5), layout="constrained"
    )
    panels = answer_page.subplots(row_count, COLUMNS, squeeze=False).ravel()

    for panel in panels:
        panel.set_visible(False)
    for panel, index in zip(panels, chosen, strict=False):
        _draw_item(panel, items[index], lines[index])

    # The title counts the right answers of the figure, not of the whole task.
    right_count = sum(_is_right(lines[index]) for index in chosen)
    answer_page.suptitle(
        f"{title}{right_count} of these {len(chosen)} right", fontsize=13, color=TEXT_COLOR
    )
    with files.replacing(path) as temporary:
        answer_page.savefig(temporary, dpi=110, format="png")


def _is_right(line: Mapping[str, Any]) -> bool:
    """Returns whether an answer has more than half of its point; False without a true answer."""
    return (line["credit"][GENERATE] or 0.0) > 0.5


def _draw_item(panel: mpl_axes.Axes, item: Item, line: Mapping[str, Any]) -> None:
    """Draws the images with the question above, the answer and the truth below them."""
    panel.imshow(_join_images(item), interpolation="nearest")
    text = item.question.replace("<image>", "").strip()
    panel.set_title(_wrap(text), fontsize=11, color=TEXT_COLOR)

    # An item that could not be asked has an error in place of an answer.
    is_right = _is_right(line)
    answer = line[GENERATE].get("generated", line[GENERATE].get("error", ""))
    caption = _wrap(f"{'✓' if is_right else '✗'} {answer.strip() or '(nothing)'}")
    if not is_right:
        caption += "\n" + _wrap(f"truth: {_truth(item)}")

    # The label of the x axis: the layout reserves space for it, as for the title.
    color = RIGHT_COLOR if is_right else WRONG_COLOR
    panel.set_xlabel(caption, fontsize=11, weight="bold", color=color)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    panel.set_visible(True)


def _truth(item: Item) -> str:
    """Returns the true answer in words: a letter with its option, or a text."""
    if isinstance(item.answer, int):
        return f"{LETTERS[item.answer]}. {item.options[item.answer]}"
    if isinstance(item.answer, tuple):
        return ", ".join(dict.fromkeys(item.answer))
    return item.answer or "(withheld)"


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, LINE))


def _join_images(item: Item) -> np.ndarray:
    """Returns the item's images side by side, u8[h,w,3]; a gray square for an unreadable one."""
    loaded = [_load_image(item, number) for number in range(len(item.images))]
    height = max(image.height for image in loaded)
    width = sum(image.width for image in loaded) + GAP * (len(loaded) - 1)
    joined = Image.new("RGB", (width, height), "white")

    left = 0
    for image in loaded:
        # Centered vertically.
        joined.paste(image, (left, (height - image.height) // 2))
        left += image.width + GAP
    return np.asarray(joined)


def _load_image(item: Item, number: int) -> Image.Image:
    try:
        return images.load_image(item.images[number].read())
    except UserError:
        return Image.new("RGB", (64, 64), "gray")
