"""Layout: what every slot of a row is, and visibility: which keys a query may attend to.

A `Layout` describes rows of slots, and is made on the host. An image takes P slots; text-only
rows, several images, interleaving, packed conversations and padding are values of these arrays,
never code paths. Example: one packed row with a conversation "a <image> b" (P = 2), another
"c d", and one padding slot:

    slot       0    1     2     3    4    5    6
    tokens     a    0     0     b    c    d    0
    modality   TEXT IMAGE IMAGE TEXT TEXT TEXT PADDING
    segments   1    1     1     1    2    2    0
    positions  0    1     2     3    0    1    0
    targets    -100 -100  b     ...            (the target of a slot is the *next* token)

There are three attentions: main, visual and textual. `visible_from[..., m]` is the position from
which on a key is visible in attention m, or `NEVER`. With the paper's semantics that is the key's
own position, for keys of the attention's modality:

    main       0    1     2     3    0    1    NEVER
    visual     NEV  1     2     NEV  NEV  NEV  NEVER
    textual    0    NEV   NEV   3    0    1    NEVER

A query attends to the keys of its own segment that are visible from its position or an earlier
one (`visible`, the attention mask). So slot 3 ("b") attends to slots 0-3 in the main attention, 1-2
in the visual learner and 0, 3 in the textual learner. Slots 4-5 have no visible key in the visual
learner, whose output there is exactly 0. A padding slot has none anywhere.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

PADDING, TEXT, IMAGE = 0, 1, 2  # modalities
MAIN, VISUAL, TEXTUAL = 0, 1, 2  # attentions, the last axis of `visible_from`
LEARNERS = {"visual": VISUAL, "textual": TEXTUAL}
NEVER = 2**30  # in `visible_from`: later than every position
IGNORE = -100  # target of a slot that has no loss

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Slots of B rows of length T.

    tokens        i32[B,T]    token ids; 0 where the slot is not text
    positions     i32[B,T]    index of the slot within its conversation
    modality      i32[B,T]    PADDING, TEXT or IMAGE
    segments      i32[B,T]    conversation number within the row, from 1; 0 for padding
    visible_from  i32[B,T,3]  position from which on the slot is visible as a key, by attention
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
    targets  i32[B,T]        the next token where the slot has a loss, else IGNORE
    images   u8[B,I,h,w,3]   pixels; the k-th P image slots of a row are its k-th image
    """

    layout: Layout
    targets: Array
    images: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """One side of the attention mask, of queries or of keys (`visible`).

    segments      i32[B,T]  conversation number; queries attend to keys of the same only
    visible_from  i32[B,T]  of a key: the position from which on it is visible;
                            of a query: its own position
    branches      i32[B,T]  of a conversation that continues in several ways, the number of the
                            way, and 0 for what they have in common; None: there is one way
    """

    segments: Array
    visible_from: Array
    branches: Array | None = None


def paper_visible_from(positions: np.ndarray, modality: np.ndarray) -> np.ndarray:
    """Returns i32[...,3]: keys are visible from their own position on, by modality.

    >>> paper_visible_from(np.array([0, 1, 2]), np.array([TEXT, IMAGE, TEXT])).T == NEVER
    array([[False, False, False],
           [ True, False,  True],
           [False,  True, False]])
    """
    is_key = [modality != PADDING, modality == IMAGE, modality == TEXT]
    by_attention = [np.where(mask, positions, NEVER) for mask in is_key]
    return np.stack(by_attention, axis=-1).astype(np.int32)


