"""Interleaved image-text conversations (Wings, arXiv 2406.03496, section 4.2), from the package.

A setting says what the turns of a conversation are about, T text only and V a picture; with its
true answers before it the last question is scored. The paper joins turns that are neighbours in an
embedding; here an earlier turn is, of some that are drawn, the one that shares the rarest words
with the last question. For (T,V):

    human  What says meow?
    gpt    cat
    human  <image>
           Where is the cat?
    gpt    The cat is top left.                                          scored

Pictures are of held-out digits and drawings. Text questions that are scored come from skills that
are never replayed, for replay hides what is forgotten; earlier turns come from all skills but those
that describe a picture, for that would contradict the one that is shown.
"""

from __future__ import annotations

import collections
import functools
import random
import re
from collections.abc import Sequence

from wings_jax.data import samples
from wings_jax.scenes import dataset, drawings, questions, skills
from wings_jax.scenes.questions import QuestionTurn

SETTINGS = ("T", "TT", "TTT", "TTV", "TV", "V")
EACH = 120  # conversations of a setting
DRAWN = 32  # turns from which an earlier one is chosen
TEXT_KINDS = tuple(name for name, skill in skills.SKILLS.items() if not skill.replayed)
PICTURE_KINDS = tuple(kind for kind in questions.KINDS if kind != "sum")


def title(setting: str) -> str:
    """Returns the setting as the paper writes it: "(T,T,V)"."""
    return f"({','.join(setting)})"


ROWS = tuple(map(title, SETTINGS))


def conversations(each: int = EACH, seed: int = 0) -> list[samples.Sample]:
    """Returns `each` conversations of every setting, always the same ones.

    `extra` has `kinds`, one for each answer, and `setting`. Pictures are u8[64,64,3].
    """
    rng = random.Random(f"{seed}-iit")
    album = dataset.Album("test", rng)
    return [_make(album, setting, number) for setting in SETTINGS for number in range(each)]


def _make(album: dataset.Album, setting: str, number: int) -> samples.Sample:
    rng, pictures, names = album.rng, (), ()
    if setting[-1] == "V":
        kind = PICTURE_KINDS[number % len(PICTURE_KINDS)]
        name, scene = album.add(with_kind=kind)
        names, pictures = (name,), (drawings.render(scene, album.glyphs),)
        last = QuestionTurn(kind, *questions.ask(rng, scene, kind))
    else:
        kind = TEXT_KINDS[number % len(TEXT_KINDS)]
        last = QuestionTurn(kind, *skills.sample(rng, kind, "test"))
    turns: list[QuestionTurn] = [last]
    while len(turns) < len(setting):
        turns.insert(-1, neighbour(rng, turns))
    identity = f"iit-{setting}-{number}"
    record = dataset.make_record(identity, title(setting), turns, names, at=len(turns) - 1)
    extra = {key: record[key] for key in ("kinds", "setting")}
    return samples.Sample(identity, pictures, record["conversations"], extra)


def neighbour(rng: random.Random, turns: Sequence[QuestionTurn]) -> QuestionTurn:
    """Returns a text turn close to the last of `turns`, which it neither repeats nor gives away."""
    drawn: list[QuestionTurn] = []
    while len(drawn) < DRAWN:
        (turn,) = dataset.text_turns(rng, earlier_kinds(), "test", 1)
        if _may_precede(turn, turns):
            drawn.append(turn)
    counts = collections.Counter(word for turn in drawn for word in _words(turn.question))
    asked = _words(turns[-1].question)

    def closeness(turn: QuestionTurn) -> float:
        return sum(1 / counts[word] for word in sorted(asked & _words(turn.question)))

    return max(drawn, key=closeness)


@functools.cache
def earlier_kinds() -> tuple[str, ...]:
    """Returns the skills whose questions stand alone, without a description above them."""
    rng = random.Random(0)
    return tuple(n for n in skills.SKILLS if "\n" not in skills.sample(rng, n, "test")[0])


def _may_precede(turn: QuestionTurn, turns: Sequence[QuestionTurn]) -> bool:
    is_asked = any(turn.question == other.question for other in turns)
    gives_away = turn.answer not in ("yes", "no") and _words(turn.answer) <= _words(
        turns[-1].answer
    )
    return not (is_asked or gives_away)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
