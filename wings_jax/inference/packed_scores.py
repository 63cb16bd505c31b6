"""Likelihoods of answers to short prompts, with several requests in a row.

A request is a tree: its prompt and what all answers start with are the trunk, the rest of each
answer is a branch after it (`layout.Visibility.branches`). Rows of one length hold as many trees
as fit, so that few slots are padding and few shapes are compiled, and nothing is cached. A
prompt "a b" with the answers "c d e" and "c f g", of which the last tokens predict nothing:

    tokens     a  b  c  d  f
    positions  0  1  2  3  3
    branches   0  0  0  1  2
    predicts   -  c  d  e  g      the answers' tokens; the state at c predicts f, too
                     f
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wings_jax import axes, distributed
from wings_jax.inference import chunks, engine, scoring_plan
from wings_jax.inference.engine import Chunk, ModelSpec, Weights
from wings_jax.inference.scoring_plan import ScoringRequest
from wings_jax.model import layout
from wings_jax.model.layout import PADDING, TEXT
from wings_jax.model.presets import WingsArch

BLOCK = 256  # states whose logits are computed at once
STEP, SMALL_STEP = 64, 16  # what the states of a block, and few states, are padded to
PROMPT, COMMON = -2, -1  # parts of a tree besides the answers 0, 1, ...


@dataclasses.dataclass(frozen=True)
class ScoredTokens:
    """The predicted tokens of requests.

    part         i32[n]   PROMPT, COMMON or the number of an answer
    logprobs     f32[n]
    is_likeliest bool[n]
    """

    part: np.ndarray
    logprobs: np.ndarray
    is_likeliest: np.ndarray

    def of(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the log-probabilities of one part's tokens, and whether each is likeliest."""
        chosen = self.part == part
        return self.logprobs[chosen], self.is_likeliest[chosen]


@dataclasses.dataclass(frozen=True)
class RequestTree:
    """A request as slots.

    tokens, positions, branches  i32[n] of the slots
    sources                      i32[m], the slots whose states predict tokens
    targets                      i32[m], these tokens
    parts                        i32[m], what each belongs to, see `ScoredTokens.part`
    """

    tokens: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    parts: np.ndarray


def make_tree(request: ScoringRequest) -> RequestTree:
    """Returns the tree of a request without images."""
    prompt, common = request.prompt.tokens, scoring_plan.common_ids(request)
    trunk = np.concatenate([prompt, np.asarray(common, np.int32)])
    slots = [trunk]
    positions, branches = [np.arange(len(trunk))], [np.zeros(len(trunk), int)]

    # Each slot of the trunk predicts the next one.
    first = 1 if request.with_prompt else len(prompt)
    sources, targets = [np.arange(first, len(trunk)) - 1], [trunk[first:]]
    parts = [np.where(np.arange(first, len(trunk)) < len(prompt), PROMPT, COMMON)]

    # A branch has all tokens but the last; the trunk predicts its first one.
    used = len(trunk)
    for number, answer in enumerate(request.answers):
        rest = np.asarray(answer[len(common) :], np.int32)
        count = max(len(rest) - 1, 0)
        slots.append(rest[:count])
        positions.append(len(trunk) + np.arange(count))
        branches.append(np.full(count, number + 1))

        before = np.concatenate([[len(trunk) - 1], used + np.arange(count)])
        sources.append(before[: len(rest)])
        targets.append(rest)
        parts.append(np.full(len(rest), number))
        used += count

    return RequestTree(*map(_join, (slots, positions, branches, sources, targets, parts)))


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int32)


def score_rows(
    spec: ModelSpec,
    weights: Weights,
    rows: Sequence[Sequence[ScoringRequest]],
    length: int,
) -> list[ScoredTokens]:
    """Returns the scored tokens of each request, row after row.

    Args:
      rows: requests without images; the slots of each row's are at most `length`.
    """
    trees = [[make_tree(request) for request in row] for row in rows]
    chunk = make_packed_chunk(trees, spec.arch, length)
    merged = dataclasses.replace(spec, kernel="merged")  # the fastest one for short rows
    hidden = engine.forward(merged, weights, _place_chunk(spec, chunk), None)

    # Sources as slots of all rows together: each tree starts after those of its row.
    starts: list[int] = []
    for number, row in enumerate(trees):
        begins = itertools.accumulate((len(tree.tokens) for tree in row), initial=number * length)
        starts += list(begins)[: len(row)]  # the last one is the end of the row
    flat = [tree for row in trees for tree in row]
    sources = _join([tree.sources + start for tree, start in zip(flat, starts, strict=True)])
    targets = _join([tree.targets for tree in flat])
    logprobs, is_likeliest = _score_sources(spec, weights, hidden, sources, targets)

    ends = np.cumsum([len(tree.parts) for tree in flat])[:-1]
    columns = zip(np.split(logprobs, ends), np.split(is_likeliest, ends), strict=True)
    return [ScoredTokens(tree.parts, *pair) for tree, pair in zip(flat, columns, strict=True)]


