"""What can be asked about a picture, with the one right answer, computed from what is in it.

Nothing here knows pixels: the same questions are asked about a picture (`<image>`) and, as a
text-only skill, about its description. Example, for a red cat top left and a blue 7 bottom right:

    describe   top left: red cat, bottom right: blue 7.
    digit      Which digit is blue?   7          thing   What is top left?        cat
    colour     What colour is the 7?  blue       where   Where is the cat?        top left
    count      How many drawings are there? 1    exists  Is there a fish?         no
    sum        What is the sum of the digits?  (needs two digits)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from wings_jax.data import drawings
from wings_jax.data.drawings import COLOURS, DIGITS, PLACES, THINGS, Placed

Asked = tuple[str, str] | None


class Turn(NamedTuple):
    """A question of some kind and its answer."""

    kind: str
    question: str
    answer: str


ORDINALS = ("first", "second", "third")
DESCRIBE = "Describe the picture."


def make_objects(rng: random.Random, glyphs: drawings.Glyphs) -> tuple[Placed, ...]:
    """Returns 1-4 objects of different names and colours in different cells, by cell."""
    count = rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 4))
    digits = sum(rng.random() < 0.5 for _ in range(count))
    names = rng.sample(DIGITS, digits) + rng.sample(THINGS, count - digits)
    rng.shuffle(names)
    colours = rng.sample(list(COLOURS), count)
    cells = sorted(rng.sample(range(len(PLACES)), count))
    return tuple(_place(rng, glyphs, *chosen) for chosen in zip(names, colours, cells, strict=True))


def _place(
    rng: random.Random, glyphs: drawings.Glyphs, name: str, colour: str, cell: int
) -> Placed:
    """Returns the object drawn with a random glyph of its name, inside its cell."""
    scale = rng.randint(24, 30)
    room = (drawings.CELL - scale) // 2
    shift = (rng.randint(-room, room), rng.randint(-room, room))
    return Placed(name, colour, cell, rng.choice(glyphs.by_name[name]), scale, shift)


def describe(objects: Sequence[Placed]) -> str:
    """Returns the picture in words: place, colour and name of every object."""
    parts = [f"{PLACES[o.cell]}: {o.colour} {o.name}" for o in objects]
    return ", ".join(parts) + "."


def _is_digit(placed: Placed) -> bool:
    return placed.name in DIGITS


def _name(rng: random.Random, objects: Sequence[Placed], *, digit: bool) -> Asked:
    found = [o for o in objects if _is_digit(o) == digit]
    if not found:
        return None
    chosen = rng.choice(found)
    what = "Which digit" if digit else "What"
    which = chosen.colour if rng.random() < 0.6 else PLACES[chosen.cell]
    return f"{what} is {which}?", chosen.name


def _digit(rng: random.Random, objects: Sequence[Placed]) -> Asked:
    return _name(rng, objects, digit=True)


def _thing(rng: random.Random, objects: Sequence[Placed]) -> Asked:
    return _name(rng, objects, digit=False)


def _colour(rng: random.Random, objects: Sequence[Placed]) -> Asked:
    chosen = rng.choice(objects)
    return f"What colour is the {chosen.name}?", chosen.colour


def _where(rng: random.Random, objects: Sequence[Placed]) -> Asked:
    chosen = rng.choice(objects)
    what = chosen.colour + " one" if rng.random() < 0.2 else chosen.name
    return f"Where is the {what}?", PLACES[chosen.cell]


def _count(rng: random.Random, objects: Sequence[Placed]) -> Asked:
    digits = sum(map(_is_digit, objects))
    counts = {"digits": digits, "drawings": len(objects) - digits, "objects": len(objects)}
    what = rng.choice(list(counts))
    return f"How many {what} are there?", str(counts[what])


def _exists(rng: random.Random, objects: Sequence[Placed]) -> Asked:
    is_there = rng.random() < 0.5
    if rng.random() < 0.25:
        seen = [o.colour for o in objects]
        colours = seen if is_there else [c for c in COLOURS if c not in seen]
        question = f"Is anything {rng.choice(colours)}?"
    else:
        seen = [o.name for o in objects]
        kind = DIGITS if rng.random() < 0.5 else THINGS
        names = seen if is_there else [n for n in kind if n not in seen]
        question = f"Is there {article(rng.choice(names))}?"
    return question, "yes" if is_there else "no"


def _sum(rng: random.Random, objects: Sequence[Placed]) -> Asked:
    del rng
    digits = [int(o.name) for o in objects if _is_digit(o)]
    return ("What is the sum of the digits?", str(sum(digits))) if len(digits) > 1 else None


def article(name: str) -> str:
    """Returns the name behind "a" or "an"."""
    return f"an {name}" if name[0] in "aeiou8" else f"a {name}"


KINDS: dict[str, Callable[[random.Random, Sequence[Placed]], Asked]] = {
    "digit": _digit,
    "thing": _thing,
    "colour": _colour,
    "count": _count,
    "where": _where,
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
) -> list[Turn]:
    """Returns up to `turns` different questions of random kinds about one or several pictures."""
    kinds = [kind for kind in kinds if kind != "which" or len(pictures) > 1]
    found: dict[str, Turn] = {}
    for _ in range(8 * turns):
        if len(found) == turns:
            break
        kind = rng.choice(kinds)
        several = len(pictures) > 1
        asked = ask_among(rng, pictures, kind) if several else ask(rng, pictures[0], kind)
        if asked is not None:
            found.setdefault(asked[0], Turn(kind, *asked))
    return list(found.values())
