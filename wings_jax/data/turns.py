"""The turns of a sample: checked speakers and texts, and as many image markers as images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax.data import samples

MARKER = "<image>"  # stands for an image in the text of a human turn
ESCAPED_MARKER = "\\<image>"  # the word itself, in a human turn
SPEAKERS = {
    "system": "system",
    "human": "human",
    "user": "human",
    "observation": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "chatgpt": "gpt",
    "model": "gpt",
}
_MARKER_PATTERN = re.compile(r"(?<!\\)<image>")

Turns = Sequence[Mapping[str, str]]


def normalize_sample(sample: samples.Sample, *, needs_answer: bool = True) -> list[dict[str, str]]:
    """Returns the turns with as many markers as the sample has images, each in a human turn.

    Markers exist only in the human turns of samples that have images; everywhere else `<image>`
    is a word like any other. In a human turn `\\<image>` is always the word.

    One image: the first marker of the first human turn that has one stays where it is, all
    others are removed; if no human turn has one, it is put before the last human turn. Several
    images: the human turns must hold exactly as many markers. No image: the word is escaped in
    the returned human turns, as `conversation.encode` expects it.

    >>> turns = [{"from": "user", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]
    >>> normalize_sample(samples.Sample("one", ("cat.png",), turns))[0]
    {'from': 'human', 'value': '<image>\\nWhat is it?'}

    Raises:
      BadSample: malformed turns, no human turn, no assistant turn (with `needs_answer`), or
        counts that differ.
    """
    if sample.form is None:
        keys = ", ".join(map(str, sample.extra)) or "none"
        raise samples.BadSample(samples.UNKNOWN_FORM, f"its keys are {keys}")
    if not isinstance(sample.conversations, Sequence) or isinstance(sample.conversations, str):
        raise samples.BadSample(samples.MALFORMED, "conversations is not a list of turns")
    turns = [parse_turn(turn) for turn in sample.conversations]

    speakers = [speaker for speaker, _ in turns]
    if "human" not in speakers:
        raise samples.BadSample(samples.NO_HUMAN_TURN, f"{len(turns)} turns")
    if needs_answer and "gpt" not in speakers:
        raise samples.BadSample(samples.NO_ANSWER, f"{len(turns)} turns")

    turns = _place_markers(turns, len(sample.images))
    return [{"from": speaker, "value": text} for speaker, text in turns]


def parse_turn(turn: Any, *, strip: bool = False) -> tuple[str, str]:
    """Returns the speaker (system, human or gpt) and the text of a turn.

    Raises:
      BadSample: it is not {"from": speaker, "value": text}.
    """
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        detail = f'a turn is {samples.shorten(turn)}, not {{"from", "value"}}'
        raise samples.BadSample(samples.MALFORMED, detail)

    # Speakers have several spellings; texts must be valid Unicode to be tokenized.
    speaker, text = speaker_of(turn), turn["value"]
    if speaker is None:
        detail = f"speaker {turn['from']!r} is none of {', '.join(SPEAKERS)}"
        raise samples.BadSample(samples.MALFORMED, detail)
    if not isinstance(text, str):
        raise samples.BadSample(samples.MALFORMED, f"a turn's value is {samples.shorten(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"a turn's text is not valid Unicode: {error.reason} at {error.start}"
        raise samples.BadSample(samples.MALFORMED, detail) from error
    return speaker, text.strip() if strip else text


def speaker_of(turn: Any) -> str | None:
    """Returns system, human or gpt; None if the turn has no known speaker."""
    speaker = turn.get("from") if isinstance(turn, Mapping) else None
    return SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None


def count_markers(text: str) -> int:
    """Returns how many images the text of a human turn stands for.

    >>> count_markers(r"<image>What does \\<image> mean?")
    1
    """
    return len(_MARKER_PATTERN.findall(text))


def split_markers(text: str) -> list[str]:
    """Returns the texts between the markers of a human turn, with escaped words unescaped.

    >>> split_markers(r"a<image>b \\<image>")
    ['a', 'b <image>']
    """
    return [part.replace(ESCAPED_MARKER, MARKER) for part in _MARKER_PATTERN.split(text)]


def escape_markers(text: str) -> str:
    """Returns the text of a human turn in which every `<image>` is the word itself.

    >>> escape_markers("What does <image> mean?")
    'What does \\\\<image> mean?'
    """
    return _MARKER_PATTERN.sub(lambda _: ESCAPED_MARKER, text)


def _place_markers(turns: Sequence[tuple[str, str]], images: int) -> list[tuple[str, str]]:
    """Returns the turns (speaker, text) with exactly `images` markers, all in human turns."""
    speakers = [speaker for speaker, _ in turns]
    counts = [count_markers(text) if speaker == "human" else 0 for speaker, text in turns]
    if images > 1 and sum(counts) != images:
        detail = f"{images} images, {sum(counts)} {MARKER} in human turns"
        raise samples.BadSample(samples.MARKERS, detail)

    # Answers and system texts are not changed.
    placed = list(turns)
    remaining = images
    for number, (speaker, text) in enumerate(turns):
        if speaker != "human":
            continue
        if not images:
            placed[number] = (speaker, escape_markers(text))
            continue
        # Of all markers the first `images` stay.
        count = min(counts[number], remaining)
        remaining -= count
        placed[number] = (speaker, _limit_markers(text, count))

    # An image without a marker stands before the last question.
    if remaining:
        last = len(speakers) - 1 - speakers[::-1].index("human")
        placed[last] = ("human", f"{MARKER}\n{placed[last][1]}")
    return placed


def _limit_markers(text: str, count: int) -> str:
    """Returns `text` with its first `count` markers, the others removed.

    >>> _limit_markers("<image>a<image>b", 1)
    '<image>ab'
    """
    parts = _MARKER_PATTERN.split(text)
    return MARKER.join(parts[: count + 1]) + "".join(parts[count + 1 :])
