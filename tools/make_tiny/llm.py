"""Pretrains the tiny LLM: a Qwen2 that has learned every text-only skill, in ChatML dialogues."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

import dialogues
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizer
import transformers
from flax import linen as nn

from wings_jax.data import tokenization
from wings_jax.model import layout, presets, wings
from wings_jax.scenes import skills

SPACE = "Ġ"  # how byte-level BPE writes a space
LONG_EVERY = 16  # every so many batches, one has long rows


@dataclasses.dataclass(frozen=True)
class LlmRun:
    """How the LLM is pretrained.

    arch           the LLM
    steps          number of updates
    warmup         steps at first that train on `dialogues.make_pairs` only: looking up is learned
                   there within a few hundred steps, in full dialogues not within two thousand
    slots          slots of a batch, in rows of `length`
    length         slots of a usual row
    long           slots of a row of every sixteenth batch, so that far positions are trained too
    learning_rate  peak
    weight_decay   of matrices
    seed           of the initialization and the dialogues
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


def make_batches(
    run: LlmRun, tokenizer: tokenization.AnyTokenizer
) -> Iterator[tuple[layout.Layout, np.ndarray]]:
    """Yields layouts [B,T] and targets i32[B,T]."""
    make, make_pairs = dialogues.make_dialogue, dialogues.make_pair_dialogue
    usual_rows = dialogues.pack_rows(make, run.length, tokenizer, f"{run.seed}-usual")
    long_rows = dialogues.pack_rows(make, run.long, tokenizer, f"{run.seed}-long")
    pair_rows = dialogues.pack_rows(make_pairs, run.length, tokenizer, f"{run.seed}-first")

    for step in itertools.count():
        if step < run.warmup:
            length, rows = run.length, pair_rows
        elif step % LONG_EVERY == LONG_EVERY - 1:
            length, rows = run.long, long_rows
        else:
            length, rows = run.length, usual_rows
        yield dialogues.stack_rows(rows, run.slots // length)


def text_batch(rows: layout.Layout) -> layout.Batch:
    """Returns a batch without images."""
    count = rows.tokens.shape[0]
    return layout.Batch(rows, rows.tokens, jnp.zeros((count, 0, 8, 8, 3), jnp.uint8))


def compute_logits(params: dict, arch: presets.DecoderArch, rows: layout.Layout) -> jax.Array:
    """Returns f32[B,T,V] of text-only rows; `params` is the subtree of `decoder/`."""
    model = wings.Wings(presets.WingsArch(arch, None))
    variables = {"params": {"decoder": params}}
    hidden = model.apply(variables, text_batch(rows))
    return model.apply(variables, hidden, method=wings.Wings.logits)


def initialize(run: LlmRun, rows: layout.Layout, vocabulary: Mapping[str, int]) -> dict:
    """Returns newly initialized parameters, the subtree of `decoder/`.

    A word starts with the same embedding with and without a space before it, up to one vector
    common to all, as large LLMs learn. Whether that helps was not measured separately.
    """
    model = wings.Wings(presets.WingsArch(run.arch, None))
    params = nn.unbox(model.init(jax.random.key(run.seed), text_batch(rows))["params"]["decoder"])

    table = np.array(params["embed"]["embedding"]) * 15  # as large as what layers add to it
    space = table[vocabulary[SPACE]].copy()
    for word, token in vocabulary.items():
        bare_token = vocabulary.get(word.removeprefix(SPACE), token)
        if bare_token != token and len(word) > 2:
            table[token] = table[bare_token] + space
    params["embed"]["embedding"] = jnp.asarray(table)
    return optimizer.scale_kernels(params)


@functools.partial(jax.jit, static_argnames=("run", "tx"), donate_argnums=(0, 1))
def train_step(
    params: dict,
    state: Any,
    rows: layout.Layout,
    targets: jax.Array,
    *,
    run: LlmRun,
    tx: optax.GradientTransformation,
) -> tuple[dict, Any, jax.Array, jax.Array]:
    """Returns the updated params and state, the loss, and the share of correct answer tokens."""

    def loss_of(params: dict) -> tuple[jax.Array, jax.Array]:
        logits = compute_logits(params, run.arch, rows)
        is_target = targets != layout.IGNORE
        safe_targets = jnp.where(is_target, targets, 0)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, safe_targets)

        count = jnp.maximum(is_target.sum(), 1)
        correct = jnp.sum((logits.argmax(-1) == targets) & is_target)
        return jnp.sum(loss * is_target) / count, correct / count

    (loss, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss, accuracy


def score_skills(
    params: dict,
    arch: presets.DecoderArch,
    tokenizer: tokenization.AnyTokenizer,
    num_questions: int = 150,
) -> dict[str, float]:
    """Returns the exact-match accuracy of greedy answers on each skill's test questions.

    An answer is right if each of its tokens is the most likely one after those before it,
    which is what greedy decoding would generate.
    """
    rng = random.Random("score")
    forward = jax.jit(compute_logits, static_argnames="arch")
    accuracies = {}
    for name in skills.SKILLS:
        width = 160 if name == "lookup" else 64
        tokens = np.zeros((num_questions, width), np.int32)
        targets = np.full((num_questions, width), layout.IGNORE, np.int32)
        modality = np.full((num_questions, width), layout.PADDING, np.int32)
        for row in range(num_questions):
            dialogue = dialogues.encode_turns([skills.sample(rng, name, "test")], tokenizer)
            size = len(dialogue.tokens)
            tokens[row, :size] = dialogue.tokens
            targets[row, :size] = dialogue.targets
            modality[row, :size] = layout.TEXT

        logits = forward(params, arch=arch, rows=layout.make_layout(tokens, modality))
        is_wrong = (np.asarray(logits).argmax(-1) != targets) & (targets != layout.IGNORE)
        accuracies[name] = round(float(np.mean(~is_wrong.any(1))), 3)
    return accuracies


def pretrain(
    run: LlmRun, tokenizer: transformers.PreTrainedTokenizerFast, report_every: int = 500
) -> dict:
    """Returns the pretrained subtree of `decoder/`; prints the loss and held-out accuracies."""
    vocabulary = tokenizer.get_vocab()
    text_tokenizer = tokenization.as_text_tokenizer(tokenizer)
    first_rows, _ = next(make_batches(run, text_tokenizer))
    params = initialize(run, first_rows, vocabulary)

    batches = make_batches(run, text_tokenizer)
    tx = optimizer.make_optimizer(run.learning_rate, run.steps, run.weight_decay)
    state = tx.init(params)
    start, cpu_start = time.time(), time.process_time()
    for step in range(1, run.steps + 1):
        rows, targets = next(batches)
        params, state, loss, accuracy = train_step(params, state, rows, targets, run=run, tx=tx)

        if step % 50 == 0:
            seconds = time.time() - start
            print(f"{step} loss {loss:.3f} accuracy {accuracy:.3f} {seconds:.0f} s", flush=True)
        if step % report_every == 0:
            cpu_seconds = time.process_time() - cpu_start
            scores = score_skills(params, run.arch, text_tokenizer)
            print(scores, f"{cpu_seconds:.0f} CPU-s", flush=True)
    return params
