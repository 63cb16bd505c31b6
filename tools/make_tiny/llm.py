"""Pretrains the tiny LLM: a Qwen2 that knows every text-only skill, in ChatML dialogues.

Besides single questions it reads descriptions of imagined pictures and answers about them, in
long dialogues of mixed skills; so looking something up earlier in the conversation is nothing
new to it when, later, pictures stand where descriptions stood.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimiser
from flax import linen as nn

from wings_jax.data import conversation, tokenization
from wings_jax.model import layout, presets, wings
from wings_jax.scenes import questions, skills

# How often each skill is asked outside of imagined pictures.
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
SPACE = "Ġ"  # how byte-level BPE writes a space


@dataclasses.dataclass(frozen=True)
class LlmRun:
    """How the LLM is pretrained.

    A batch is `slots` slots in rows of `length`; every sixteenth batch in rows of `long`, so that
    far positions are known too. The first `warmup` steps read nothing but `pairs`: looking up is
    found there within a few hundred steps, and in full dialogues not within two thousand.
    """

    arch: presets.DecoderArch
    steps: int = 4500
    warmup: int = 900
    slots: int = 2048
    length: int = 256
    long: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0


def dialogue(rng: random.Random) -> list[dict[str, str]]:
    """Returns a random dialogue: questions of all skills, some about imagined pictures."""
    turns: list[tuple[str, str]] = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        dice = rng.random()
        if dice < 0.08:
            turns += pairs(rng)
        elif dice < 0.6:
            turns += imagined(rng)
        else:
            chosen = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=rng.randint(2, 6))
            turns += [skills.sample(rng, name, "train") for name in chosen]
    return spoken(turns)


def spoken(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Returns questions and answers as a conversation."""
    said = []
    for question, answer in turns:
        said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return said


def imagined(rng: random.Random) -> list[tuple[str, str]]:
    """Returns turns about a described picture; what the test holds out is left out.

    Half of them tell of more objects than a picture holds: among many, guessing an answer of the
    right sort is of no use, and so the model learns to look.
    """
    crowd = rng.randint(4, 6) if rng.random() < 0.5 else 0
    context, asked, mentioned = skills.imagine(rng, crowd)
    turns = [(turn.question, turn.answer) for turn in asked[: rng.randint(2, 6)]]
    if rng.random() < 0.4:
        turns.insert(rng.randint(0, len(turns)), mentioned)
    if rng.random() < 0.5:
        said = rng.sample(asked, min(len(asked), 6))
        turns.insert(0, (questions.DESCRIBE, " ".join(fact.answer for fact in said)))
    turns[0] = (f"{context}\n{turns[0][0]}", turns[0][1])
    return imagined(rng) if skills.is_test(turns[0][0]) else turns


def pairs(rng: random.Random) -> list[tuple[str, str]]:
    """Returns turns that repeat things and their colours in another order, in the fewest words.

    The shortest form of looking something up, which a small model finds first.
    """
    objects = questions.make_crowd(rng, rng.randint(3, 6))
    listed = " ".join(f"{o.name} {o.color}" for o in objects)
    asked = [rng.sample(objects, len(objects)) for _ in range(rng.randint(1, 3))]
    turns = [
        (" ".join(o.name for o in order), " ".join(f"{o.name} {o.color}" for o in order))
        for order in asked
    ]
    turns[0] = (f"{listed}\n{turns[0][0]}", turns[0][1])
    return turns


