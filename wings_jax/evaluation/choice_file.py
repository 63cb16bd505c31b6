"""A user's multiple-choice questions (`evaluate language --choices FILE.jsonl`).

Every line is {"id": str, "kind": str, "question": str, "choices": [str, ...], "answer": index};
`id` and `kind` are optional. Benchmarks such as ARC, OpenBookQA or MMLU take this form with a few
lines of Python.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from wings_jax.data.samples import shorten
from wings_jax.errors import UserError
from wings_jax.evaluation.everyday import ALL, PER_TOKEN, ChoiceQuestion
from wings_jax.evaluation.user_file import is_unicode, read_user_text

KEYS = {"id", "kind", "question", "choices", "answer"}


def read_choice_file(path: pathlib.Path) -> list[ChoiceQuestion]:
    """Returns the questions of a JSONL file; empty lines are skipped.

    Raises:
      UserError: the file cannot be read or has no question, or a line is wrong.
    """
    file_lines = read_user_text(path, "--choices").split("\n")

    # Errors name the line, counted with the empty ones.
    questions: dict[str, ChoiceQuestion] = {}
    for number, line in enumerate(file_lines, start=1):
        if not line.strip():
            continue
        try:
            question = _parse_line(line, number)
            if question.id in questions:
                raise UserError(f"id {shorten(question.id)} occurs twice")
        except UserError as error:
            raise UserError(f"--choices: {path}: line {number}: {error}") from error
        questions[question.id] = question

    if not questions:
        raise UserError(f"--choices: {path} contains no question")
    return list(questions.values())


def _parse_line(line: str, number: int) -> ChoiceQuestion:
    """Returns the question of a line. Raises UserError naming the key that is wrong."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"malformed JSON: {error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # too many digits, or too deeply nested
        raise UserError(f"malformed JSON: {error}") from error

    if not isinstance(record, Mapping):
        raise UserError(f"is {shorten(record)}, not an object")
    # A misspelled key would be ignored otherwise.
    unknown = sorted(set(record) - KEYS)
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r}; there are {', '.join(sorted(KEYS))}")

    text_fields = {"id": str(number), "kind": "", **record}
    # An id is by default the number of the line.
    for key in ("id", "kind", "question"):
        _check_string(key, text_fields.get(key), may_be_empty=key == "kind")
    if text_fields["kind"] in (ALL, PER_TOKEN):
        raise UserError(f"kind is {shorten(text_fields['kind'])}, which is the name of a total")

    choices = _parse_choices(record.get("choices"))
    answer = record.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):  # True is an int too
        raise UserError(f"answer is {shorten(answer)}, not a number from 0 to {len(choices) - 1}")
    return ChoiceQuestion(
        text_fields["id"], text_fields["kind"], text_fields["question"], choices, answer
    )


def _check_string(key: str, value: Any, *, may_be_empty: bool) -> None:
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        raise UserError(f"{key} is {shorten(value)}, not a text")
    _check_unicode(key, value)


def _check_unicode(key: str, text: str) -> None:
    if not is_unicode(text):
        shown = ascii(text)
        raise UserError(f"{key} is {shown}, which is not valid Unicode (half of a surrogate pair)")


def _parse_choices(value: Any) -> tuple[str, ...]:
    is_list = isinstance(value, list) and len(value) > 1
    if not is_list or not all(isinstance(choice, str) and choice.strip() for choice in value):
        raise UserError(f"choices is {shorten(value)}, not a list of two or more texts")
    if len({choice.strip() for choice in value}) < len(value):
        raise UserError(f"choices is {shorten(value)}: two are the same")
    for choice in value:
        _check_unicode("choices", choice)
    return tuple(value)
