"""Prompts and answers to score, and which of them are computed together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from wings_jax.inference import chunks
from wings_jax.inference.chunks import PromptSlots
from wings_jax.model.layout import IMAGE

MIN_SHARED = 48  # slots of a common beginning that are worth a computation of their own


@dataclasses.dataclass(frozen=True)
class ScoringRequest:
    """A prompt and the answers to score.

    prompt       its slots, with images
    answers      the ids of each answer
    with_prompt  whether the likelihood of the prompt's text is wanted too, after its first slot
    group        the prompts of a group have a common beginning; "" for no group
    """

    prompt: PromptSlots
    answers: Sequence[Sequence[int]]
    with_prompt: bool = False
    group: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Returns the slots of the prompt and of the longest answer."""
        return self.prompt.count, max(map(len, self.answers), default=0)


@dataclasses.dataclass(frozen=True)
class ScoringBatch:
    """Requests that are computed together; what they are depends on the requests alone.

    indices  of the requests
    shared   how many slots at the beginning they share; 0 for none
    """

    indices: tuple[int, ...]
    shared: int = 0


def plan_batches(requests: Sequence[ScoringRequest], rows: int) -> list[ScoringBatch]:
    """Returns batches of at most `rows` requests, group by group, those of similar size together.

    The plan is a pure function of the requests, so that a run which was stopped can be resumed.
    """
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.group, []).append(index)

    # Groups without a beginning worth sharing are mixed, so that batches are full.
    shared = {name: _shared_slots(requests, members) for name, members in groups.items()}
    alone = [i for name, members in groups.items() if not shared[name] for i in members]
    batches = [(members, shared[name]) for name, members in groups.items() if shared[name]]

    planned = []
    for members, count in [*batches, (alone, 0)]:
        order = sorted(members, key=lambda i: _sort_key(requests[i], count))
        for first in range(0, len(order), rows):
            planned.append(ScoringBatch(tuple(order[first : first + rows]), count))
    return planned


def _sort_key(request: ScoringRequest, shared: int) -> tuple[int, int, int]:
    """Returns a key that puts requests of one padded length together, then by their answers."""
    prompt, answer = request.size
    return chunks.bucket(prompt - shared, 2), answer, prompt


def _shared_slots(requests: Sequence[ScoringRequest], members: Sequence[int]) -> int:
    """Returns how many slots the prompts of a group share, 0 if it is not worth it.

    Prompts with images share nothing: with the release's semantics they cannot be extended.
    """
    prompts = [requests[i].prompt for i in members]
    if len(prompts) < 2 or not requests[members[0]].group:
        return 0
    if any((prompt.modality == IMAGE).any() for prompt in prompts):
        return 0

    # The last slot of a prompt is its own, as its state predicts the answer.
    count = common_length([prompt.tokens.tolist() for prompt in prompts])
    return count if count >= MIN_SHARED else 0


def common_ids(request: ScoringRequest) -> tuple[int, ...]:
    """Returns the ids that all answers have in common at their start; each has one after them."""
    if len(request.answers) < 2:
        return ()
    return tuple(request.answers[0][: common_length(request.answers)])


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Returns how many ids all sequences have in common at their start, with one left of each.

    >>> common_length([[1, 2, 3], [1, 2, 4, 5]]), common_length([[1, 2], [1, 2, 3]])
    (2, 1)
    """
    # What the smallest and the largest have in common, all others have too.
    pairs = zip(min(map(list, sequences)), max(map(list, sequences)), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return max(min(common, min(map(len, sequences)) - 1), 0)