def release_visible_from(
    positions: np.ndarray, modality: np.ndarray, segments: np.ndarray, prompt_length: int
) -> np.ndarray:
    """Returns i32[B,T,3] of the authors' release, which is not causal where there is an image.

    All image slots of a conversation are visible to all its slots. The textual keys are the text
    slots except for the first `prompt_length`, *re-counted*: the n-th of them is visible from
    position n on, which is before its own. Without an image, or if the conversation begins with
    one, they are all slots and are not re-counted.

    >>> modality = np.array([[TEXT, TEXT, IMAGE, IMAGE, TEXT]])
    >>> segments, positions = np.ones_like(modality), np.arange(5)[None]
    >>> visible_from = release_visible_from(positions, modality, segments, prompt_length=1)
    >>> np.where(visible_from == NEVER, -1, visible_from)[0].T  # main, visual, textual
    array([[ 0,  1,  2,  3,  4],
           [-1, -1,  0,  0, -1],
           [-1,  0, -1, -1,  1]], dtype=int32)
    """
    visible_from = paper_visible_from(positions, modality)

    # All image slots are visible from the first position on.
    visible_from[..., VISUAL] = np.where(modality == IMAGE, 0, NEVER)

    for row in range(len(positions)):
        for segment in np.unique(segments[row][modality[row] != PADDING]):
            # The slots of one conversation.
            slots = np.flatnonzero(segments[row] == segment)
            slot_positions, slot_modality = positions[row, slots], modality[row, slots]
            first_image = slot_positions[slot_modality == IMAGE].min(initial=NEVER)

            is_key = np.ones(len(slots), bool)
            if 0 < first_image < NEVER:
                after_prompt = (slot_positions >= prompt_length) | (slot_positions > first_image)
                is_key = (slot_modality == TEXT) & after_prompt

            # The n-th textual key is visible from position n on.
            visible_from[row, slots, TEXTUAL] = np.where(is_key, np.cumsum(is_key) - 1, NEVER)

    return visible_from


def make_layout(
    tokens: np.ndarray,
    modality: np.ndarray,
    segments: np.ndarray | None = None,
    *,
    prompt_length: int | None = None,
) -> Layout:
    """Returns the layout of rows [B,T]; without segments, each row is one conversation.

    Positions count the slots of each segment from 0. A segment's slots must be adjacent.
    `visible_from` is the paper's, or with `prompt_length` the release's (`presets.Semantics`).

    >>> tokens = np.array([[5, 6, 7, 8, 9, 4, 3]])
    >>> modality = np.array([[TEXT, IMAGE, IMAGE, TEXT, TEXT, TEXT, PADDING]])
    >>> rows = make_layout(tokens, modality, np.array([[1, 1, 1, 1, 2, 2, 0]]))
    >>> rows.tokens
    array([[5, 0, 0, 8, 9, 4, 0]], dtype=int32)
    >>> rows.positions
    array([[0, 1, 2, 3, 0, 1, 0]], dtype=int32)
    """
    modality = np.asarray(modality, np.int32)
    is_used = modality != PADDING
    segments = is_used.astype(np.int32) if segments is None else np.asarray(segments, np.int32)

    # Position = slot - first slot of the segment.
    slots = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    is_start = np.ones(segments.shape, bool)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first_slot = np.maximum.accumulate(np.where(is_start, slots, 0), axis=1)
    positions = np.where(is_used, slots - first_slot, 0).astype(np.int32)

    tokens = np.where(modality == TEXT, tokens, 0).astype(np.int32)
    if prompt_length is None:
        visible_from = paper_visible_from(positions, modality)
    else:
        visible_from = release_visible_from(positions, modality, segments, prompt_length)
    return Layout(tokens, positions, modality, segments, visible_from)


def query_visibility(layout: Layout) -> Visibility:
    """Returns the query side of the attention mask, the same for every attention."""
    return Visibility(layout.segments, layout.positions)


def key_visibility(layout: Layout, attention: int) -> Visibility:
    """Returns the key side of the mask of `attention` (MAIN, VISUAL or TEXTUAL)."""
    return Visibility(layout.segments, layout.visible_from[..., attention])


def visible(query: Visibility, key: Visibility) -> jax.Array:
    """Returns the attention mask bool[B,T,S]: which keys a query attends to.

    >>> rows = make_layout(np.array([[5, 6, 7]]), np.array([[TEXT, IMAGE, TEXT]]))
    >>> visible(query_visibility(rows), key_visibility(rows, MAIN)).astype(int)[0].tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    >>> visible(query_visibility(rows), key_visibility(rows, VISUAL)).astype(int)[0].tolist()
    [[0, 0, 0], [0, 1, 0], [0, 1, 0]]

    A common slot and two ways to continue, of which neither attends to the other:

    >>> tree = Visibility(np.array([[1, 1, 1]]), np.array([[0, 1, 1]]), np.array([[0, 1, 2]]))
    >>> visible(tree, tree).astype(int)[0].tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    same_segment = query.segments[:, :, None] == key.segments[:, None, :]
    is_visible = key.visible_from[:, None, :] <= query.visible_from[:, :, None]
    mask = jnp.logical_and(same_segment, is_visible)
    if query.branches is None or key.branches is None:
        return mask

    # A branch attends to what all have in common and to itself.
    is_common = key.branches[:, None, :] == 0
    return mask & (is_common | (key.branches[:, None, :] == query.branches[:, :, None]))
