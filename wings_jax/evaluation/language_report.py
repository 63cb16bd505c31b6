"""Perplexities and multiple choice of one or several models side by side: tables and JSON."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from wings_jax import files, formatting
from wings_jax.evaluation import language, scoring
from wings_jax.evaluation.benchmarks import tables
from wings_jax.evaluation.benchmarks.text_likelihood import TextLikelihood
from wings_jax.evaluation.everyday import ALL, PER_TOKEN
from wings_jax.evaluation.language import Decision, LanguageResult
from wings_jax.evaluation.prose import Text
from wings_jax.evaluation.scoring import Score

Table = tuple[str, list[list[str]]]  # title, rows of cells
LEGEND = (
    "Multiple choice: right answers in % [95 % interval, Wilson]; the most likely choice counts, "
    "in the last row the most likely per token"
)


def language_tables(text: Text, results: Sequence[LanguageResult]) -> list[Table]:
    """Returns the tables with their titles: a column per model, changes are from the first."""
    tables = [_text_table(text, results), _choice_table(results)]
    if len(results) > 1:
        tables.append(_change_table(*results))
    return tables


def _text_table(text: Text, results: Sequence[LanguageResult]) -> Table:
    measured = [result.text for result in results]
    table_cells = [
        ["", *(result.name for result in results)],
        ["perplexity", *(_format_perplexity(likelihood) for likelihood in measured)],
        ["nats per token", *(f"{likelihood.nats_per_token:.4f}" for likelihood in measured)],
        ["bits per byte", *(f"{likelihood.bits_per_byte:.4f}" for likelihood in measured)],
        ["tokens", *(str(likelihood.tokens.sum()) for likelihood in measured)],
    ]

    # Ratios where there is more than one model; the first column has none.
    first_likelihood, *others = measured
    if others:
        ratios = (_format_ratio(likelihood, first_likelihood) for likelihood in others)
        table_cells.append([f"ratio to {results[0].name}", "", *ratios])

    # Checksum of the text: perplexities of different texts are not comparable.
    size, checksum = len(text.passages), text.sha256[:12]
    title = f"Plain text: {text.source}, {size} passages, SHA-256 {checksum}... [95 %]"
    return title, table_cells


def _format_perplexity(likelihood: TextLikelihood) -> str:
    return formatting.format_estimate(likelihood.perplexity, likelihood.interval, digits=3)


def _format_ratio(likelihood: TextLikelihood, before: TextLikelihood) -> str:
    ratio = likelihood.ratio(before)
    return formatting.format_estimate(*ratio, digits=4) if ratio else "(other tokens)"


def _choice_table(results: Sequence[LanguageResult]) -> Table:
    # row -> right or wrong, for each model
    by_model = [language.right_by_row(result.decisions) for result in results]

    table_cells = [["", "n", *(result.name for result in results)]]
    for row_name, first_marks in by_model[0].items():
        scores = (Score(sum(marks[row_name]), len(marks[row_name])) for marks in by_model)
        formatted = map(scoring.format_score, scores)
        table_cells.append([_row_title(row_name), str(len(first_marks)), *formatted])
    return LEGEND, table_cells


def _change_table(first_result: LanguageResult, *others: LanguageResult) -> Table:
    # row -> paired score, for each model but the first
    by_model = [language.paired_by_row(first_result, other) for other in others]

    table_cells = [["", *(other.name for other in others)]]
    for row_name in by_model[0]:
        changes = (scoring.format_change(rows[row_name]) for rows in by_model)
        table_cells.append([_row_title(row_name), *changes])

    title = f"Change from {first_result.name} in points [95 % interval, paired, Newcombe]"
    return title, table_cells


def _row_title(row_name: str) -> str:
    return f"{formatting.TOTAL}{row_name}" if row_name in (ALL, PER_TOKEN) else row_name


def text_report(text: Text, results: Sequence[LanguageResult]) -> str:
    """Returns the tables for a terminal."""
    sections = (
        f"{title}\n{formatting.text_table(table_cells)}"
        for title, table_cells in language_tables(text, results)
    )
    return "\n\n".join(sections)


def markdown_report(text: Text, results: Sequence[LanguageResult]) -> str:
    """Returns the tables in Markdown, with where each model comes from."""
    markdown_lines = ["# Language", ""]
    markdown_lines += [
        tables.model_line(result.name, result.origin, result.step) for result in results
    ]
    for title, table_cells in language_tables(text, results):
        markdown_lines += ["", f"{title}:", "", formatting.markdown_table(table_cells)]
    return "\n".join(markdown_lines) + "\n"


def report_to_dict(text: Text, results: Sequence[LanguageResult]) -> dict[str, Any]:
    """Returns every number as it is written to JSON; `change` is from the first model."""
    first_result, *others = results
    # The first model has no "change".
    models = [_result_to_dict(text, result) for result in results]

    for model, other in zip(models[1:], others, strict=True):
        model["change"] = _change_to_dict(first_result, other)
    return {"models": models}


def _result_to_dict(text: Text, result: LanguageResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "origin": result.origin,
        "step": result.step,
        "seconds": round(result.seconds, 2),
        "perplexity": _text_to_dict(text, result.text),
        "choices": {
            row_name: scoring.score_to_dict(Score(sum(is_right), len(is_right)))
            for row_name, is_right in language.right_by_row(result.decisions).items()
        },
    }


def _text_to_dict(text: Text, likelihood: TextLikelihood) -> dict[str, Any]:
    return {
        "value": formatting.round_for_json(likelihood.perplexity),
        "interval95": formatting.round_interval(likelihood.interval),
        "nats_per_token": formatting.round_for_json(likelihood.nats_per_token),
        "bits_per_byte": formatting.round_for_json(likelihood.bits_per_byte),
        "tokens": int(likelihood.tokens.sum()),
        "bytes": int(likelihood.bytes.sum()),
        "passages": len(text.passages),
        "source": text.source,
        "sha256": text.sha256,
    }


def _change_to_dict(before: LanguageResult, after: LanguageResult) -> dict[str, Any]:
    # None where the tokenizers differ.
    ratio, interval = after.text.ratio(before.text) or (None, None)
    return {
        "from": before.name,
        "perplexity": {
            "ratio": formatting.round_for_json(ratio),
            "interval95": formatting.round_interval(interval),
        },
        "choices": {
            row_name: scoring.paired_to_dict(paired)
            for row_name, paired in language.paired_by_row(before, after).items()
        },
    }


def write_report(
    directory: pathlib.Path, text: Text, results: Sequence[LanguageResult]
) -> list[pathlib.Path]:
    """Writes language.md, language.json and choices-NAME.jsonl; returns the paths."""
    contents = {
        "language.md": markdown_report(text, results),
        "language.json": formatting.json_text(report_to_dict(text, results)),
    }
    for result in results:
        # One file per model, one line per question.
        records = map(_decision_to_dict, result.decisions)
        contents[f"choices-{result.name}.jsonl"] = formatting.json_lines(records)

    return [files.write_text(directory / name, content) for name, content in contents.items()]


def _decision_to_dict(decision: Decision) -> dict[str, Any]:
    question = decision.question
    return {
        "id": question.id,
        "kind": question.kind,
        "question": question.question,
        "truth": question.choices[question.answer],
        "answer": question.choices[decision.chosen],
        "answer_per_token": question.choices[decision.chosen_per_token],
        "right": decision.is_right,
        "choices": [
            {"text": choice, "logprob": round(scored.logprob, 5), "tokens": scored.tokens}
            for choice, scored in zip(question.choices, decision.likelihoods, strict=True)
        ],
    }
