"""The results of one or several models side by side: as text, Markdown, JSON, and a picture."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax import files, formatting
from wings_jax.evaluation import scoring
from wings_jax.evaluation.scoring import Score
from wings_jax.evaluation.tasks import TASKS, Question


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One model's answers.

    name, origin  how it is called in the table, and where it comes from
    step          optimizer steps of its last stage; None for a base
    answers       task -> an answer for each of its questions
    scores        task -> row -> score
    seconds       task -> how long it took
    """

    name: str
    origin: str
    step: int | None
    answers: Mapping[str, Sequence[str]]
    scores: Mapping[str, Mapping[str, Score]]
    seconds: Mapping[str, float]


def _cells(task: str, results: Sequence[TaskResult]) -> list[list[str]]:
    """Returns the table of a task: a row per kind, a column per model."""
    rows = [["", "n", *(result.name for result in results)]]
    for row in results[0].scores[task]:
        scores = [result.scores[task][row] for result in results]
        rows.append([label(task, row), str(scores[0].total), *map(shown, scores)])
    return rows


def label(task: str, row: str) -> str:
    """Returns how a row of a task is called in tables: "= all text" if it adds others up."""
    return f"= {row}" if row in TASKS[task].totals else row


def shown(score: Score) -> str:
    """Returns a score as it stands in tables: accuracy in % and its interval."""
    low, high = (f"{100 * end:.1f}" for end in score.interval)
    return f"{100 * score.accuracy:.1f} [{low}, {high}]"


def as_text(results: Sequence[TaskResult]) -> str:
    """Returns tables for a terminal: accuracy in %, with its 95 % interval."""
    parts = []
    for task in results[0].scores:
        title = f"{TASKS[task].title}: right answers in % [95 % interval]"
        parts.append(f"{title}\n{formatting.text_table(_cells(task, results))}")
    return "\n\n".join(parts)


def as_markdown(results: Sequence[TaskResult]) -> str:
    """Returns the same tables in Markdown, with where each model comes from."""
    lines = ["# Evaluation", "", "Right answers in %, with the 95 % interval (Wilson).", ""]
    for result in results:
        step = "" if result.step is None else f", step {result.step}"
        lines.append(f"- {result.name}: `{result.origin}`{step}")
    for task in results[0].scores:
        lines += [
            "",
            f"## {TASKS[task].title}",
            "",
            formatting.markdown_table(_cells(task, results)),
        ]
    return "\n".join(lines) + "\n"


def plain(score: Score) -> dict[str, Any]:
    """Returns a score as it is written to JSON."""
    return {
        "right": score.right,
        "total": score.total,
        "accuracy": round(score.accuracy, 6),
        "interval95": [round(end, 6) for end in score.interval],
    }


def as_json(results: Sequence[TaskResult]) -> dict[str, Any]:
    """Returns counts, accuracies and intervals, for machines."""
    return {
        "models": [
            {
                "name": result.name,
                "origin": result.origin,
                "step": result.step,
                "seconds": {task: round(s, 2) for task, s in result.seconds.items()},
                "tasks": {
                    task: {row: plain(found) for row, found in rows.items()}
                    for task, rows in result.scores.items()
                },
            }
            for result in results
        ]
    }


def save(
    directory: pathlib.Path,
    results: Sequence[TaskResult],
    questions: Mapping[str, Sequence[Question]],
) -> list[pathlib.Path]:
    """Writes report.md, report.json and every answer; returns the paths."""
    made = {
        "report.md": as_markdown(results),
        "report.json": json.dumps(as_json(results), indent=1) + "\n",
    }
    for result in results:
        lines = [
            json.dumps(
                {
                    "task": task,
                    "rows": question.labels,
                    "id": question.id,
                    "question": question.text,
                    "truth": question.truth,
                    "answer": answer,
                    "right": scoring.is_right(answer, question.truth),
                },
                ensure_ascii=False,
            )
            for task, answers in result.answers.items()
            for question, answer in zip(questions[task], answers, strict=True)
        ]
        made[f"answers-{result.name}.jsonl"] = "".join(f"{line}\n" for line in lines)
    return [files.write_text(directory / name, text) for name, text in made.items()]
