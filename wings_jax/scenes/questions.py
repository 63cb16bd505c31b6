"""What can be asked about a picture, with the one right answer, computed from what is in it.

Nothing here knows pixels: the same questions are asked about a picture (`<image>`) and, as a
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

Asked = tuple[str, str] | None


class QuestionTurn(NamedTuple):
    """A question of some kind and its answer."""

    kind: str
    question: str
    answer: str


ORDINALS = ("first", "second", "third")
DESCRIBE = "Describe the picture."


def make_objects(rng: random.Random, glyphs: drawings.Glyphs) -> tuple[Placed, ...]:
    """Returns 1-3 objects of different names and colours in different cells, by cell."""
    count = rng.choice((1, 2, 2, 3, 3))
    digits = sum(rng.random() < 0.5 for _ in range(count))
    names = rng.sample(DIGITS, digits) + rng.sample(THINGS, count - digits)
    rng.shuffle(names)
    colours = rng.sample(list(COLORS), count)
    cells = sorted(rng.sample(range(len(PLACES)), count))
    return tuple(_place(rng, glyphs, *chosen) for chosen in zip(names, colours, cells, strict=True))


def make_crowd(rng: random.Random, count: int) -> tuple[Placed, ...]:
    """Returns `count` <= 6 objects of different names and colours, in no place and never drawn."""
    names = rng.sample([*DIGITS, *THINGS], count)
    colours = rng.sample(list(COLORS), count)
    return tuple(
        Placed(name, colour, None, -1, 0, (0, 0))
        for name, colour in zip(names, colours, strict=True)
    )


def _place(
    rng: random.Random, glyphs: drawings.Glyphs, name: str, colour: str, cell: int
) -> Placed:
    """Returns the object drawn with a random glyph of its name, inside its cell."""
    scale = rng.randint(24, 30)
    room = (drawings.CELL - scale) // 2
    shift = (rng.randint(-room, room), rng.randint(-room, room))
    return Placed(name, colour, cell, rng.choice(glyphs.by_name[name]), scale, shift)


def describe(rng: random.Random, objects: Sequence[Placed], *, most: int = 6) -> str:
    """Returns the picture in words: up to `most` statements, every object in one or two of them.

    Objects and statements come in random order, so what is said of an object can only be known
    by finding it in the picture, not by its turn.
    """
    order = rng.sample(objects, len(objects))
    said = [fact for o in order for fact in rng.sample(facts(o), 2 if len(order) < 4 else 1)]
    return " ".join(fact.answer for fact in said[:most])


def facts(placed: Placed) -> list[QuestionTurn]:
    """Returns all that is asked about one object: colour, place (if any), and what has them."""
    name = placed.name
    made = [
        QuestionTurn("colour", f"What colour is the {name}?", f"The {name} is {placed.colour}.")
    ]
    known_by = [placed.colour]
    if placed.cell is not None:
        place = PLACES[placed.cell]
        made.append(QuestionTurn("where", f"Where is the {name}?", f"The {name} is {place}."))
        known_by.append(place)
    for which in known_by:
        if _is_digit(placed):
            made.append(
                QuestionTurn("digit", f"Which digit is {which}?", f"The {which} digit is {name}.")
            )
        else:
            answer = f"The {which} thing is {article(name)}."
            made.append(QuestionTurn("thing", f"What is {which}?", answer))
    return made


def _is_digit(placed: Placed) -> bool:
    return placed.name in DIGITS


def _fact(kind: str) -> Callable[[random.Random, Sequence[Placed]], Asked]:
    """Returns what asks a random fact of this kind."""

    def ask_fact(rng: random.Random, objects: Sequence[Placed]) -> Asked:
        known = [fact for o in objects for fact in facts(o) if fact.kind == kind]
        return rng.choice(known)[1:] if known else None

    return ask_fact


def _count(rng: random.Random, objects: Sequence[Placed]) -> Asked:
    digits = sum(map(_is_digit, objects))
    counts = {"digits": digits, "drawings": len(objects) - digits, "objects": len(objects)}
    what = rng.choice(list(counts))
    return f"How many {what} are there?", str(counts[what])


def _exists(rng: random.Random, objects: Sequence[Placed]) -> Asked:
    return ask_exists(rng, [o.name for o in objects], [o.colour for o in objects])


def ask_exists(rng: random.Random, names: Sequence[str], colours: Sequence[str]) -> tuple[str, str]:
    """Returns whether something of a name, or now and then of a colour, is among these."""
    is_there = rng.random() < 0.5
    if colours and rng.random() < 0.25:
        known = colours if is_there else [c for c in COLORS if c not in colours]
        question = f"Is anything {rng.choice(known)}?"
    else:
        kind = DIGITS if rng.random() < 0.5 else THINGS
        known = names if is_there else [n for n in kind if n not in names]
        question = f"Is there {article(rng.choice(known))}?"
    return question, "yes" if is_there else "no"


def _sum(rng: random.Random, objects: Sequence[Placed]) -> Asked:
    del rng
    digits = [int(o.name) for o in objects if _is_digit(o)]
    return ("What is the sum of the digits?", str(sum(digits))) if len(digits) > 1 else None


def article(name: str) -> str:
    """Returns the name behind "a" or "an"."""
    return f"an {name}" if name[0] in "aeiou8" else f"a {name}"


KINDS: dict[str, Callable[[random.Random, Sequence[Placed]], Asked]] = {
    "digit": _fact("digit"),
    "thing": _fact("thing"),
    "colour": _fact("colour"),
    "count": _count,
    "where": _fact("where"),
    "exists": _exists,
    "sum": _sum,
}


def ask(rng: random.Random, objects: Sequence[Placed], kind: str) -> Asked:
    """Returns (question, answer) of this kind, or None where the picture has no such question."""
    return KINDS[kind](rng, objects)


def ask_among(
    rng: random.Random, pictures: Sequence[Sequence[Placed]], kind: str
) -> tuple[str, str] | None:
    """Returns a question about one of several pictures: "In the second picture: ...".

    The kind "which" asks for the picture that holds something only one of them has.
    """
    if kind == "which":
        return _which(rng, pictures)
    number = rng.randrange(len(pictures))
    asked = ask(rng, pictures[number], kind)
    if asked is None:
        return None
    question = asked[0][0].lower() + asked[0][1:]
    return f"In the {ORDINALS[number]} picture, {question}", asked[1]


def _which(rng: random.Random, pictures: Sequence[Sequence[Placed]]) -> Asked:
    holders: dict[str, list[int]] = {}
    for number, objects in enumerate(pictures):
        for placed in objects:
            holders.setdefault(placed.name, []).append(number)
    alone = sorted(name for name, numbers in holders.items() if len(numbers) == 1)
    if not alone:
        return None
    name = rng.choice(alone)
    return f"Which picture has {article(name)}?", ORDINALS[holders[name][0]]


ALL_KINDS = (*KINDS, "which")


def ask_turns(
    rng: random.Random,
    pictures: Sequence[Sequence[Placed]],
    turns: int,
    kinds: Sequence[str] = ALL_KINDS,
) -> list[QuestionTurn]:
    """Returns up to `turns` different questions of random kinds about one or several pictures."""
    kinds = [kind for kind in kinds if kind != "which" or len(pictures) > 1]
    found: dict[str, QuestionTurn] = {}
    for _ in range(8 * turns):
        if len(found) == turns:
            break
        kind = rng.choice(kinds)
        several = len(pictures) > 1
        asked = ask_among(rng, pictures, kind) if several else ask(rng, pictures[0], kind)
        if asked is not None:
            found.setdefault(asked[0], QuestionTurn(kind, *asked))
    return list(found.values())
