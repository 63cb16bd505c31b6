"""Keys and files of embedded tasks that released versions wrote, which scripts read.

`report.json` and `forgetting.json` have "models", each with counts by row and Wilson's intervals;
answers-NAME.jsonl has a line per question of all embedded tasks.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wings_jax import files, formatting
from wings_jax.evaluation import scoring
from wings_jax.evaluation.benchmarks.passes import GENERATE
from wings_jax.evaluation.benchmarks.results import BenchmarkResult
from wings_jax.evaluation.scoring import Score

# Task -> a result per model, in the order of the models.
Results = Mapping[str, Sequence[BenchmarkResult]]
Line = Mapping[str, Any]


def report_to_dict(found: Results) -> dict[str, Any]:
    """Returns the key "models" of report.json, {} without embedded tasks."""
    by_model = _group_by_model(found)
    models = [
        {
            **_origin(results[0]),
            "step": results[0].step,
            "seconds": {result.benchmark.name: round(result.seconds, 2) for result in results},
            "tasks": {result.benchmark.name: _score_rows(result) for result in results},
        }
        for results in by_model
    ]
    return {"models": models} if models else {}


def changes_to_dict(found: Results) -> dict[str, Any]:
    """Returns the keys "before" and "models" of forgetting.json, {} without embedded tasks."""
    if not (by_model := _group_by_model(found)):
        return {}

    before, *others = by_model
    models = [
        {
            **_origin(after[0]),
            "tasks": {
                first.benchmark.name: _compare_rows(first, second)
                for first, second in zip(before, after, strict=True)
            },
        }
        for after in others
    ]
    return {"before": _origin(before[0]), "models": models}


def write_answers(directory: pathlib.Path, found: Results) -> list[pathlib.Path]:
    """Writes answers-NAME.jsonl of every model; returns the paths, none without embedded tasks."""
    return [
        files.write_text(
            directory / f"answers-{results[0].model}.jsonl",
            formatting.json_lines(_answer_records(results)),
        )
        for results in _group_by_model(found)
    ]


def _group_by_model(found: Results) -> list[list[BenchmarkResult]]:
    """Returns, for every model, its results of embedded tasks; [] if there are none."""
    embedded = [
        results
        for results in found.values()
        if results[0].benchmark.is_embedded and GENERATE in results[0].scores
    ]
    return [list(results) for results in zip(*embedded, strict=True)]


def _origin(result: BenchmarkResult) -> dict[str, str]:
    return {"name": result.model, "origin": result.origin}


def _is_right(line: Line) -> bool:
    return line["credit"][GENERATE] == 1.0


def _rows(result: BenchmarkResult) -> dict[str, list[Line]]:
    """Returns row -> the lines that count in it, for rows with lines."""
    rows: dict[str, list[Line]] = {name: [] for name in result.benchmark.rows}
    for line in result.lines:
        for name in line["rows"]:
            rows[name].append(line)
    return {name: lines for name, lines in rows.items() if lines}


def _score_rows(result: BenchmarkResult) -> dict[str, Any]:
    return {
        name: scoring.score_to_dict(Score(sum(map(_is_right, lines)), len(lines)))
        for name, lines in _rows(result).items()
    }


def _compare_rows(before: BenchmarkResult, after: BenchmarkResult) -> dict[str, Any]:
    after_rows = _rows(after)
    return {
        name: scoring.paired_to_dict(
            scoring.count_pairs(
                list(zip(map(_is_right, lines), map(_is_right, after_rows[name]), strict=True))
            )
        )
        for name, lines in _rows(before).items()
    }


def _answer_records(results: Sequence[BenchmarkResult]) -> Iterator[dict[str, Any]]:
    """Yields every question of one model with its answer."""
    for result in results:
        for line in result.lines:
            yield {
                "task": result.benchmark.name,
                "rows": line["rows"],
                "id": line["id"],
                "question": line["question"],
                "truth": line["truth"],
                "answer": line[GENERATE].get("generated", ""),
                "right": _is_right(line),
            }
