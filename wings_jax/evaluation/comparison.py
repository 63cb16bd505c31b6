"""What a model knew before a training and does not know after it, by row of a task.

Every question is asked of both, so their answers are paired and the interval of the change is
narrower than two intervals side by side would say.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax import files, formatting
from wings_jax.evaluation import report, scoring
from wings_jax.evaluation.report import TaskResult
from wings_jax.evaluation.scoring import Paired
from wings_jax.evaluation.tasks import TASKS, Question

Changes = Mapping[str, Mapping[str, Paired]]  # task -> row -> both answers compared
HEADING = ("", "n", "before", "after", "change", "lost", "gained")
MEANING = (
    "Right answers in %; the change in points with its 95 % interval (paired, Newcombe); lost: "
    "questions that were right only before, gained: only after."
)


def compare(
    questions: Mapping[str, Sequence[Question]], before: TaskResult, after: TaskResult
) -> Changes:
    """Returns what changed from one model's answers to another's."""
    return {
        task: scoring.score_pairs(TASKS[task], asked, before.answers[task], after.answers[task])
        for task, asked in questions.items()
    }


def as_text(before: TaskResult, after: TaskResult, changes: Changes) -> str:
    """Returns a table by task, for a terminal."""
    parts = [f"{before.name} -> {after.name}. {MEANING}"]
    for task, rows in changes.items():
        parts.append(f"{TASKS[task].title}\n{formatting.text_table(_cells(task, rows))}")
    return "\n\n".join(parts)


def as_markdown(before: TaskResult, found: Sequence[tuple[TaskResult, Changes]]) -> str:
    """Returns the tables of all models that are compared with `before`, in Markdown."""
    lines = ["# Forgetting", "", MEANING, ""]
    lines += [f"- {one.name}: `{one.origin}`" for one in (before, *(after for after, _ in found))]
    for after, changes in found:
        for task, rows in changes.items():
            lines += ["", f"## {before.name} -> {after.name}: {TASKS[task].title}", ""]
            lines.append(formatting.markdown_table(_cells(task, rows)))
    return "\n".join(lines) + "\n"


def plain(paired: Paired) -> dict[str, Any]:
    """Returns a change as it is written to JSON."""
    return {
        "before": round(paired.before.accuracy, 6),
        "after": round(paired.after.accuracy, 6),
        "change": round(paired.change, 6),
        "interval95": [round(end, 6) for end in paired.interval],
        "lost": paired.lost,
        "gained": paired.gained,
        "total": paired.total,
    }


def as_json(before: TaskResult, found: Sequence[tuple[TaskResult, Changes]]) -> dict[str, Any]:
    """Returns counts, changes and intervals, for machines."""
    models = [
        {
            "name": after.name,
            "origin": after.origin,
            "tasks": {
                task: {name: plain(paired) for name, paired in rows.items()}
                for task, rows in changes.items()
            },
        }
        for after, changes in found
    ]
    return {"before": {"name": before.name, "origin": before.origin}, "models": models}


def save(
    directory: pathlib.Path, before: TaskResult, found: Sequence[tuple[TaskResult, Changes]]
) -> list[pathlib.Path]:
    """Writes forgetting.md and forgetting.json; returns the paths."""
    found_json = json.dumps(as_json(before, found), indent=1) + "\n"
    return [
        files.write_text(directory / "forgetting.md", as_markdown(before, found)),
        files.write_text(directory / "forgetting.json", found_json),
    ]


def shown(paired: Paired) -> str:
    """Returns a change as it stands in tables: in points, with its interval."""
    low, high = (f"{100 * end:+.1f}" for end in paired.interval)
    return f"{100 * paired.change:+.1f} [{low}, {high}]"


def _cells(task: str, rows: Mapping[str, Paired]) -> list[Sequence[str]]:
    cells: list[Sequence[str]] = [HEADING]
    for name, paired in rows.items():
        scores = (f"{100 * score.accuracy:.1f}" for score in (paired.before, paired.after))
        counts = (str(paired.lost), str(paired.gained))
        change = shown(paired)
        cells.append((report.label(task, name), str(paired.total), *scores, change, *counts))
    return cells
