"""What every slot of a row is, decided on the host, and who may see whom.

A `Layout` describes rows of slots. An image takes P slots; text-only rows, several images,
interleaving, packed conversations and padding are values of these arrays, never code paths.
Example: one packed row with a conversation "a <image> b" (P = 2), another "c d", one pad slot:

    slot       0    1     2     3    4    5    6
    tokens     a    0     0     b    c    d    0
    modality   TEXT IMAGE IMAGE TEXT TEXT TEXT PADDING
    segments   1    1     1     1    2    2    0
    positions  0    1     2     3    0    1    0
    targets    -100 -100  b     ...            (the target of a slot is the *next* token)

`visible_from[..., m]` says from which position on a key may be seen by attention m (main, visual,
textual), `NEVER` if it may not be. With the paper's semantics that is the key's own position
where the modality fits:

    main       0    1     2     3    0    1    NEVER
    visual     NEV  1     2     NEV  NEV  NEV  NEVER
    textual    0    NEV   NEV   3    0    1    NEVER

so in the example slot 3 ("b") sees slots 0-3 in the main attention, 1-2 in the visual learner
and 0, 3 in the textual learner; slots 4-5 see nothing in the visual learner, whose output
there is exactly 0. The pad slot sees nothing anywhere.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

PADDING, TEXT, IMAGE = 0, 1, 2
MAIN, VISUAL, TEXTUAL = 0, 1, 2
LEARNERS = {"visual": VISUAL, "textual": TEXTUAL}
NEVER = 2**30
IGNORE = -100

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Slots of B rows of length T.

    tokens     i32[B,T]    token ids; 0 where the slot is not text
    positions  i32[B,T]    index of the slot within its conversation
    modality   i32[B,T]    PADDING, TEXT or IMAGE
    segments   i32[B,T]    conversation number within the row, from 1; 0 for padding
    visible_from     i32[B,T,3]  see the module's docstring
    """

    tokens: Array
    positions: Array
    modality: Array
    segments: Array
    visible_from: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What one training step reads.

    layout   Layout of [B,T]
    targets  i32[B,T]        the next token where it is to be learned, else IGNORE
    images   u8[B,I,h,w,3]   pixels; the k-th P image slots of a row are its k-th image
    """

    layout: Layout
    targets: Array
    images: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """What decides visibility on one side: segments i32[B,T] and order i32[B,T]."""

    segments: Array
    visible_from: Array


def paper_visible_from(positions: np.ndarray, modality: np.ndarray) -> np.ndarray:
    """Returns i32[...,3]: a key is seen from its own position on, by the attention it fits."""
    seen_by = [modality != PADDING, modality == IMAGE, modality == TEXT]
    return np.stack([np.where(m, positions, NEVER) for m in seen_by], axis=-1).astype(np.int32)


def release_visible_from(
    positions: np.ndarray, modality: np.ndarray, segments: np.ndarray, prompt_length: int
) -> np.ndarray:
    """Returns i32[B,T,3] as the authors' release sees: not causal where there is an image.

    Every slot of a conversation sees all its image slots. The textual keys are the text slots
    but for the first `prompt_length`, *re-counted*, and the n-th is seen from position n on, so
    before its own. Without an image, or if the conversation begins with one, they are all slots
    and nothing is re-counted. With a prompt length of 1:

        slot       0    1     2     3    4
        modality   TEXT TEXT  IMAGE IMAGE TEXT
        main       0    1     2     3    4
        visual     NEV  NEV   0     0    NEVER
        textual    NEV  0     NEV   NEV  1
    """
    visible_from = paper_visible_from(positions, modality)
    visible_from[..., VISUAL] = np.where(modality == IMAGE, 0, NEVER)
    for row in range(len(positions)):
        for segment in np.unique(segments[row][modality[row] != PADDING]):
            inside = np.flatnonzero(segments[row] == segment)
            where, kind = positions[row, inside], modality[row, inside]
            first = where[kind == IMAGE].min(initial=NEVER)
            chosen = np.ones(len(inside), bool)
            if 0 < first < NEVER:
                chosen = (kind == TEXT) & ((where >= prompt_length) | (where > first))
            visible_from[row, inside, TEXTUAL] = np.where(chosen, np.cumsum(chosen) - 1, NEVER)
    return visible_from


def make_layout(
    tokens: np.ndarray,
    modality: np.ndarray,
    segments: np.ndarray | None = None,
    *,
    prompt_length: int | None = None,
) -> Layout:
    """Returns the layout of rows [B,T]; without segments, each row is one.

    Positions count the slots of each segment from 0. A segment's slots must be adjacent. The
    visible_from are the paper's, or with `prompt_length` the release's (`presets.Semantics`).
    """
    modality = np.asarray(modality, np.int32)
    used = modality != PADDING
    segments = used.astype(np.int32) if segments is None else np.asarray(segments, np.int32)
    slots = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    starts = np.ones(segments.shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = np.maximum.accumulate(np.where(starts, slots, 0), axis=1)
    positions = np.where(used, slots - first, 0).astype(np.int32)
    tokens = np.where(modality == TEXT, tokens, 0).astype(np.int32)
    if prompt_length is None:
        visible_from = paper_visible_from(positions, modality)
    else:
        visible_from = release_visible_from(positions, modality, segments, prompt_length)
    return Layout(tokens, positions, modality, segments, visible_from)


def query_visibility(layout: Layout) -> Visibility:
    """Returns how the slots look out: every attention sees up to the slot's own position."""
    return Visibility(layout.segments, layout.positions)


def key_visibility(layout: Layout, attention: int) -> Visibility:
    """Returns how the slots are seen by `attention` (MAIN, VISUAL or TEXTUAL)."""
    return Visibility(layout.segments, layout.visible_from[..., attention])


def visible(query: Visibility, key: Visibility) -> jax.Array:
    """Returns bool[B,T,S]: which keys a query may see. The one visibility function."""
    same = query.segments[:, :, None] == key.segments[:, None, :]
    return jnp.logical_and(same, key.visible_from[:, None, :] <= query.visible_from[:, :, None])
