"""Rows of text benchmarks that need more than a choice of columns: a function for each oddity.

A rewrite takes a row and returns the rows that it stands for, with added or changed columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks.row_files import Row
from wings_jax.evaluation.benchmarks.subjects import CMMLU_SUBJECTS

Rewrite = Callable[[Row], Iterator[Row]]

_LETTERED = re.compile(r"\(([A-Z1-9])\)\s*")


def with_values(row: Row, **values: Any) -> Row:
    """Returns a row with more columns."""
    return Row(row.path, row.number, {**row.values, **values})


def split_lettered(row: Row) -> Iterator[Row]:
    """OpenBookQA's TSV: all choices in one cell, "(A) a marsh (B) a tundra"."""
    # Splitting at a group gives text, letter, text, ...: letters are at odd positions.
    parts = _LETTERED.split(row.values["Choices"])
    texts = [text.strip() for text in parts[2::2]]
    yield with_values(row, options=texts, labels=parts[1::2])


def split_article(row: Row) -> Iterator[Row]:
    """RACE's files: an article with the lists of its questions, options and answers."""
    lists = [row.values[name] for name in ("questions", "options", "answers")]
    if len({len(entries) for entries in lists}) != 1:
        raise UserError(f"{row.place}: questions, options and answers differ in number")

    # All questions share the article's identifier: their number is added.
    for number, (question, options, answer) in enumerate(zip(*lists, strict=True)):
        name = f"{row.values.get('id', row.path.stem)}-{number}"
        yield with_values(row, id=name, question=question, options=options, answer=answer)


def clean_wikihow(text: str) -> str:
    """Returns a text of HellaSwag without the marks of WikiHow, as lm-eval preprocesses it.

    >>> clean_wikihow("How to cook [title] Boil [step] Wait.  Eat.")
    'How to cook. Boil Wait. Eat.'
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag(row: Row) -> Iterator[Row]:
    """HellaSwag's own files: `query` is "activity: context", as in lm-eval."""
    values = row.values
    context = values.get("ctx") or ""

    # The second part of the context begins a sentence, as in lm-eval.
    if values.get("ctx_b") is not None and values.get("ctx_a"):
        context = f"{values['ctx_a']} {values['ctx_b'].capitalize()}"

    activity = values.get("activity_label", "")
    query = clean_wikihow(f"{activity}: {context}" if activity else context)
    endings = [clean_wikihow(ending) for ending in values["endings"]]

    yield with_values(
        row, passage=query.removeprefix(f"{activity}: "), query=query, options=endings
    )


def hellaswag_query(row: Row) -> Iterator[Row]:
    """OpenCompass' HellaSwag: `query` has the activity in front, choices are cleaned."""
    query = row.values["query"]
    yield with_values(row, passage=query.split(": ", 2)[-1], query=query)


def mark_spans(row: Row) -> Iterator[Row]:
    """WSC: `marked` is the text with * noun * and # pronoun #, `starred` with *pronoun* only.

    Spans are counted in words, or in characters in Chinese texts.
    """
    # SuperGLUE's files have the spans in the key "target", Hugging Face as columns.
    target = row.values.get("target", row.values)
    text, noun, pronoun = row.values["text"], target["span1_text"], target["span2_text"]

    # Chinese texts have no spaces between words.
    is_words = " " in text.strip()
    units = text.split(" ") if is_words else list(text)
    joint = " " if is_words else ""

    pieces: list[str] = []
    starred = list(units)
    spans = {
        int(target["span1_index"]): ("*", noun),
        int(target["span2_index"]): ("#", pronoun),
    }
    position = 0

    while position < len(units):
        if position not in spans:
            pieces.append(units[position])
            position += 1
            continue

        # A span may have several words, which become one piece.
        mark, words = spans[position]
        width = len(words.split(" ")) if is_words else len(words)
        pieces.append(f"{mark} {words} {mark}")
        # Its other words become empty, so that later positions stay valid.
        if mark == "#":
            starred[position : position + width] = [f"*{words}*"] + [""] * (width - 1)
        position += width

    yield with_values(
        row,
        marked=joint.join(pieces),
        starred=joint.join(word for word in starred if word),
        span1=noun,
        span2=pronoun,
    )


def winogrande(row: Row) -> Iterator[Row]:
    """WinoGrande: `tail` is what comes after the gap, without the spaces around it."""
    yield with_values(row, tail=row.values["sentence"].partition("_")[2].strip())


def cmmlu(row: Row) -> Iterator[Row]:
    """CMMLU: the Chinese name of the subject, which is the name of the file."""
    subject = row.path.stem
    yield with_values(row, subject_zh=CMMLU_SUBJECTS.get(subject, subject))


def gsm8k(row: Row) -> Iterator[Row]:
    """GSM8K: the answer is worked out, and its number comes after "####"."""
    worked, mark, number = row.values["answer"].rpartition("#### ")
    if not mark:
        raise UserError(f"{row.place}: the answer has no '####'")
    yield with_values(row, solution=row.values["answer"], worked=worked, number=number.strip())


def mbpp(row: Row) -> Iterator[Row]:
    """MBPP: tests as a tuple, and as the lines of the prompt; code without carriage returns."""
    values = row.values

    tests = list(values["test_list"])

    # The full and the sanitized data set have different keys.
    imports = values.get("test_setup_code") or "\n".join(values.get("test_imports") or ())

    yield with_values(
        row,
        text=values.get("text") or values.get("prompt"),
        tests=tests,
        test_lines="\n".join(tests),
        setup=imports.replace("\r\n", "\n"),
        code=values.get("code", "").replace("\r\n", "\n"),
    )


REWRITES: Mapping[str, Rewrite] = {
    "split_lettered": split_lettered,
    "split_article": split_article,
    "hellaswag": hellaswag,
    "hellaswag_query": hellaswag_query,
    "mark_spans": mark_spans,
    "winogrande": winogrande,
    "cmmlu": cmmlu,
    "gsm8k": gsm8k,
    "mbpp": mbpp,
}
