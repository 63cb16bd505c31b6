"""The results of one or several models side by side: as text, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from wings_jax import files, formatting
from wings_jax.evaluation import scoring
from wings_jax.evaluation.scoring import Score
from wings_jax.evaluation.tasks import TASKS, Question


class ModelOrigin(Protocol):
    """What the reports print about where a result comes from."""

    @property
    def name(self) -> str:
        """Name of the model."""

    @property
    def origin(self) -> str:
        """Directory or description of the model."""

    @property
    def step(self) -> int | None:
        """Optimizer steps of its last stage, None for a base."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One model's answers and scores."""

    # Name of the model in tables and in the names of files.
    name: str
    # Directory or description of the model, for people.
    origin: str
    # Optimizer steps of its last stage, None for a base.
    step: int | None
    # Task -> an answer for each of its questions.
    answers: Mapping[str, Sequence[str]]
    # Task -> row -> score.
    scores: Mapping[str, Mapping[str, Score]]
    # Task -> wall-clock seconds.
    seconds: Mapping[str, float]


def row_title(task_name: str, row_name: str) -> str:
    """Returns the name of a row in tables: "= all text" if it adds up others."""
    return f"{formatting.TOTAL}{row_name}" if row_name in TASKS[task_name].totals else row_name


def format_score(score: Score) -> str:
    """Returns the accuracy in % and its interval.

    >>> format_score(Score(right=8, total=10))
    '80.0 [49.0, 94.3]'
    """
    return formatting.format_estimate(score.accuracy, score.interval, scale=100)


def _task_cells(task_name: str, results: Sequence[TaskResult]) -> list[list[str]]:
    """Returns the table of a task: a row per kind of question, a column per model."""
    table_cells = [["", "n", *(result.name for result in results)]]
    for row_name in results[0].scores[task_name]:
        # All models have the same questions, so n is that of the first.
        scores = [result.scores[task_name][row_name] for result in results]
        table_cells.append(
            [row_title(task_name, row_name), str(scores[0].total), *map(format_score, scores)]
        )
    return table_cells


def text_report(results: Sequence[TaskResult]) -> str:
    """Returns tables for a terminal: accuracy in %, with its 95 % interval."""
    sections = []

    for task_name in results[0].scores:
        title = f"{TASKS[task_name].title}: right answers in % [95 % interval]"
        sections.append(f"{title}\n{formatting.text_table(_task_cells(task_name, results))}")
    return "\n\n".join(sections)


def model_lines(results: Sequence[ModelOrigin]) -> list[str]:
    """Returns a Markdown list of the models and where they come from."""
    markdown_lines = []
    for result in results:
        # A base has no step.
        step = "" if result.step is None else f", step {result.step}"
        markdown_lines.append(f"- {result.name}: `{result.origin}`{step}")
    return markdown_lines


def markdown_report(results: Sequence[TaskResult]) -> str:
    """Returns the same tables in Markdown, with where each model comes from."""
    markdown_lines = [
        "# Evaluation",
        "",
        "Right answers in %, with the 95 % interval (Wilson).",
        "",
    ]
    markdown_lines += model_lines(results)

    for task_name in results[0].scores:
        table = formatting.markdown_table(_task_cells(task_name, results))
        markdown_lines += ["", f"## {TASKS[task_name].title}", "", table]
    return "\n".join(markdown_lines) + "\n"


def score_to_dict(score: Score) -> dict[str, Any]:
    """Returns a score as it is written to JSON."""
    return {
        "right": score.right,
        "total": score.total,
        "accuracy": formatting.round_for_json(score.accuracy),
        "interval95": formatting.round_interval(score.interval),
    }


def report_to_dict(results: Sequence[TaskResult]) -> dict[str, Any]:
    """Returns counts, accuracies and intervals as they are written to JSON."""
    # One entry per model: task -> row -> score.
    models = [
        {
            "name": result.name,
            "origin": result.origin,
            "step": result.step,
            "seconds": {
                task_name: round(seconds, 2) for task_name, seconds in result.seconds.items()
            },
            "tasks": {
                task_name: {row_name: score_to_dict(score) for row_name, score in rows.items()}
                for task_name, rows in result.scores.items()
            },
        }
        for result in results
    ]
    return {"models": models}


def write_report(
    directory: pathlib.Path,
    results: Sequence[TaskResult],
    questions: Mapping[str, Sequence[Question]],
) -> list[pathlib.Path]:
    """Writes report.md, report.json and answers-NAME.jsonl; returns the paths."""
    contents = {
        "report.md": markdown_report(results),
        "report.json": formatting.json_text(report_to_dict(results)),
    }
    for result in results:
        # One file per model, one line per question.
        records = _answer_records(result, questions)
        contents[f"answers-{result.name}.jsonl"] = formatting.json_lines(records)

    return [files.write_text(directory / name, text) for name, text in contents.items()]


def _answer_records(
    result: TaskResult, questions: Mapping[str, Sequence[Question]]
) -> Iterator[dict[str, Any]]:
    """Yields every question of every task with the model's answer."""
    for task_name, answers in result.answers.items():
        # Answers are in the order of the questions.
        for question, answer in zip(questions[task_name], answers, strict=True):
            yield {
                "task": task_name,
                "rows": question.labels,
                "id": question.id,
                "question": question.text,
                "truth": question.truth,
                "answer": answer,
                "right": scoring.is_right(answer, question.truth),
            }
