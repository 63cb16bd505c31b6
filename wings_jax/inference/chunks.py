"""Conversations as slots, and chunks of them for the engine, in few shapes; on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from wings_jax.data import conversation
from wings_jax.inference.engine import Chunk
from wings_jax.model import layout
from wings_jax.model.layout import LEARNERS, VISUAL
from wings_jax.model.presets import WingsArch


@dataclasses.dataclass(frozen=True)
class PromptSlots:
    """A part of a conversation as slots of one row.

    tokens    i32[n]  0 in image slots
    modality  i32[n]  TEXT or IMAGE
    images    its images, u8[h,w,3] each
    """

    tokens: np.ndarray
    modality: np.ndarray
    images: tuple[np.ndarray, ...] = ()

    @property
    def count(self) -> int:
        """Returns how many slots there are."""
        return len(self.tokens)


EMPTY = PromptSlots(np.zeros(0, np.int32), np.zeros(0, np.int32))


def from_ids(
    ids: Sequence[int] | np.ndarray, images: Sequence[np.ndarray], image_slots: int
) -> PromptSlots:
    """Returns the slots of ids, in which `conversation.IMAGE_ID` stands for an image.

    >>> from_ids([5, conversation.IMAGE_ID, 6], (), image_slots=2).tokens
    array([5, 0, 0, 6], dtype=int32)
    """
    id_array = np.asarray(ids, np.int32).reshape(-1)
    labels = np.full_like(id_array, layout.IGNORE)
    expanded = conversation.expand(conversation.Encoded(id_array, labels), image_slots)
    return PromptSlots(expanded.tokens, expanded.modality, tuple(images))


def join(*parts: PromptSlots) -> PromptSlots:
    """Returns one conversation of several parts."""
    return PromptSlots(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.modality for part in parts]),
        tuple(image for part in parts for image in part.images),
    )


def head(slots: PromptSlots, end: int) -> PromptSlots:
    """Returns the slots before `end`, which are text."""
    return PromptSlots(slots.tokens[:end], slots.modality[:end])


def tail(slots: PromptSlots, start: int, patches: int) -> PromptSlots:
    """Returns the slots from `start` on, which is not within an image of `patches` slots."""
    images_before = int((slots.modality[:start] == layout.IMAGE).sum()) // patches
    return PromptSlots(slots.tokens[start:], slots.modality[start:], slots.images[images_before:])


def make_chunk(
    rows: Sequence[PromptSlots],
    starts: np.ndarray,
    arch: WingsArch,
    *,
    length: int,
    images: int | None = None,
) -> Chunk:
    """Returns the rows as one chunk, padded on the right to `length`.

    The encoded features of all images are expected in the order of the rows. With the release's
    semantics a row that has an image must be a whole conversation: it cannot be extended.

    Args:
      starts: i32[B], the position of each row's first slot.
      length: T. The textual learner gets `length` slots.
      images: how many images the visual learner has slots for; by default the most of any row.
    """
    shape = (len(rows), length)
    tokens, modality = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : row.count] = row.tokens
        modality[index, : row.count] = row.modality

    # [B, T]: padding has position 0, and visibility keeps it from being attended to.
    is_used = modality != layout.PADDING
    positions = np.where(is_used, np.asarray(starts)[:, None] + np.arange(length), 0)

    # Image slot k of the whole batch takes row k of the features.
    is_image = modality == layout.IMAGE
    ordinal = np.cumsum(is_image.reshape(-1)).reshape(shape) - 1
    features = np.where(is_image, ordinal, 0)

    if images is None:
        images = max(len(row.images) for row in rows)

    return Chunk(
        tokens,
        modality,
        positions.astype(np.int32),
        _visible_from(positions, modality, arch),
        features.astype(np.int32),
        pick_slots(modality, arch, images=images),
    )


def pick_slots(modality: np.ndarray, arch: WingsArch, *, images: int) -> dict[str, np.ndarray]:
    """Returns learner -> i32[B,F], its slots of rows [B,T] in front; without slots it is left out.

    Args:
      images: how many images the visual learner has slots for.
    """
    picks = {}
    for name in arch.learners:
        is_visual = LEARNERS[name] == VISUAL
        width = images * arch.vision.num_patches if is_visual else modality.shape[1]
        if width:
            picks[name] = _pick_slots(
                modality == (layout.IMAGE if is_visual else layout.TEXT), width
            )
    return picks


def _visible_from(positions: np.ndarray, modality: np.ndarray, arch: WingsArch) -> np.ndarray:
    """Returns i32[B,T,3] by the semantics of the architecture; each row is one conversation."""
    # Only the release's semantics number the keys of a whole conversation.
    prompt_length = arch.semantics.prompt_length
    if prompt_length is None:
        return layout.paper_visible_from(positions, modality)
    segments = (modality != layout.PADDING).astype(np.int32)
    return layout.release_visible_from(positions, modality, segments, prompt_length)


def _pick_slots(is_picked: np.ndarray, width: int) -> np.ndarray:
    """Returns i32[B,width]: the slots where bool[B,T] holds, then T as filling.

    >>> _pick_slots(np.array([[False, True, False, True]]), width=3)
    array([[1, 3, 4]], dtype=int32)
    """
    length = is_picked.shape[1]
    slots = np.where(is_picked, np.arange(length), length)
    slots = np.sort(slots, axis=1)[:, :width]
    padding = ((0, 0), (0, width - slots.shape[1]))
    return np.pad(slots, padding, constant_values=length).astype(np.int32)


def seen_tokens(rows: Sequence[PromptSlots], arch: WingsArch) -> np.ndarray:
    """Returns bool[B,V]: the tokens that occur in each row."""
    is_seen = np.zeros((len(rows), arch.decoder.vocab_size), bool)
    for index, row in enumerate(rows):
        is_seen[index, row.tokens[row.modality == layout.TEXT]] = True
    return is_seen


def bucket(length: int, smallest: int = 16) -> int:
    """Returns the next of 16, 24, 32, 48, 64, 96, ...: few shapes, so few compilations.

    Args:
      smallest: the first of the sizes, an even power of two such as 2, 16 or 128.

    >>> [bucket(length) for length in (1, 16, 17, 25, 33, 100)]
    [16, 16, 24, 32, 48, 128]
    >>> [bucket(length, smallest=2) for length in (1, 3, 4, 5, 9)]
    [2, 3, 4, 6, 12]
    """
    # Powers of two, and the number half-way to the next one.
    size = smallest
    while size < length:
        is_power = size & (size - 1) == 0
        size = size * 3 // 2 if is_power else size * 4 // 3
    return size


def power(count: int) -> int:
    """Returns the next power of two; 0 for 0.

    >>> [power(count) for count in (0, 1, 2, 3, 9)]
    [0, 1, 2, 4, 16]
    """
    return 1 << (count - 1).bit_length() if count else 0
