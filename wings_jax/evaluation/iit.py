"""Interleaved image-text conversations (Wings, arXiv 2406.03496, section 4.2), from the package.

The letters of a setting are its turns: T a text-only question, V a question about an image. The
earlier turns have their true answers, and the answer to the last question is scored. The paper
joins turns that are neighbors in an embedding; here an earlier turn is the one, of several random
ones, that shares the rarest words with the last question. For (T,V):

    human  What says meow?
    gpt    cat
    human  <image>
           Where is the cat?
    gpt    The cat is top left.                                          scored

Images are of held-out digits and drawings. Text questions that are scored come from skills that
are never replayed, because replay hides forgetting. Earlier turns come from all skills except those
that describe an image, which would contradict the image that is shown.
"""

from __future__ import annotations

import collections
import functools
import random
import re
from collections.abc import Sequence

import numpy as np

from wings_jax.data import samples
from wings_jax.scenes import dataset, drawings, questions, skills
from wings_jax.scenes.questions import QuestionTurn

SETTINGS = ("T", "TT", "TTT", "TTV", "TV", "V")
EACH = 120  # conversations of a setting
CANDIDATES = 32  # random turns from which an earlier one is chosen
TEXT_KINDS = tuple(name for name, skill in skills.SKILLS.items() if not skill.replayed)
IMAGE_KINDS = tuple(kind for kind in questions.KINDS if kind != "sum")


def format_setting(setting: str) -> str:
    """Returns the setting as the paper writes it.

    >>> format_setting("TTV")
    '(T,T,V)'
    """
    return f"({','.join(setting)})"


ROWS = tuple(map(format_setting, SETTINGS))


def make_conversations(each: int = EACH, seed: int = 0) -> list[samples.Sample]:
    """Returns `each` conversations of every setting, the same ones at every call.

    `extra` has `kinds`, one for each answer, and `setting`. Images are u8[64,64,3].
    """
    rng = random.Random(f"{seed}-iit")
    album = dataset.Album("test", rng)
    return [
        _make_conversation(album, setting, number) for setting in SETTINGS for number in range(each)
    ]


def _make_conversation(album: dataset.Album, setting: str, number: int) -> samples.Sample:
    rng = album.rng
    images: tuple[np.ndarray, ...] = ()
    image_names: tuple[str, ...] = ()

    # The scored question, about an image or a text skill.
    if setting[-1] == "V":
        question_kind = IMAGE_KINDS[number % len(IMAGE_KINDS)]
        image_name, scene = album.add(with_kind=question_kind)
        image_names, images = (image_name,), (drawings.render(scene, album.glyphs),)
        question = questions.ask(rng, scene, question_kind)
        assert question is not None  # the album chose a scene that has this kind
        last_turn = QuestionTurn(question_kind, *question)
    else:
        question_kind = TEXT_KINDS[number % len(TEXT_KINDS)]
        last_turn = QuestionTurn(question_kind, *skills.sample(rng, question_kind, "test"))

    # The turns before it.
    all_turns: list[QuestionTurn] = [last_turn]
    while len(all_turns) < len(setting):
        all_turns.insert(-1, choose_earlier_turn(rng, all_turns))

    identifier = f"iit-{setting}-{number}"
    record = dataset.make_record(
        identifier, format_setting(setting), all_turns, image_names, at=len(all_turns) - 1
    )
    extra = {key: record[key] for key in ("kinds", "setting")}
    return samples.Sample(identifier, images, record["conversations"], extra)


def choose_earlier_turn(rng: random.Random, turns: Sequence[QuestionTurn]) -> QuestionTurn:
    """Returns a text turn close to the last of `turns`, which neither repeats nor answers it."""
    candidates: list[QuestionTurn] = []
    while len(candidates) < CANDIDATES:
        (turn,) = dataset.text_turns(rng, earlier_kinds(), "test", 1)
        if _may_precede(turn, turns):
            candidates.append(turn)

    # A word that few candidates have counts more.
    counts = collections.Counter(word for turn in candidates for word in _words(turn.question))
    last_words = _words(turns[-1].question)

    def closeness(turn: QuestionTurn) -> float:
        shared_words = sorted(last_words & _words(turn.question))
        return sum(1 / counts[word] for word in shared_words)

    return max(candidates, key=closeness)


@functools.cache
def earlier_kinds() -> tuple[str, ...]:
    """Returns the skills whose questions stand alone, without a description above them."""
    rng = random.Random(0)
    return tuple(
        skill_name
        for skill_name in skills.SKILLS
        if "\n" not in skills.sample(rng, skill_name, "test")[0]
    )


def _may_precede(turn: QuestionTurn, turns: Sequence[QuestionTurn]) -> bool:
    if any(turn.question == other.question for other in turns):
        return False
    # "yes" and "no" give no other answer away.
    if turn.answer in ("yes", "no"):
        return True
    return not _words(turn.answer) <= _words(turns[-1].answer)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
