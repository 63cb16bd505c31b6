"""Perplexities and multiple choice of one or several models side by side: tables and JSON."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from wings_jax import files, formatting
from wings_jax.evaluation import comparison, language, report
from wings_jax.evaluation.everyday import ALL, PER_TOKEN
from wings_jax.evaluation.language import Decision, LanguageResult, TextLikelihood
from wings_jax.evaluation.prose import Text
from wings_jax.evaluation.scoring import Score

Table = tuple[str, list[list[str]]]  # title, rows of cells
MEANING = (
    "Multiple choice: right answers in % [95 % interval, Wilson]; the likeliest choice counts, in "
    "the last row the likeliest per token"
)


def tables(text: Text, results: Sequence[LanguageResult]) -> list[Table]:
    """Returns the tables with their titles: a column per model, changes are from the first."""
    made = [_of_text(text, results), _of_choices(results)]
    if len(results) > 1:
        made.append(_of_changes(*results))
    return made


def _of_text(text: Text, results: Sequence[LanguageResult]) -> Table:
    readings = [result.reading for result in results]
    cells = [
        ["", *(result.name for result in results)],
        ["perplexity", *(_shown(one.perplexity, one.interval) for one in readings)],
        ["nats per token", *(f"{one.nats_per_token:.4f}" for one in readings)],
        ["bits per byte", *(f"{one.bits_per_byte:.4f}" for one in readings)],
        ["tokens", *(str(one.tokens.sum()) for one in readings)],
    ]
    first, *others = readings
    if others:
        ratios = (one.ratio(first) for one in others)
        shown = (_shown(*ratio, digits=4) if ratio else "(other tokens)" for ratio in ratios)
        cells.append([f"ratio to {results[0].name}", "", *shown])
    size, checksum = len(text.passages), text.sha256[:12]
    return f"Plain text: {text.source}, {size} passages, SHA-256 {checksum}... [95 %]", cells


def _of_choices(results: Sequence[LanguageResult]) -> Table:
    found = [language.outcomes(result.decisions) for result in results]
    cells = [["", "n", *(result.name for result in results)]]
    for row, first in found[0].items():
        scores = (report.shown(Score(sum(rows[row]), len(rows[row]))) for rows in found)
        cells.append([_label(row), str(len(first)), *scores])
    return MEANING, cells


def _of_changes(first: LanguageResult, *others: LanguageResult) -> Table:
    found = [language.changes(first, other) for other in others]
    cells = [["", *(other.name for other in others)]]
    for row in found[0]:
        cells.append([_label(row), *(comparison.shown(rows[row]) for rows in found)])
    return f"Change from {first.name} in points [95 % interval, paired, Newcombe]", cells


def _label(row: str) -> str:
    return f"= {row}" if row in (ALL, PER_TOKEN) else row


def _shown(value: float, interval: tuple[float, float] | None, digits: int = 3) -> str:
    ends = "" if interval is None else f" [{', '.join(f'{end:.{digits}f}' for end in interval)}]"
    return f"{value:.{digits}f}{ends}"


def as_text(text: Text, results: Sequence[LanguageResult]) -> str:
    """Returns the tables for a terminal."""
    made = (f"{title}\n{formatting.text_table(cells)}" for title, cells in tables(text, results))
    return "\n\n".join(made)


def as_markdown(text: Text, results: Sequence[LanguageResult]) -> str:
    """Returns the tables in Markdown, with where each model comes from."""
    lines = ["# Language", ""]
    for result in results:
        step = "" if result.step is None else f", step {result.step}"
        lines.append(f"- {result.name}: `{result.origin}`{step}")
    for title, cells in tables(text, results):
        lines += ["", f"{title}:", "", formatting.markdown_table(cells)]
    return "\n".join(lines) + "\n"


def as_json(text: Text, results: Sequence[LanguageResult]) -> dict[str, Any]:
    """Returns every number, for machines; `change` is from the first model to each other."""
    first, *others = results
    models = [
        {
            "name": result.name,
            "origin": result.origin,
            "step": result.step,
            "seconds": round(result.seconds, 2),
            "perplexity": _plain(text, result.reading),
            "choices": {
                row: report.plain(Score(sum(marks), len(marks)))
                for row, marks in language.outcomes(result.decisions).items()
            },
        }
        for result in results
    ]
    for model, other in zip(models[1:], others, strict=True):
        ratio, interval = other.reading.ratio(first.reading) or (None, None)
        paired = language.changes(first, other)
        model["change"] = {
            "from": first.name,
            "perplexity": {"ratio": _rounded(ratio), "interval95": _ends(interval)},
            "choices": {row: comparison.plain(found) for row, found in paired.items()},
        }
    return {"models": models}


def _plain(text: Text, reading: TextLikelihood) -> dict[str, Any]:
    return {
        "value": _rounded(reading.perplexity),
        "interval95": _ends(reading.interval),
        "nats_per_token": _rounded(reading.nats_per_token),
        "bits_per_byte": _rounded(reading.bits_per_byte),
        "tokens": int(reading.tokens.sum()),
        "bytes": int(reading.bytes.sum()),
        "passages": len(text.passages),
        "source": text.source,
        "sha256": text.sha256,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _ends(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else [round(end, 6) for end in interval]


def save(
    directory: pathlib.Path, text: Text, results: Sequence[LanguageResult]
) -> list[pathlib.Path]:
    """Writes language.md, language.json and every model's decisions; returns the paths."""
    made = {
        "language.md": as_markdown(text, results),
        "language.json": json.dumps(as_json(text, results), indent=1, ensure_ascii=False) + "\n",
    }
    for result in results:
        lines = (json.dumps(_line(one), ensure_ascii=False) for one in result.decisions)
        made[f"choices-{result.name}.jsonl"] = "".join(f"{line}\n" for line in lines)
    return [files.write_text(directory / name, content) for name, content in made.items()]


def _line(one: Decision) -> dict[str, Any]:
    item = one.item
    return {
        "id": item.id,
        "kind": item.kind,
        "question": item.question,
        "truth": item.choices[item.answer],
        "answer": item.choices[one.chosen],
        "answer_per_token": item.choices[one.chosen_per_token],
        "right": one.chosen == item.answer,
        "choices": [
            {"text": choice, "logprob": round(found.logprob, 5), "tokens": found.tokens}
            for choice, found in zip(item.choices, one.found, strict=True)
        ],
    }
