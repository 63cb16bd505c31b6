"""The tiny LLM's pretraining text: random dialogues of all text-only skills, in packed rows.

Besides single questions there are descriptions of imagined images and questions about them, in
long dialogues of mixed skills. So the LLM learns to look up facts earlier in the conversation,
before images take the place of the descriptions.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np

from wings_jax.data import conversation, tokenization
from wings_jax.model import layout
from wings_jax.scenes import questions, skills

# How often each skill is asked outside of imagined images.
WEIGHTS = {
    "plus": 3,
    "minus": 3,
    "larger": 4,
    "order": 2,
    "parity": 4,
    "property": 5,
    "riddle": 2,
    "colour-fact": 1,
}
TEMPLATE = conversation.TEMPLATES["chatml"]
QUEUE_SIZE = 24  # dialogues from which a row is packed

Turns = list[tuple[str, str]]  # questions and answers


def make_dialogue(rng: random.Random) -> list[dict[str, str]]:
    """Returns a random dialogue: questions of all skills, some about imagined images."""
    turns: Turns = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        dice = rng.random()
        if dice < 0.08:
            turns += make_pairs(rng)
        elif dice < 0.6:
            turns += make_imagined(rng)
        else:
            names = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=rng.randint(2, 6))
            turns += [skills.sample(rng, name, "train") for name in names]
    return as_conversation(turns)


def make_pair_dialogue(rng: random.Random) -> list[dict[str, str]]:
    """Returns a dialogue of `make_pairs` only."""
    return as_conversation(make_pairs(rng))


def make_imagined(rng: random.Random) -> Turns:
    """Returns turns about a described image, none of them a question of the test split.

    Half of them describe more objects than an image has: guessing is then rarely right, so the
    model has to look the answer up.
    """
    crowd = rng.randint(4, 6) if rng.random() < 0.5 else 0
    context, facts, mentioned = skills.imagine(rng, crowd)
    turns = [(turn.question, turn.answer) for turn in facts[: rng.randint(2, 6)]]

    if rng.random() < 0.4:
        turns.insert(rng.randint(0, len(turns)), mentioned)
    if rng.random() < 0.5:
        described = rng.sample(facts, min(len(facts), 6))
        turns.insert(0, (questions.DESCRIBE, " ".join(fact.answer for fact in described)))

    turns[0] = (f"{context}\n{turns[0][0]}", turns[0][1])
    return make_imagined(rng) if skills.is_test(turns[0][0]) else turns


def make_pairs(rng: random.Random) -> Turns:
    """Returns turns that repeat things and their colors in another order, and nothing else.

    The shortest form of looking something up, which a small model learns first.
    """
    objects = questions.make_crowd(rng, rng.randint(3, 6))
    listed = " ".join(f"{placed.name} {placed.color}" for placed in objects)

    orders = [rng.sample(objects, len(objects)) for _ in range(rng.randint(1, 3))]
    turns = [
        (
            " ".join(placed.name for placed in order),
            " ".join(f"{placed.name} {placed.color}" for placed in order),
        )
        for order in orders
    ]
    turns[0] = (f"{listed}\n{turns[0][0]}", turns[0][1])
    return turns


def as_conversation(turns: Turns) -> list[dict[str, str]]:
    """Returns questions and answers in LLaVA's form, with `from` and `value`."""
    messages = []
    for question, answer in turns:
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return messages


def encode_turns(
    turns: Turns, tokenizer: tokenization.AnyTokenizer, length: int | None = None
) -> conversation.Expanded:
    """Returns the tokens and targets of a dialogue, cut to `length`."""
    encoded = conversation.encode(as_conversation(turns), tokenizer, TEMPLATE)
    return conversation.expand(encoded, 1, length=length)


def pack_rows(
    make: Callable[[random.Random], list[dict[str, str]]],
    length: int,
    tokenizer: tokenization.AnyTokenizer,
    seed: str,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields packed rows of dialogues: tokens, segments and targets, each i32[T]."""
    rng = random.Random(f"dialogues-{seed}")
    queue: list[conversation.Expanded] = []
    while True:
        while len(queue) < QUEUE_SIZE:
            encoded = conversation.encode(make(rng), tokenizer, TEMPLATE)
            queue.append(conversation.expand(encoded, 1, length=length))

        row = np.zeros((3, length), np.int32)
        row[2] = layout.IGNORE
        used = segment = 0

        # Longest first; what does not fit waits for the next row.
        remaining = []
        for dialogue in sorted(queue, key=lambda dialogue: -len(dialogue.tokens)):
            size = len(dialogue.tokens)
            if used + size > length:
                remaining.append(dialogue)
                continue
            segment += 1
            row[:, used : used + size] = dialogue.tokens, np.full(size, segment), dialogue.targets
            used += size
        queue = remaining
        yield tuple(row)


def stack_rows(
    rows: Iterator[tuple[np.ndarray, ...]], count: int
) -> tuple[layout.Layout, np.ndarray]:
    """Returns the layout [B,T] and the targets i32[B,T] of the next `count` rows."""
    next_rows = itertools.islice(rows, count)
    tokens, segments, targets = map(np.stack, zip(*next_rows, strict=True))
    modality = np.where(segments > 0, layout.TEXT, layout.PADDING)
    return layout.make_layout(tokens, modality, segments), targets
