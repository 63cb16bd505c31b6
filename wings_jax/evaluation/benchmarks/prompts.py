"""What a model is asked: an item, with its shots, as text. Pure functions of data.

A likelihood protocol compares continuations, one per option, each after its context; where the
contexts of the options are the same text, they are computed once. Generation has one text, and
how the answer ends. Templates are those of `record.Prompt`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks.record import (
    LETTERS,
    Benchmark,
    DataSet,
    Item,
    Prompt,
)


@dataclasses.dataclass(frozen=True)
class ChoiceText:
    """The texts of one item whose likelihoods are compared."""

    # Before the context of every option: hint and shots.
    beginning: str
    # Context of each option, after the beginning.
    contexts: tuple[str, ...]
    # Scored continuation of each option.
    continuations: tuple[str, ...]
    # Each continuation without the delimiter before it: what `ll_bytes` and `ll_chars` divide by.
    answers: tuple[str, ...]


def select_shots(benchmark: Benchmark, data: DataSet, item: Item, count: int) -> list[Item]:
    """Returns the solved examples of an item, without itself.

    Raises:
      UserError: the split of the shots has fewer than `count` for the item.
    """
    shots = benchmark.shots
    pool = [other for other in data.shots if not shots.per_group or other.group == item.group]
    # Positions are those of the publication; more shots than that come from the rest, in order.
    chosen = [pool[i] for i in shots.positions if i < len(pool)]
    chosen += [other for other in pool if other not in chosen]

    # An item must not be its own example.
    if shots.split == benchmark.split:
        chosen = [other for other in chosen if other.id != item.id]

    if len(chosen) < count:
        where = f" of {item.group}" if shots.per_group and item.group else ""
        raise UserError(
            f"{benchmark.name}: {count} shots are asked for, the split {shots.split!r}{where} has "
            f"{len(chosen)}: lower --shots or add its file"
        )
    return chosen[:count]


def render_choice(prompt: Prompt, item: Item, shots: Sequence[Item]) -> ChoiceText:
    """Returns the texts of an item with options.

    >>> item = Item("1", "2 + 2 =", ("3", "4"), 1)
    >>> render_choice(Prompt("Q: {question}\\nA:"), item, [Item("0", "1 + 1 =", ("2", "5"), 0)])
    ... # doctest: +NORMALIZE_WHITESPACE
    ChoiceText(beginning='Q: 1 + 1 =\\nA: 2\\n\\n', contexts=('Q: 2 + 2 =\\nA:', 'Q: 2 + 2 =\\nA:'),
               continuations=(' 3', ' 4'), answers=('3', '4'))
    """
    # Templates may have the option in the context, in the answer, or in both.
    contexts, continuations = [], []
    for index in range(len(item.options)):
        values = fields(prompt, item, index)
        contexts.append(prompt.context.format_map(values))
        continuations.append(prompt.answer.format_map(values))

    return ChoiceText(
        render_beginning(prompt, item, shots),
        tuple(contexts),
        tuple(continuations),
        tuple(text.strip() or text for text in continuations),
    )


def render_generation(prompt: Prompt, item: Item, shots: Sequence[Item]) -> str:
    """Returns the text that an answer is generated after.

    >>> render_generation(Prompt("Q: {question}\\nA:"), Item("1", "2 + 2 ="), [])
    'Q: 2 + 2 =\\nA:'
    """
    context = prompt.context.format_map(fields(prompt, item, None))
    return render_beginning(prompt, item, shots) + context


def render_beginning(prompt: Prompt, item: Item, shots: Sequence[Item]) -> str:
    """Returns what comes before an item: the hint, published examples, and its shots."""
    # The hint is filled from the item itself, as it may name its subject.
    hint = prompt.hint.format_map(fields(prompt, item, None))
    solved = [_solve(prompt, shot) + prompt.separator for shot in shots]
    return hint + prompt.examples + "".join(solved)


def _solve(prompt: Prompt, shot: Item) -> str:
    """Returns an example with its right answer."""
    # An answer that is not an option is in the field `answer`.
    values = fields(prompt, shot, shot.answer if isinstance(shot.answer, int) else None)
    return prompt.context.format_map(values) + prompt.answer.format_map(values)


def fields(prompt: Prompt, item: Item, index: int | None) -> Mapping[str, Any]:
    """Returns the fields of templates for an item, with those of option `index` if it is given.

    Raises:
      UserError: the item has more options than there are letters.
    """
    if len(item.options) > len(LETTERS):
        raise UserError(f"item {item.id}: {len(item.options)} options, at most {len(LETTERS)}")

    letters = LETTERS[: len(item.options)]
    lines = [
        prompt.option_line.format(letter=letter, option=option, number=number)
        for number, (letter, option) in enumerate(zip(letters, item.options, strict=True), start=1)
    ]

    # Of several accepted answers, an example shows the first.
    answer = item.answer[0] if isinstance(item.answer, tuple) else item.answer
    values: dict[str, Any] = {
        **item.extra,
        "question": item.question,
        "options": "\n".join(lines),
        "letters": join_letters(letters),
        "group": item.group,
        "subject": item.extra.get("subject", item.group).replace("_", " "),
        "answer": answer,
    }
    if index is None:
        return values

    # The text around a gap (WinoGrande), and the sentence with the option in it.
    before, _, after = item.question.partition(prompt.gap) if prompt.gap else ("", "", "")
    option = item.options[index]
    return {
        **values,
        "option": option,
        "letter": letters[index],
        "number": index + 1,
        "filled": item.question.replace(prompt.gap, option) if prompt.gap else item.question,
        "before": before,
        "after": after.replace(prompt.gap, option) if prompt.gap else after,
    }


def join_letters(letters: str) -> str:
    """Returns letters as a list in words.

    >>> join_letters("ABCD"), join_letters("AB")
    ('A, B, C or D', 'A or B')
    """
    if len(letters) < 2:
        return letters
    return f"{', '.join(letters[:-1])} or {letters[-1]}"
