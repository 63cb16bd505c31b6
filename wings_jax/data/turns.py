"""The turns of a sample: checked speakers and texts, and as many image markers as images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax.data import samples

MARKER = "<image>"  # stands for an image in the text of a human turn
SPEAKERS = {"system": "system", "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}

Turns = Sequence[Mapping[str, str]]


def normalize_sample(sample: samples.Sample, *, needs_answer: bool = True) -> list[dict[str, str]]:
    """Returns the turns with as many markers as the sample has images, each in a human turn.

    One image: the first marker of the first human turn that has one stays where it is, all
    others are removed; if no human turn has one, it is put before the last human turn. No image:
    all markers are removed. Several images: the human turns must hold exactly as many markers.

    >>> turns = [{"from": "user", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]
    >>> normalize_sample(samples.Sample("one", ("cat.png",), turns))[0]
    {'from': 'human', 'value': '<image>\\nWhat is it?'}

    Raises:
      BadSample: malformed turns, no human turn, no assistant turn (with `needs_answer`), or
        counts that differ.
    """
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

    speaker, text = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        known = ", ".join(SPEAKERS)
        raise samples.BadSample(samples.MALFORMED, f"speaker {speaker!r} is none of {known}")
    if not isinstance(text, str):
        raise samples.BadSample(samples.MALFORMED, f"a turn's value is {samples.shorten(text)}")
    return SPEAKERS[speaker], text.strip() if strip else text


def _place_markers(turns: Sequence[tuple[str, str]], images: int) -> list[tuple[str, str]]:
    """Returns the turns (speaker, text) with exactly `images` markers, all in human turns."""
    speakers = [speaker for speaker, _ in turns]
    counts = [text.count(MARKER) if speaker == "human" else 0 for speaker, text in turns]
    if images > 1 and sum(counts) != images:
        detail = f"{images} images, {sum(counts)} {MARKER} in human turns"
        raise samples.BadSample(samples.MARKERS, detail)

    # An image without a marker stands before the last question.
    if images == 1 and not any(counts):
        placed = [(speaker, text.replace(MARKER, "")) for speaker, text in turns]
        last = len(speakers) - 1 - speakers[::-1].index("human")
        placed[last] = ("human", f"{MARKER}\n{placed[last][1]}")
        return placed

    # Of all markers the first `images` stay; those of other speakers have count 0.
    remaining = images
    placed = []
    for (speaker, text), count in zip(turns, counts, strict=True):
        count = min(count, remaining)
        remaining -= count
        placed.append((speaker, _limit_markers(text, count)))
    return placed


def _limit_markers(text: str, count: int) -> str:
    """Returns `text` with its first `count` markers, the others removed.

    >>> _limit_markers("<image>a<image>b", 1)
    '<image>ab'
    """
    parts = text.split(MARKER)
    return MARKER.join(parts[: count + 1]) + "".join(parts[count + 1 :])
