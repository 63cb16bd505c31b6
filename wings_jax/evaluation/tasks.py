"""The embedded tasks: where their questions come from, and in which rows a question counts.

A task is a LLaVA file, or samples that the package makes, whose last turn is the true answer. The
extra keys of a record are its kinds of question; `labels` maps them to rows.
`benchmarks.embedded` declares the tasks as benchmarks.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from wings_jax.data import images, samples, sources
from wings_jax.errors import UserError
from wings_jax.evaluation import iit
from wings_jax.evaluation.benchmarks.record import TURNS, ImageRef, Item
from wings_jax.scenes import questions, skills

ALL_BUT_SUMS = "all but sums"
REPLAYED, NOT_REPLAYED, ALL_TEXT = "replayed in stage 2", "never replayed", "all text"
SUM = "sum"


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions of the package, declared as data."""

    # Heading in reports.
    title: str
    # Returns the rows that a record counts in, from its extra keys.
    labels: Callable[[Mapping[str, Any]], tuple[str, ...]]
    # Every row that can occur, in the order of the table.
    rows: tuple[str, ...]
    # Rows that add up others.
    totals: tuple[str, ...] = ()
    # Data file in the directory of the data set; its images are in images/ beside it.
    file: str = ""
    # Returns the samples of a task that has no file.
    make_samples: Callable[[], Sequence[samples.Sample]] | None = None


def _image_labels(record: Mapping[str, Any]) -> tuple[str, ...]:
    kind, setting = record["kinds"][-1], record["setting"]
    if kind == SUM:
        return (SUM,)
    return (kind if setting == "single" else setting, ALL_BUT_SUMS)


def _text_labels(record: Mapping[str, Any]) -> tuple[str, ...]:
    skill = record["kinds"][-1]
    return (skill, REPLAYED if skills.SKILLS[skill].replayed else NOT_REPLAYED, ALL_TEXT)


def _setting_label(record: Mapping[str, Any]) -> tuple[str, ...]:
    return (record["setting"],)


TASKS: Mapping[str, Task] = {
    "scenes_images": Task(
        title="Questions about images (held-out digits and drawings)",
        file="test_images.json",
        labels=_image_labels,
        rows=(
            *(kind for kind in questions.KINDS if kind != SUM),
            "several",
            "interleaved",
            ALL_BUT_SUMS,
            SUM,
        ),
        totals=(ALL_BUT_SUMS,),
    ),
    "scenes_text": Task(
        title="Text-only questions",
        file="test_text.json",
        labels=_text_labels,
        rows=(*skills.SKILLS, REPLAYED, NOT_REPLAYED, ALL_TEXT),
        totals=(REPLAYED, NOT_REPLAYED, ALL_TEXT),
    ),
    "iit": Task(
        title="Interleaved conversations (T: text, V: image), last question scored",
        labels=_setting_label,
        rows=iit.ROWS,
        make_samples=iit.make_conversations,
    ),
}


def read_items(task: Task, root: pathlib.Path | None) -> list[Item]:
    """Returns the task's questions as items.

    `root` is the directory of the data set, None if the task has no file.

    Raises:
      UserError: the data are missing or malformed, or a record has not what the task needs.
    """
    # A task has a function or a file.
    source: Sequence[samples.Sample] | sources.SampleSource
    if task.make_samples:
        source, source_name = task.make_samples(), task.title
    elif root is not None:
        source = sources.open_source(root / task.file, images=root / "images")
        source_name = str(root / task.file)
    else:
        raise UserError(f"{task.title}: the directory of its data is missing")

    return [_make_item(task, source[index], source_name) for index in range(len(source))]


def spread_indices(count: int, limit: int | None) -> Sequence[int]:
    """Returns all indices below `count`, or about `limit` of them, spread evenly.

    >>> spread_indices(10, 5)
    [0, 2, 4, 6, 8]
    >>> spread_indices(3, 10**20)
    range(0, 3)
    """
    if not limit or limit >= count:
        return range(count)
    return sorted({number * count // limit for number in range(limit)})


def _make_item(task: Task, sample: samples.Sample, file: str) -> Item:
    """Returns the item that the last two turns of a sample are. Raises UserError."""
    # The last turn is the true answer, the one before it the question.
    turns = list(sample.conversations)
    try:
        rows, question = task.labels(sample.extra), turns[-2]["value"]
        has_truth = turns[-1]["from"] == "gpt" and isinstance(turns[-1]["value"], str)
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{file}: {sample.id}: {type(error).__name__} {error}") from error

    if not has_truth:
        raise UserError(f"{file}: {sample.id}: the last turn is not the true answer")
    unknown = [row for row in rows if row not in task.rows]
    if unknown:
        raise UserError(f"{file}: {sample.id}: there are no questions of kind {unknown[0]!r}")

    before = turns[:-2]
    return Item(
        id=sample.id,
        question=question,
        answer=turns[-1]["value"],
        group=rows[0],
        rows=rows,
        images=tuple(_image_ref(sample.id, image) for image in sample.images),
        extra={TURNS: before} if before else {},
    )


def _image_ref(name: str, image: Any) -> ImageRef:
    """Returns an image of a sample: a path, encoded bytes or u8[h,w,3]."""
    if not isinstance(image, np.ndarray):
        return ImageRef(str(image), lambda: images.image_bytes(image))

    def encode() -> bytes:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        return stream.getvalue()

    return ImageRef(name, encode)
