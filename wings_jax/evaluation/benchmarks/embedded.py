"""The embedded tasks as benchmarks: what comes with the package or a checkpoint's config.

The scenes are a data set on disk, below --data-root or where the checkpoint's config has it; it is
written if it is missing. An answer is right if it is the true one, character by character.
`language_text` and `language_choices` are likelihoods that any LLM has: of plain text, and of the
choices of questions, put through the chat template without the end of the turn.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from wings_jax.errors import UserError
from wings_jax.evaluation import choice_file, everyday, prose, tasks
from wings_jax.evaluation.benchmarks.record import Benchmark, DataSet, Item, Prompt
from wings_jax.evaluation.everyday import ChoiceQuestion
from wings_jax.evaluation.prose import Text
from wings_jax.evaluation.tasks import Task
from wings_jax.scenes import dataset

FORM = "embedded"
MAX_NEW_TOKENS = 16  # of an answer


def _declare(name: str, task: Task) -> Benchmark:
    """Returns a task as a benchmark."""
    prompt = Prompt("{question}", chat=True, extraction="exact", max_new_tokens=MAX_NEW_TOKENS)
    return Benchmark(
        name=name,
        title=task.title,
        kind="generate",
        modality="text" if name == "scenes_text" else "image",
        language="en",
        files=(),
        prompts={"generate": prompt},
        split="test",
        source="this package",
        license="that of this package",
        headline="generate",
        grouping="kind",
        rows=task.rows,
        totals=task.totals,
        in_paper=False,
        is_embedded=True,
    )


def _declare_language(name: str, title: str, kind: str, prompts: Mapping[str, Prompt]) -> Benchmark:
    """Returns a measure of any LLM, without files of its own."""
    return Benchmark(
        name=name,
        title=title,
        kind=kind,
        modality="text",
        language="en",
        files=(),
        prompts=prompts,
        split="test",
        source="this package, or the user's file",
        license="that of the package or of the file",
        headline=next(iter(prompts)),
        grouping="kind",
        in_paper=False,
        is_embedded=True,
    )


TEXT, CHOICES = "language_text", "language_choices"
# Name -> benchmark: those of `tasks.TASKS`, then the measures of any LLM.
EMBEDDED: Mapping[str, Benchmark] = {
    **{name: _declare(name, task) for name, task in tasks.TASKS.items()},
    TEXT: _declare_language(TEXT, "Plain text", "text", {"perplexity": Prompt("{question}")}),
    CHOICES: _declare_language(
        CHOICES,
        "Multiple choice without examples",
        "choice",
        {"ll": Prompt("{question}", "{option}", chat=True)},
    ),
}


@dataclasses.dataclass(frozen=True)
class EmbeddedSources:
    """Where the items of embedded tasks come from."""

    # --data-root, None if it was not given.
    data_root: pathlib.Path | None = None
    # The data set of the checkpoint's config, "" for none; it is written if it is missing.
    scenes: str = ""
    # UTF-8 text of `language_text`, None for the package's.
    text: pathlib.Path | None = None
    # JSONL file of `language_choices`, None for the package's questions.
    choices: pathlib.Path | None = None
    # Whether only embedded tasks are run, so that --data-root must be the scenes.
    is_alone: bool = True


def read_embedded(benchmark: Benchmark, found: EmbeddedSources) -> tuple[Benchmark, DataSet]:
    """Returns an embedded task with the rows of its items, and the items.

    Raises:
      UserError: the data are missing or malformed.
    """
    if benchmark.name == TEXT:
        return benchmark, text_data(read_language_text(found.text), found.text)
    if benchmark.name == CHOICES:
        questions = read_choices(found.choices)
        return with_kinds(benchmark, questions), choice_data(questions, found.choices)
    return benchmark, _read_scenes(tasks.TASKS[benchmark.name], found)


def _read_scenes(task: Task, found: EmbeddedSources) -> DataSet:
    """Returns the items of a task of the scenes, or of conversations of the package."""
    if not task.file:
        return DataSet(tasks.read_items(task, None), (), (), FORM)

    # Beside benchmarks, --data-root is the directory of their files.
    root = found.data_root
    if root and not (found.is_alone or (root / task.file).exists()):
        root = None
    if root is None:
        if not found.scenes:
            raise UserError(
                "--data-root is missing, and the checkpoint's config names no scenes: write them "
                "with python -m wings_jax.scenes DIR"
            )
        root = dataset.write_scenes(found.scenes)
    return DataSet(tasks.read_items(task, root), (), (root / task.file,), FORM)


def read_language_text(path: pathlib.Path | None) -> Text:
    """Returns the text of `--text`, or that of the package. Raises UserError."""
    return prose.read_text(path) if path else prose.installed_text()


def read_choices(path: pathlib.Path | None) -> list[ChoiceQuestion]:
    """Returns the questions of `--choices`, or those of the package. Raises UserError."""
    return choice_file.read_choice_file(path) if path else everyday.embedded_questions()


def text_data(text: Text, path: pathlib.Path | None) -> DataSet:
    """Returns the passages of a text as items."""
    items = [Item(str(number), passage) for number, passage in enumerate(text.passages)]
    # The checksum tells texts of the package apart, which have no file.
    form = f"{text.source}, passages with SHA-256 {text.sha256[:12]}"
    return DataSet(items, (), (path,) if path else (), form)


def choice_data(questions: Sequence[ChoiceQuestion], path: pathlib.Path | None) -> DataSet:
    """Returns multiple-choice questions as items."""
    items = [
        Item(
            id=question.id,
            question=question.question,
            options=question.choices,
            answer=question.answer,
            group=question.kind,
            rows=(question.kind, everyday.ALL) if question.kind else (everyday.ALL,),
        )
        for question in questions
    ]
    return DataSet(items, (), (path,) if path else (), FORM)


def with_kinds(benchmark: Benchmark, questions: Sequence[ChoiceQuestion]) -> Benchmark:
    """Returns the benchmark with a row per kind of question, and one of all questions."""
    kinds = dict.fromkeys(question.kind for question in questions if question.kind)
    return dataclasses.replace(benchmark, rows=(*kinds, everyday.ALL), totals=(everyday.ALL,))