def make_packed_chunk(
    trees: Sequence[Sequence[RequestTree]], arch: WingsArch, length: int
) -> Chunk:
    """Returns rows of trees as one chunk [B,length]; each tree is a segment of its own."""
    shape = (len(trees), length)
    tokens, positions, segments, branches = (np.zeros(shape, np.int32) for _ in range(4))
    for row, row_trees in enumerate(trees):
        start = 0
        for number, tree in enumerate(row_trees):
            slots = slice(start, start + len(tree.tokens))
            tokens[row, slots], positions[row, slots] = tree.tokens, tree.positions
            segments[row, slots], branches[row, slots] = number + 1, tree.branches
            start = slots.stop

    modality = np.where(segments > 0, TEXT, PADDING).astype(np.int32)
    return Chunk(
        tokens,
        modality,
        positions,
        layout.paper_visible_from(positions, modality),
        np.zeros(shape, np.int32),
        chunks.pick_slots(modality, arch, images=0),
        segments,
        branches,
    )


@functools.partial(jax.jit, static_argnames="spec")
def _place_chunk(spec: ModelSpec, chunk: Chunk) -> Chunk:
    return axes.shard_leading_axis(chunk, spec.mesh)


def _score_sources(
    spec: ModelSpec, weights: Weights, hidden: jax.Array, sources: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns f32[n] and bool[n] of tokens i32[n]: the log-probability, and whether likeliest.

    Args:
      hidden: [B,T,D].
      sources: i32[n], the slots of B*T whose states predict the tokens.
    """
    if not len(sources):
        return np.zeros(0, np.float32), np.zeros(0, bool)

    # The logits of a state are computed once for all the tokens that it predicts.
    states, owners = np.unique(sources, return_inverse=True)
    order = np.argsort(owners, kind="stable")
    ranks = np.empty_like(owners)
    ranks[order] = np.arange(len(owners)) - np.searchsorted(owners[order], owners[order])

    width = chunks.power(int(ranks.max(initial=0)) + 1)
    tokens = np.zeros((len(states), width), np.int32)
    tokens[owners, ranks] = targets

    found = []
    for first in range(0, len(states), BLOCK):
        part = slice(first, first + BLOCK)
        count = len(states[part])
        padding = -count % (STEP if len(states) > STEP else SMALL_STEP)
        block = np.pad(states[part], (0, padding)), np.pad(tokens[part], ((0, padding), (0, 0)))
        scores = _score_block(spec, weights.rest, hidden, *block)
        found.append([x[:count] for x in distributed.fetch(scores)])
    logprobs, is_likeliest = (np.concatenate(column) for column in zip(*found, strict=True))
    return logprobs[owners, ranks], is_likeliest[owners, ranks]


@functools.partial(jax.jit, static_argnames="spec")
def _score_block(
    spec: ModelSpec,
    rest: Mapping[str, Any],
    hidden: jax.Array,
    states: jax.Array,
    tokens: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns f32[U,C] and bool[U,C] of the tokens i32[U,C] that states i32[U] predict."""
    # [B, T, D] -> [U, D] -> [U, V]
    chosen = hidden.reshape(-1, hidden.shape[-1])[states]
    logits = engine.logits(spec, Weights((), rest), chosen)
    return score_candidates(logits, tokens)


def score_candidates(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities f32[U,C] of tokens i32[U,C], and whether each is the likeliest.

    Args:
      logits: f32[U,V].
    """
    # The first of the highest logits, without an argmax, which XLA does not vectorize on CPUs.
    highest = logits.max(-1, keepdims=True)
    vocabulary = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    likeliest = jnp.where(logits == highest, vocabulary, logits.shape[-1]).min(-1, keepdims=True)

    total = highest + jnp.log(jnp.exp(logits - highest).sum(-1, keepdims=True))
    return jnp.take_along_axis(logits, tokens, axis=-1) - total, tokens == likeliest
