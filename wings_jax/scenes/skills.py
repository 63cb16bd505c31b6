"""Text-only questions whose answers use the words of the answers about images.

The tiny LLM is pretrained on all of these, before any image. Some are replayed in stage 2 among
the images and some never are: a replayed skill is not forgotten, so only the others show
forgetting. Skills with `held_out` reserve about a fifth of their questions for the test (decided
by a question's checksum); the others are tables and facts, the same in training and test.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Callable

from wings_jax.scenes import drawings, questions

ANIMALS = ("butterfly", "cat", "fish")
PLANTS = ("flower", "tree")
FRUITS = ("apple", "banana")
VEHICLES = ("airplane", "bicycle", "car")

# Property -> (question with {} for "a cat", the things for which the answer is yes).
PROPERTIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "animal": ("Is {} an animal?", ANIMALS),
    "plant": ("Is {} a plant?", PLANTS),
    "fruit": ("Is {} a fruit?", FRUITS),
    "alive": ("Is {} alive?", ANIMALS + PLANTS),
    "food": ("Can you eat {}?", (*FRUITS, "fish")),
    "flies": ("Can {} fly?", ("airplane", "butterfly")),
    "wheels": ("Does {} have wheels?", VEHICLES),
    "rides": ("Can you travel in or on {}?", VEHICLES),
    "sky": ("Is {} seen only in the sky?", ("star", "sun")),
}

RIDDLES: dict[str, tuple[str, ...]] = {
    "airplane": ("What flies people across the sea?", "What needs a pilot?"),
    "apple": ("What fruit is round?", "What do you bake a pie with?"),
    "banana": ("What fruit is long and bent?", "What do monkeys like to eat?"),
    "bicycle": ("What has two wheels?", "What do you ride with pedals?"),
    "book": ("What do you read?", "What has pages?"),
    "butterfly": ("What was once a caterpillar?", "What insect is pretty?"),
    "car": ("What has four wheels?", "What do you drive on a road?"),
    "cat": ("What catches mice?", "What says meow?"),
    "chair": ("What do you sit on?", "What has four legs and a back?"),
    "clock": ("What tells the time?", "What has two hands and a face?"),
    "cup": ("What do you drink from?", "What do you fill with tea?"),
    "fish": ("What lives in water?", "What has fins?"),
    "flower": ("What blooms in a garden?", "What do bees visit?"),
    "house": ("What do people live in?", "What has a roof?"),
    "key": ("What opens a lock?", "What do you turn in a door?"),
    "ladder": ("What do you climb to reach high?", "What has rungs?"),
    "star": ("What twinkles at night?", "What has five points?"),
    "sun": ("What shines by day?", "What warms the earth?"),
    "tree": ("What has a trunk and leaves?", "What grows in a forest?"),
    "umbrella": ("What keeps off the rain?", "What do you open when it rains?"),
}

COLOR_FACTS: dict[str, tuple[str, ...]] = {
    "red": ("What colour is blood?", "What colour means stop?"),
    "green": ("What colour is grass?", "What colour means go?"),
    "blue": ("What colour is a clear sky?", "What colour is the sea?"),
    "yellow": ("What colour is a lemon?", "What colour is a ripe banana?"),
    "orange": ("What colour is a carrot?", "What do red and yellow make?"),
    "purple": ("What colour is a plum?", "What do red and blue make?"),
    "white": ("What colour is snow?", "What colour is milk?"),
}


@dataclasses.dataclass(frozen=True)
class Skill:
    """A family of text-only questions.

    make      returns a random (question, answer)
    replayed  whether stage 2 may replay it among the images; if not it is only scored
    held_out  whether a part of its questions is reserved for the test, not used in pretraining
    """

    make: Callable[[random.Random], tuple[str, str]]
    replayed: bool
    held_out: bool


def _plus(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(0, 9), rng.randint(0, 9)
    return rng.choice((f"What is {left} plus {right}?", f"{left} + {right} = ?")), str(left + right)


def _minus(rng: random.Random) -> tuple[str, str]:
    right, difference = rng.randint(0, 9), rng.randint(0, 9)
    # Chosen from the difference, so that no answer is negative.
    left = right + difference
    return rng.choice((f"What is {left} minus {right}?", f"{left} - {right} = ?")), str(difference)


def _larger(rng: random.Random) -> tuple[str, str]:
    # Different numbers: one of them is larger.
    left, right = rng.sample(range(21), 2)
    word, pick = rng.choice((("larger", max), ("smaller", min)))
    return f"Which is {word}, {left} or {right}?", str(pick(left, right))


def _order(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(1, 29)
    word, step = rng.choice((("after", 1), ("before", -1)))
    return f"What number comes {word} {number}?", str(number + step)


def _parity(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(0, 30)
    word, rest = rng.choice((("even", 0), ("odd", 1)))
    return f"Is {number} {word}?", "yes" if number % 2 == rest else "no"


def _property(rng: random.Random) -> tuple[str, str]:
    question, holders = PROPERTIES[rng.choice(list(PROPERTIES))]
    # Half of the answers are yes, so that guessing from the question alone is at chance.
    is_holder = rng.random() < 0.5
    names = holders if is_holder else [thing for thing in drawings.THINGS if thing not in holders]
    name = questions.article(rng.choice(names))
    return question.format(name), "yes" if is_holder else "no"


def _riddle(rng: random.Random) -> tuple[str, str]:
    name = rng.choice(list(RIDDLES))
    return rng.choice(RIDDLES[name]), name


def _color_fact(rng: random.Random) -> tuple[str, str]:
    color = rng.choice(list(COLOR_FACTS))
    return rng.choice(COLOR_FACTS[color]), color


def _lookup(rng: random.Random) -> tuple[str, str]:
    # The question is about a statement of the text itself.
    context, turns, _ = imagine(rng)
    return f"{context}\n{turns[0].question}", turns[0].answer


SKILLS: dict[str, Skill] = {
    "plus": Skill(_plus, replayed=True, held_out=False),
    "minus": Skill(_minus, replayed=True, held_out=False),
    "lookup": Skill(_lookup, replayed=True, held_out=True),
    "larger": Skill(_larger, replayed=False, held_out=True),
    "order": Skill(_order, replayed=False, held_out=False),
    "parity": Skill(_parity, replayed=False, held_out=False),
    "property": Skill(_property, replayed=False, held_out=False),
    "riddle": Skill(_riddle, replayed=False, held_out=False),
    "colour-fact": Skill(_color_fact, replayed=False, held_out=False),
}
REPLAYED = tuple(name for name, skill in SKILLS.items() if skill.replayed)


def is_test(question: str) -> bool:
    """Returns whether a question of a skill with `held_out` belongs to the test."""
    # A fixed fifth of the questions, by their text: it does not depend on a seed or an order.
    return zlib.crc32(question.encode()) % 5 == 0


def sample(rng: random.Random, name: str, split: str) -> tuple[str, str]:
    """Returns a random (question, answer) of the skill in "train" or "test"."""
    skill = SKILLS[name]
    # Drawn again until the question belongs to the split.
    while True:
        question, answer = skill.make(rng)
        if not skill.held_out or is_test(question) == (split == "test"):
            return question, answer


def imagine(
    rng: random.Random, crowd: int = 0
) -> tuple[str, list[questions.QuestionTurn], tuple[str, str]]:
    """Returns a description of an imagined image, or of `crowd` objects, and its questions.

    The questions are those that a statement of the description answers, in random order, and
    one about whether something is mentioned.
    """
    if crowd:
        objects = questions.make_crowd(rng, crowd)
    else:
        objects = questions.make_objects(rng, drawings.load_glyphs("train"))

    statements = [fact for placed in objects for fact in rng.sample(questions.facts(placed), 2)]
    rng.shuffle(statements)
    context = " ".join(fact.answer for fact in statements)

    # A color that no statement names cannot be answered from the text.
    colors = [placed.color for placed in objects if placed.color in context]
    mentioned = questions.ask_exists(rng, [placed.name for placed in objects], colors)
    return context, rng.sample(statements, len(statements)), mentioned
