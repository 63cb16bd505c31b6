"""What is asked, and which rows of the table a question counts in. Declarative records.

A task is a LLaVA file, or samples made from the package, whose last turn is the true answer. The
extra keys say what kind of question it is; `labels` turns them into rows.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wings_jax.data import samples, sources
from wings_jax.errors import UserError
from wings_jax.evaluation import iit
from wings_jax.scenes import questions, skills

ALL_BUT_SUMS = "all but sums"
REPLAYED, NOT_REPLAYED, ALL_TEXT = "replayed in stage 2", "never replayed", "all text"
SUM = "sum"


@dataclasses.dataclass(frozen=True)
class Task:
    """A set of questions.

    title   its heading in reports
    labels  returns the rows that a record counts in, from its extra keys
    rows    every row there may be, in the order of the table
    totals  rows that add others up
    file    the data file, in the folder of the data set; its pictures are in images/ beside it
    make    returns the samples of a task that has no file
    """

    title: str
    labels: Callable[[Mapping[str, Any]], tuple[str, ...]]
    rows: tuple[str, ...]
    totals: tuple[str, ...] = ()
    file: str = ""
    make: Callable[[], Sequence[samples.Sample]] | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """One scored question: all turns up to it, its pictures, the true answer, and its rows."""

    id: str
    turns: Sequence[Mapping[str, str]]
    images: tuple[Any, ...]
    truth: str
    labels: tuple[str, ...]

    @property
    def text(self) -> str:
        """Returns the last human turn."""
        return self.turns[-1]["value"]


def _image_labels(record: Mapping[str, Any]) -> tuple[str, ...]:
    kind, setting = record["kinds"][-1], record["setting"]
    if kind == SUM:
        return (SUM,)
    return (kind if setting == "single" else setting, ALL_BUT_SUMS)


def _text_labels(record: Mapping[str, Any]) -> tuple[str, ...]:
    name = record["kinds"][-1]
    return (name, REPLAYED if skills.SKILLS[name].replayed else NOT_REPLAYED, ALL_TEXT)


TASKS: Mapping[str, Task] = {
    "scenes_images": Task(
        title="Questions about pictures (held-out digits and drawings)",
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
        title="Interleaved conversations (T: text, V: picture), last question scored",
        labels=lambda record: (record["setting"],),
        rows=iit.ROWS,
        make=iit.conversations,
    ),
}


def find_tasks(names: str) -> dict[str, Task]:
    """Returns the tasks of a comma-separated list.

    Raises:
      UserError: there is no task of a name.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in TASKS]
    if unknown or not chosen:
        wrong = f"no such task: {unknown[0]!r}" if unknown else "names no task"
        raise UserError(f"--tasks {wrong}; there are {', '.join(TASKS)}")
    return {name: TASKS[name] for name in chosen}


def read_questions(
    task: Task, root: pathlib.Path | None, limit: int | None = None
) -> list[Question]:
    """Returns the task's questions; with `limit` about so many, spread over them.

    `root` is the folder of the data set, None if the task has no file.

    Raises:
      UserError: the data are missing or malformed, or a record lacks what the task needs.
    """
    if task.make:
        source, name = task.make(), task.title
    else:
        source = sources.open_source(root / task.file, images=root / "images")
        name = str(root / task.file)
    return [_question(task, source[index], name) for index in spread(len(source), limit)]


def spread(count: int, limit: int | None) -> Sequence[int]:
    """Returns all indices below `count`, or about `limit` of them, spread evenly."""
    return range(count) if not limit else sorted({i * count // limit for i in range(limit)})


def _question(task: Task, sample: samples.Sample, file: str) -> Question:
    turns = list(sample.conversations)
    try:
        labels = task.labels(sample.extra)
        is_answered = turns[-1]["from"] == "gpt" and isinstance(turns[-1]["value"], str)
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{file}: {sample.id}: {type(error).__name__} {error}") from error
    if not is_answered:
        raise UserError(f"{file}: {sample.id}: the last turn is not the true answer")
    unknown = [label for label in labels if label not in task.rows]
    if unknown:
        raise UserError(f"{file}: {sample.id}: there are no questions of kind {unknown[0]!r}")
    return Question(sample.id, turns[:-1], sample.images, turns[-1]["value"], labels)
