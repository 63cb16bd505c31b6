"""Questions about an image, each with the one right answer, computed from the image's objects.

No pixels are used here: the same questions are asked about an image (`<image>`) and, as a
text-only skill, about its description. Example, for a red cat top left and a blue 7 bottom right:

    describe   The 7 is blue. The top left thing is a cat. The cat is red.
    digit      Which digit is blue?    The blue digit is 7.
    thing      What is top left?       The top left thing is a cat.
    colour     What colour is the 7?   The 7 is blue.
    where      Where is the cat?       The cat is top left.
    count      How many drawings are there?   1
    exists     Is there a fish?               no
    sum        What is the sum of the digits? (needs two digits)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from wings_jax.scenes import drawings
from wings_jax.scenes.drawings import COLORS, DIGITS, PLACES, THINGS, Placed

QuestionAnswer = tuple[str, str]


class QuestionTurn(NamedTuple):
    """A question and its answer.

    kind      a key of KINDS, "which", "caption" or a skill
    question  the text of the human turn
    answer    the text of the answer
    """

    kind: str
    question: str
    answer: str


ORDINALS = ("first", "second", "third")
DESCRIBE = "Describe the picture."


def make_objects(rng: random.Random, glyphs: drawings.Glyphs) -> tuple[Placed, ...]:
    """Returns 1-3 objects of different names and colors in different cells, by cell."""
    count = rng.choice((1, 2, 2, 3, 3))
    # Digits and things are equally frequent.
    digits = sum(rng.random() < 0.5 for _ in range(count))
    names = rng.sample(DIGITS, digits) + rng.sample(THINGS, count - digits)
    rng.shuffle(names)

    colors = rng.sample(list(COLORS), count)
    # Sorted, so that the objects are in reading order.
    cells = sorted(rng.sample(range(len(PLACES)), count))
    return tuple(_place(rng, glyphs, *chosen) for chosen in zip(names, colors, cells, strict=True))


def make_crowd(rng: random.Random, count: int) -> tuple[Placed, ...]:
    """Returns `count` <= 6 objects of different names and colors that have no place in an image."""
    names = rng.sample([*DIGITS, *THINGS], count)
    colors = rng.sample(list(COLORS), count)
    return tuple(
        Placed(name, color, None, -1, 0, (0, 0)) for name, color in zip(names, colors, strict=True)
    )


def _place(rng: random.Random, glyphs: drawings.Glyphs, name: str, color: str, cell: int) -> Placed:
    """Returns the object drawn with a random glyph of its name, inside its cell."""
    scale = rng.randint(24, 30)

    # The glyph may move within its cell, but not out of it.
    room = (drawings.CELL - scale) // 2
    shift = (rng.randint(-room, room), rng.randint(-room, room))
    return Placed(name, color, cell, rng.choice(glyphs.by_name[name]), scale, shift)


def describe(rng: random.Random, objects: Sequence[Placed], *, most: int = 6) -> str:
    """Returns a description of up to `most` statements, every object in one or two of them.

    Objects and statements are in random order, so a statement can only be predicted from the
    image, not from its position.
    """
    order = rng.sample(objects, len(objects))
    # Fewer statements per object where there are many, so that `most` cuts off few.
    statement_count = 2 if len(order) < 4 else 1
    statements = [fact for placed in order for fact in rng.sample(facts(placed), statement_count)]
    return " ".join(fact.answer for fact in statements[:most])


def facts(placed: Placed) -> list[QuestionTurn]:
    """Returns all questions about one object: its color, its place (if any), and which has them."""
    name = placed.name
    color_answer = f"The {name} is {placed.color}."
    turns = [QuestionTurn("colour", f"What colour is the {name}?", color_answer)]
    attributes = [placed.color]

    # An object that is only described has no place.
    if placed.cell is not None:
        place = PLACES[placed.cell]
        turns.append(QuestionTurn("where", f"Where is the {name}?", f"The {name} is {place}."))
        attributes.append(place)

    for which in attributes:
        if _is_digit(placed):
            answer = f"The {which} digit is {name}."
            turns.append(QuestionTurn("digit", f"Which digit is {which}?", answer))
        else:
            answer = f"The {which} thing is {article(name)}."
            turns.append(QuestionTurn("thing", f"What is {which}?", answer))
    return turns


def _is_digit(placed: Placed) -> bool:
    return placed.name in DIGITS


def _fact(kind: str) -> Callable[[random.Random, Sequence[Placed]], QuestionAnswer | None]:
    """Returns the function that asks a random fact of this kind."""

    def ask_fact(rng: random.Random, objects: Sequence[Placed]) -> QuestionAnswer | None:
        matching = [fact for placed in objects for fact in facts(placed) if fact.kind == kind]
        return rng.choice(matching)[1:] if matching else None

    return ask_fact


def _count(rng: random.Random, objects: Sequence[Placed]) -> QuestionAnswer | None:
    digits = sum(map(_is_digit, objects))
    # The things that are not digits are drawings.
    counts = {"digits": digits, "drawings": len(objects) - digits, "objects": len(objects)}
    counted = rng.choice(list(counts))
    return f"How many {counted} are there?", str(counts[counted])


def _exists(rng: random.Random, objects: Sequence[Placed]) -> QuestionAnswer | None:
    return ask_exists(
        rng, [placed.name for placed in objects], [placed.color for placed in objects]
    )


def ask_exists(rng: random.Random, names: Sequence[str], colors: Sequence[str]) -> tuple[str, str]:
    """Returns whether an object of some name, or sometimes of some color, is among these."""
    # Half of the answers are yes, so a guess without the image is right half of the time.
    is_there = rng.random() < 0.5

    if colors and rng.random() < 0.25:
        choices = colors if is_there else [color for color in COLORS if color not in colors]
        question = f"Is anything {rng.choice(choices)}?"
    else:
        kind = DIGITS if rng.random() < 0.5 else THINGS
        choices = names if is_there else [name for name in kind if name not in names]
        question = f"Is there {article(rng.choice(choices))}?"
    return question, "yes" if is_there else "no"


def _sum(rng: random.Random, objects: Sequence[Placed]) -> QuestionAnswer | None:
    del rng
    digits = [int(placed.name) for placed in objects if _is_digit(placed)]
    return ("What is the sum of the digits?", str(sum(digits))) if len(digits) > 1 else None


def article(name: str) -> str:
    """Returns the name after "a" or "an".

    >>> article("apple"), article("8"), article("cat")
    ('an apple', 'an 8', 'a cat')
    """
    return f"an {name}" if name[0] in "aeiou8" else f"a {name}"


KINDS: dict[str, Callable[[random.Random, Sequence[Placed]], QuestionAnswer | None]] = {
    "digit": _fact("digit"),
    "thing": _fact("thing"),
    "colour": _fact("colour"),
    "count": _count,
    "where": _fact("where"),
    "exists": _exists,
    "sum": _sum,
}


def ask(rng: random.Random, objects: Sequence[Placed], kind: str) -> QuestionAnswer | None:
    """Returns (question, answer) of this kind, or None if the image has no such question."""
    return KINDS[kind](rng, objects)


def ask_among(
    rng: random.Random, images: Sequence[Sequence[Placed]], kind: str
) -> QuestionAnswer | None:
    """Returns a question about one of several images: "In the second picture, ...".

    The kind "which" asks for the image that has an object that is in no other.
    """
    if kind == "which":
        return _which(rng, images)

    number = rng.randrange(len(images))
    question_answer = ask(rng, images[number], kind)
    if question_answer is None:
        return None
    question, answer = question_answer
    # The question continues a sentence: "In the second picture, what colour is ...".
    lowered = question[0].lower() + question[1:]
    return f"In the {ORDINALS[number]} picture, {lowered}", answer


def _which(rng: random.Random, images: Sequence[Sequence[Placed]]) -> QuestionAnswer | None:
    holders: dict[str, list[int]] = {}
    for number, objects in enumerate(images):
        for placed in objects:
            holders.setdefault(placed.name, []).append(number)

    # An object in several images has no single answer.
    unique = sorted(name for name, numbers in holders.items() if len(numbers) == 1)
    if not unique:
        return None
    name = rng.choice(unique)
    return f"Which picture has {article(name)}?", ORDINALS[holders[name][0]]


ALL_KINDS = (*KINDS, "which")


def ask_turns(
    rng: random.Random,
    images: Sequence[Sequence[Placed]],
    turns: int,
    kinds: Sequence[str] = ALL_KINDS,
) -> list[QuestionTurn]:
    """Returns up to `turns` different questions of random kinds about one or several images."""
    is_single = len(images) == 1
    kinds = [kind for kind in kinds if kind != "which" or not is_single]

    # A kind may have no question about these images, or a draw may repeat one: draw again.
    by_question: dict[str, QuestionTurn] = {}
    for _ in range(8 * turns):
        if len(by_question) == turns:
            break

        kind = rng.choice(kinds)
        question_answer = ask(rng, images[0], kind) if is_single else ask_among(rng, images, kind)
        if question_answer is not None:
            by_question.setdefault(question_answer[0], QuestionTurn(kind, *question_answer))
    return list(by_question.values())
