"""Which questions are scored (anchors), and which text questions come before each.

Paired anchors: the same text questions are asked alone, after one and after two others, and so are
the same image questions. A difference between settings is then not one of their difficulty.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Mapping, Sequence

import numpy as np

from wings_jax.evaluation.interleaved import embedding
from wings_jax.evaluation.interleaved.pool import IMAGE, TEXT, PoolItem, normalize_text

COMPANIONS = 2  # the most text questions before an anchor
NEIGHBORS = 50  # candidates: the nearest text questions
MAX_COSINE = 0.95  # nearer ones are the same question in other words
RELEVANCE = 0.7  # of maximal marginal relevance; the rest is for being unlike each other
MAX_USES = 2  # of a question as a companion
BATCH = 256  # anchors whose similarities are computed at once


@dataclasses.dataclass(frozen=True)
class Selection:
    """An anchor and the questions before it."""

    # The scored question.
    anchor: PoolItem
    # Text questions, the closest one last: it stands next to the anchor.
    companions: tuple[PoolItem, ...]
    # Their cosines with the anchor.
    cosines: tuple[float, ...]
    # As many random text questions of the same language, for the control.
    shuffled: tuple[PoolItem, ...]


def choose_anchors(pool: Sequence[PoolItem], count: int, seed: str) -> list[PoolItem]:
    """Returns `count` items (all, if there are fewer), in turns from every source and subject."""
    rng = random.Random(f"anchors-{seed}")
    strata: dict[str, dict[str, list[PoolItem]]] = {}
    for item in pool:
        strata.setdefault(item.source, {}).setdefault(item.subject, []).append(item)

    # A queue per source, which takes its subjects in turns.
    queues = []
    for subjects in strata.values():
        groups = list(subjects.values())
        for group in groups:
            rng.shuffle(group)
        rng.shuffle(groups)
        queue: list[PoolItem] = []
        # One question of each subject at a time, until all subjects are empty.
        while any(groups):
            queue += [group.pop() for group in groups if group]
        queues.append(queue[::-1])

    # One question of each source at a time.
    chosen: list[PoolItem] = []
    while len(chosen) < count and any(queues):
        for remaining in queues:
            if remaining and len(chosen) < count:
                chosen.append(remaining.pop())
    return chosen


def select_language(
    pool: Sequence[PoolItem], language: str, count: int, *, embedder: str, seed: int
) -> list[Selection]:
    """Returns `count` text and `count` image anchors of one language with their companions."""
    texts = [item for item in pool if item.language == language and item.modality == TEXT]
    images = [item for item in pool if item.language == language and item.modality == IMAGE]
    if len(texts) <= COMPANIONS:
        return []

    anchors = [
        *choose_anchors(texts, count, f"{seed}-{language}-{TEXT}"),
        *choose_anchors(images, count, f"{seed}-{language}-{IMAGE}"),
    ]

    # One vector space for the candidates and the anchors.
    items = [*texts, *(anchor for anchor in anchors if anchor.modality == IMAGE)]
    rows = {item.uid: row for row, item in enumerate(items)}
    vectors = embedding.embed_texts(embedder, [item.text for item in items], language)
    uses: collections.Counter[int] = collections.Counter()
    selections = []

    for first in range(0, len(anchors), BATCH):
        # [batch] anchors -> [batch, items] cosines
        batch = anchors[first : first + BATCH]
        cosines = embedding.similarities(vectors, [rows[anchor.uid] for anchor in batch])
        for anchor, row_cosines in zip(batch, cosines[:, : len(texts)], strict=True):
            chosen = choose_companions(anchor, texts, row_cosines, vectors, uses)
            uses.update(chosen)
            selections.append(
                Selection(
                    anchor,
                    tuple(texts[index] for index in chosen),
                    tuple(round(float(row_cosines[index]), 4) for index in chosen),
                    choose_shuffled(anchor, texts, chosen, seed),
                )
            )
    return selections


def choose_companions(
    anchor: PoolItem,
    texts: Sequence[PoolItem],
    cosines: np.ndarray,
    vectors: np.ndarray,
    uses: Mapping[int, int],
) -> list[int]:
    """Returns the indices of the companions, the closest one last.

    Of the nearest questions that are no near-duplicates, from other sources if there are enough,
    by maximal marginal relevance.
    """
    stems = {normalize_text(anchor.question)}

    # Candidates: the nearest questions, none of which repeats the anchor or another one.
    order = np.argsort(-cosines, kind="stable")
    near = []
    for index in map(int, order):
        stem = normalize_text(texts[index].question)
        if cosines[index] > MAX_COSINE or stem in stems or uses.get(index, 0) >= MAX_USES:
            continue

        stems.add(stem)
        near.append(index)
        if len(near) == NEIGHBORS:
            break

    # Questions of the anchor's own source are candidates only if there are too few others.
    others = [index for index in near if texts[index].source != anchor.source]
    candidates = others if len(others) >= COMPANIONS else near

    # [candidates, candidates] cosines, for how much a candidate repeats those chosen.
    mutual = embedding.similarities(vectors, candidates)[:, candidates]

    # Maximal marginal relevance: near the anchor, but unlike what is chosen already.
    chosen: list[int] = []
    while len(chosen) < min(COMPANIONS, len(candidates)):
        scores = [
            RELEVANCE * cosines[candidates[i]]
            - (1 - RELEVANCE) * max((mutual[i, j] for j in chosen), default=0.0)
            if i not in chosen
            else -np.inf
            for i in range(len(candidates))
        ]
        chosen.append(int(np.argmax(scores)))

    return sorted((candidates[i] for i in chosen), key=lambda index: float(cosines[index]))


def choose_shuffled(
    anchor: PoolItem, texts: Sequence[PoolItem], chosen: Sequence[int], seed: int
) -> tuple[PoolItem, ...]:
    """Returns as many random text questions as there are companions, and none of them."""
    rng = random.Random(f"shuffled-{seed}-{anchor.uid}")
    excluded = {anchor.uid, *(texts[index].uid for index in chosen)}

    # A sample that is large enough even if it contains every excluded question.
    found: list[PoolItem] = []
    for index in rng.sample(range(len(texts)), min(len(texts), len(chosen) + len(excluded))):
        if texts[index].uid not in excluded and len(found) < len(chosen):
            found.append(texts[index])
    return tuple(found)
