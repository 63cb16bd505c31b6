"""The change of accuracy from one model to another, by row of a task, paired by question.

Both models answer every question, so the interval of the change is narrower than the intervals of
the two accuracies suggest.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax import files, formatting
from wings_jax.evaluation import report, scoring
from wings_jax.evaluation.report import TaskResult
from wings_jax.evaluation.scoring import PairedScore
from wings_jax.evaluation.tasks import TASKS, Question

Changes = Mapping[str, Mapping[str, PairedScore]]  # task -> row -> both answers compared
HEADING = ("", "n", "before", "after", "change", "lost", "gained")
LEGEND = (
    "Right answers in %; the change in points with its 95 % interval (paired, Newcombe); lost: "
    "questions that were right only before, gained: only after."
)


def compare_answers(
    questions: Mapping[str, Sequence[Question]], before: TaskResult, after: TaskResult
) -> Changes:
    """Returns the changes from one model's answers to another's."""
    return {
        task_name: scoring.score_pairs(
            TASKS[task_name], task_questions, before.answers[task_name], after.answers[task_name]
        )
        for task_name, task_questions in questions.items()
    }


def text_comparison(before: TaskResult, after: TaskResult, changes: Changes) -> str:
    """Returns a table per task, for a terminal."""
    sections = [f"{before.name} -> {after.name}. {LEGEND}"]

    for task_name, rows in changes.items():
        sections.append(
            f"{TASKS[task_name].title}\n{formatting.text_table(_change_cells(task_name, rows))}"
        )
    return "\n\n".join(sections)


def markdown_comparison(before: TaskResult, compared: Sequence[tuple[TaskResult, Changes]]) -> str:
    """Returns the tables of all models that are compared with `before`, in Markdown."""
    markdown_lines = ["# Forgetting", "", LEGEND, ""]
    markdown_lines += [
        f"- {result.name}: `{result.origin}`"
        for result in (before, *(after for after, _ in compared))
    ]

    # A section per model and task.
    for after, changes in compared:
        for task_name, rows in changes.items():
            markdown_lines += [
                "",
                f"## {before.name} -> {after.name}: {TASKS[task_name].title}",
                "",
            ]

            markdown_lines.append(formatting.markdown_table(_change_cells(task_name, rows)))
    return "\n".join(markdown_lines) + "\n"


def paired_to_dict(paired: PairedScore) -> dict[str, Any]:
    """Returns a change as it is written to JSON."""
    return {
        "before": formatting.round_for_json(paired.before.accuracy),
        "after": formatting.round_for_json(paired.after.accuracy),
        "change": formatting.round_for_json(paired.change),
        "interval95": formatting.round_interval(paired.interval),
        "lost": paired.lost,
        "gained": paired.gained,
        "total": paired.total,
    }


def comparison_to_dict(
    before: TaskResult, compared: Sequence[tuple[TaskResult, Changes]]
) -> dict[str, Any]:
    """Returns counts, changes and intervals as they are written to JSON."""
    # One entry per model that is compared: task -> row -> change.
    models = [
        {
            "name": after.name,
            "origin": after.origin,
            "tasks": {
                task_name: {row_name: paired_to_dict(paired) for row_name, paired in rows.items()}
                for task_name, rows in changes.items()
            },
        }
        for after, changes in compared
    ]
    return {"before": {"name": before.name, "origin": before.origin}, "models": models}


def write_comparison(
    directory: pathlib.Path, before: TaskResult, compared: Sequence[tuple[TaskResult, Changes]]
) -> list[pathlib.Path]:
    """Writes forgetting.md and forgetting.json; returns the paths."""
    contents = {
        "forgetting.md": markdown_comparison(before, compared),
        "forgetting.json": formatting.json_text(comparison_to_dict(before, compared)),
    }
    return [files.write_text(directory / name, text) for name, text in contents.items()]


def format_change(paired: PairedScore) -> str:
    """Returns the change in points, with its interval.

    >>> format_change(PairedScore(both=36, lost=2, gained=12, neither=0))
    '+20.0 [+5.7, +34.0]'
    """
    return formatting.format_estimate(paired.change, paired.interval, scale=100, sign="+")


def _change_cells(task_name: str, rows: Mapping[str, PairedScore]) -> list[Sequence[str]]:
    table_cells: list[Sequence[str]] = [HEADING]
    for row_name, paired in rows.items():
        # before, after
        accuracies = (
            formatting.format_number(score.accuracy, scale=100)
            for score in (paired.before, paired.after)
        )

        counts = (str(paired.lost), str(paired.gained))
        # The order of HEADING.
        name, total = report.row_title(task_name, row_name), str(paired.total)
        table_cells.append((name, total, *accuracies, format_change(paired), *counts))
    return table_cells
