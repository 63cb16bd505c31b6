"""Prompts and answers to score, and which of them are computed together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from wings_jax.inference import chunks, prefixes
from wings_jax.inference.chunks import PromptSlots
from wings_jax.model.layout import IMAGE

ROW_LENGTHS = (128, 192, 256)  # slots of a packed row; few, since each is compiled


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
    rows     of packed requests, how many of them each row has, one after the other; else ()
    length   the slots of such a row
    """

    indices: tuple[int, ...]
    shared: int = 0
    rows: tuple[int, ...] = ()
    length: int = 0


def plan_batches(
    requests: Sequence[ScoringRequest], rows: int, *, can_pack: bool = False
) -> list[ScoringBatch]:
    """Returns batches of at most `rows` rows, group by group, those of similar size together.

    A row is one request or, packed, several that are short (`packed_scores`). The plan is a pure
    function of the requests, so that a run which was stopped can be resumed.

    Args:
      can_pack: whether the model can compute packed requests (`likelihood.can_pack`).
    """
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.group, []).append(index)

    # Groups without a beginning worth sharing are mixed, so that batches are full.
    shared = {name: _shared_slots(requests, members) for name, members in groups.items()}
    alone = [i for name, members in groups.items() if not shared[name] for i in members]
    batches = [(members, shared[name]) for name, members in groups.items() if shared[name]]

    # Short requests of text are packed.
    packed = [i for i in alone if can_pack and _is_short(requests[i])]
    others = sorted(set(alone) - set(packed))

    planned = []
    for members, count in [*batches, (others, 0)]:
        order = sorted(members, key=lambda i: _sort_key(requests[i], count))
        for first in range(0, len(order), rows):
            planned.append(ScoringBatch(tuple(order[first : first + rows]), count))
    return planned + _pack_batches({i: tree_slots(requests[i]) for i in packed}, rows)


def tree_slots(request: ScoringRequest) -> int:
    """Returns the slots of a packed request: its prompt, and all answers without their last ids."""
    common = len(common_ids(request))
    rests = [max(len(answer) - common - 1, 0) for answer in request.answers]
    return request.prompt.count + common + sum(rests)


def _is_short(request: ScoringRequest) -> bool:
    """Returns whether a request fits into a packed row."""
    is_text = request.prompt.count > 0 and not (request.prompt.modality == IMAGE).any()
    return is_text and tree_slots(request) <= ROW_LENGTHS[-1]


def _pack_batches(sizes: Mapping[int, int], rows: int) -> list[ScoringBatch]:
    """Returns batches of packed requests, by the slots of each, with equal numbers of rows."""
    planned = []
    for length, members in pack_rows(sizes).items():
        # A single row need not be as long as the others.
        if len(members) == 1:
            length = chunks.bucket(sum(sizes[i] for i in members[0]))

        count = -(-len(members) // rows)
        per_batch = -(-len(members) // count)
        for first in range(0, len(members), per_batch):
            batch = members[first : first + per_batch]
            empty = [0] * (per_batch - len(batch))
            indices = tuple(i for row in batch for i in row)
            planned.append(ScoringBatch(indices, 0, (*map(len, batch), *empty), length))
    return planned


def pack_rows(sizes: Mapping[int, int]) -> dict[int, list[list[int]]]:
    """Returns length -> rows of that many slots, each with the requests that it holds.

    From the largest request on, each goes into the row that it fills best, or into a new one.

    >>> pack_rows({0: 100, 1: 28, 2: 60, 3: 150, 4: 40})
    {192: [[3, 4]], 128: [[0, 1], [2]]}
    """
    packed: dict[int, list[list[int]]] = {}
    open_rows: dict[int, list[list[int]]] = {}  # free slots -> rows
    for index in sorted(sizes, key=lambda i: (-sizes[i], i)):
        size = sizes[index]
        free = next((n for n in range(size, ROW_LENGTHS[-1] + 1) if open_rows.get(n)), None)
        if free is None:
            free = next(length for length in ROW_LENGTHS if length >= size)
            row: list[int] = []
            packed.setdefault(free, []).append(row)
        else:
            row = open_rows[free].pop()
        row.append(index)
        open_rows.setdefault(free - size, []).append(row)
    return packed


def _sort_key(request: ScoringRequest, shared: int) -> tuple[int, int, int]:
    """Returns a key that puts requests of one padded length together, then by their answers."""
    prompt, answer = request.size
    return chunks.bucket(prompt - shared, 2), answer, prompt


def _shared_slots(requests: Sequence[ScoringRequest], members: Sequence[int]) -> int:
    """Returns how many slots the prompts of a group share; 0 without a group."""
    if not requests[members[0]].group:
        return 0
    return prefixes.shared_slots([requests[i].prompt for i in members])


def common_ids(request: ScoringRequest) -> tuple[int, ...]:
    """Returns the ids that all answers have in common at their start; each has one after them."""
    if len(request.answers) < 2:
        return ()
    return tuple(request.answers[0][: prefixes.common_length(request.answers)])
