"""From what people ask to the slots that the engine reads, on the host."""

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
class Slots:
    """A piece of conversation as slots of one row.

    tokens    i32[n]  0 in image slots
    modality  i32[n]  TEXT or IMAGE
    images    its pictures, u8[h,w,3] each
    """

    tokens: np.ndarray
    modality: np.ndarray
    images: tuple[np.ndarray, ...] = ()


def from_ids(ids: Sequence[int], images: Sequence[np.ndarray], image_slots: int) -> Slots:
    """Returns the slots of ids, in which `conversation.IMAGE_ID` stands for an image."""
    ids = np.asarray(ids, np.int32).reshape(-1)
    labels = np.full_like(ids, layout.IGNORE)
    expanded = conversation.expand(conversation.Encoded(ids, labels), image_slots)
    return Slots(expanded.tokens, expanded.modality, tuple(images))


def make_chunk(
    rows: Sequence[Slots],
    starts: np.ndarray,
    arch: WingsArch,
    *,
    length: int,
    images: int | None = None,
) -> Chunk:
    """Returns rows side by side, padded on the right to `length`.

    Args:
      starts: i32[B], the position at which each row goes on.
      images: slots for how many images a row's visual part has; by default for the most of any
        row. The textual part has `length` slots.

    The features of all pictures are expected in the order of the rows.
    """
    shape = (len(rows), length)
    tokens, modality = (np.zeros(shape, np.int32) for _ in range(2))
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        modality[index, : len(row.tokens)] = row.modality
    used = modality != layout.PADDING
    positions = np.where(used, np.asarray(starts)[:, None] + np.arange(length), 0)
    is_image = modality == layout.IMAGE
    features = np.cumsum(is_image.reshape(-1)).reshape(shape) - 1
    most = max(len(row.images) for row in rows) if images is None else images
    picks = {}
    for name in arch.learners:
        width = most * arch.vision.num_patches if LEARNERS[name] == VISUAL else length
        if width:
            wanted = layout.IMAGE if LEARNERS[name] == VISUAL else layout.TEXT
            picks[name] = _pick(modality == wanted, width)
    return Chunk(
        tokens,
        modality,
        positions.astype(np.int32),
        np.where(is_image, features, 0).astype(np.int32),
        picks,
    )


def _pick(chosen: np.ndarray, width: int) -> np.ndarray:
    """Returns i32[B,width]: the indices where bool[B,T] holds, then T."""
    index = np.where(chosen, np.arange(chosen.shape[1]), chosen.shape[1])
    index = np.sort(index, axis=1)[:, :width]
    short = ((0, 0), (0, width - index.shape[1]))
    return np.pad(index, short, constant_values=chosen.shape[1]).astype(np.int32)