def rows(
    invent: Callable[[random.Random], list[dict[str, str]]],
    length: int,
    tokenizer: object,
    seed: str,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields packed rows of invented dialogues: tokens, segments and targets, each i32[T]."""
    rng = random.Random(f"dialogues-{seed}")
    template = conversation.TEMPLATES["chatml"]
    waiting: list[conversation.Expanded] = []
    while True:
        while len(waiting) < 24:
            encoded = conversation.encode(invent(rng), tokenizer, template)
            waiting.append(conversation.expand(encoded, 1, length=length))
        row = np.zeros((3, length), np.int32)
        row[2] = layout.IGNORE
        used = segment = 0
        later = []
        for one in sorted(waiting, key=lambda e: -len(e.tokens)):
            size = len(one.tokens)
            if used + size > length:
                later.append(one)
                continue
            segment += 1
            row[:, used : used + size] = one.tokens, np.full(size, segment), one.targets
            used += size
        waiting = later
        yield tuple(row)


def batches(run: LlmRun, tokenizer: object) -> Iterator[tuple[layout.Layout, np.ndarray]]:
    """Yields layouts [B,T] and targets i32[B,T]."""
    usual = rows(dialogue, run.length, tokenizer, f"{run.seed}-usual")
    long = rows(dialogue, run.long, tokenizer, f"{run.seed}-long")
    first = rows(lambda rng: spoken(pairs(rng)), run.length, tokenizer, f"{run.seed}-first")
    for step in itertools.count():
        length, source = (run.long, long) if step % 16 == 15 else (run.length, usual)
        if step < run.warmup:
            length, source = run.length, first
        taken = itertools.islice(source, run.slots // length)
        tokens, segments, targets = map(np.stack, zip(*taken, strict=True))
        modality = np.where(segments > 0, layout.TEXT, layout.PADDING)
        yield layout.make_layout(tokens, modality, segments), targets


def logits_of(params: dict, arch: presets.DecoderArch, rows: layout.Layout) -> jax.Array:
    """Returns f32[B,T,V] of text-only rows; `params` is the subtree of `decoder/`."""
    model = wings.Wings(presets.WingsArch(arch, None))
    hidden = model.apply({"params": {"decoder": params}}, text_batch(rows))
    return model.apply({"params": {"decoder": params}}, hidden, method=wings.Wings.logits)


def text_batch(rows: layout.Layout) -> layout.Batch:
    """Returns a batch without images."""
    count = rows.tokens.shape[0]
    return layout.Batch(rows, rows.tokens, jnp.zeros((count, 0, 8, 8, 3), jnp.uint8))


def init(run: LlmRun, rows: layout.Layout, vocabulary: Mapping[str, int]) -> dict:
    """Returns fresh parameters, the subtree of `decoder/`.

    A word starts with the same embedding with and without a space before it, up to one vector
    common to all, as a large LLM would find by itself. Whether that helps was not measured alone.
    """
    model = wings.Wings(presets.WingsArch(run.arch, None))
    params = nn.unbox(model.init(jax.random.key(run.seed), text_batch(rows))["params"]["decoder"])
    table = np.array(params["embed"]["embedding"]) * 15  # as large as what layers add to it
    space = table[vocabulary[SPACE]].copy()
    for word, at in vocabulary.items():
        bare = vocabulary.get(word.removeprefix(SPACE), at)
        if bare != at and len(word) > 2:
            table[at] = table[bare] + space
    params["embed"]["embedding"] = jnp.asarray(table)
    return optimiser.scale_up(params)


@functools.partial(jax.jit, static_argnames=("run", "tx"), donate_argnums=(0, 1))
def train_step(params, state, where, targets, *, run: LlmRun, tx):
    """One update; returns params, state, the loss and the share of answer tokens that are right."""

    def loss_of(params):
        logits = logits_of(params, run.arch, where)
        wanted = targets != layout.IGNORE
        safe = jnp.where(wanted, targets, 0)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
        count = jnp.maximum(wanted.sum(), 1)
        right = jnp.sum((logits.argmax(-1) == targets) & wanted)
        return jnp.sum(loss * wanted) / count, right / count

    (loss, right), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss, right


def score(
    params: dict, arch: presets.DecoderArch, tokenizer: object, each: int = 150
) -> dict[str, float]:
    """Returns the exact-match accuracy of greedy answers on each skill's test questions.

    An answer is right if every one of its tokens is the most likely one after those before it,
    which is what greedy decoding would give.
    """
    rng = random.Random("score")
    template = conversation.TEMPLATES["chatml"]
    forward = jax.jit(logits_of, static_argnames="arch")
    results = {}
    for name in skills.SKILLS:
        encoded = []
        for _ in range(each):
            question, answer = skills.sample(rng, name, "test")
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            encoded.append(conversation.expand(conversation.encode(turns, tokenizer, template), 1))
        width = 160 if name == "lookup" else 64
        tokens = np.zeros((each, width), np.int32)
        targets = np.full((each, width), layout.IGNORE, np.int32)
        modality = np.full((each, width), layout.PADDING, np.int32)
        for i, one in enumerate(encoded):
            size = len(one.tokens)
            tokens[i, :size], targets[i, :size], modality[i, :size] = one.tokens, one.targets, 1
        logits = forward(params, arch=arch, rows=layout.make_layout(tokens, modality))
        wrong = (np.asarray(logits).argmax(-1) != targets) & (targets != layout.IGNORE)
        results[name] = round(float(np.mean(~wrong.any(1))), 3)
    return results


def train(run: LlmRun, tokenizer: object, report_every: int = 500) -> dict:
    """Returns the pretrained subtree of `decoder/`."""
    vocabulary = tokenizer.get_vocab()
    tokenizer = tokenization.as_text_tokenizer(tokenizer)
    params = init(run, next(batches(run, tokenizer))[0], vocabulary)
    source = batches(run, tokenizer)
    tx = optimiser.make(run.learning_rate, run.steps, run.weight_decay)
    state = tx.init(params)
    start, cpu = time.time(), time.process_time()
    for step in range(run.steps):
        where, targets = next(source)
        params, state, loss, right = train_step(params, state, where, targets, run=run, tx=tx)
        if (step + 1) % 50 == 0:
            print(
                step + 1,
                f"loss {loss:.3f} right {right:.3f} {time.time() - start:.0f} s",
                flush=True,
            )
        if (step + 1) % report_every == 0:
            print(
                score(params, run.arch, tokenizer),
                f"{time.process_time() - cpu:.0f} CPU-s",
                flush=True,
            )
    return params
