"""Classes of keys and groups of queries: for each slot of a conversation, what it counts as.

With `i` an image's slots, `t` text, and the first two slots excluded:

    slot    t        t        t      i     i     t       i     t     t
    class   excluded excluded before image image between image after after

A slot belongs to exactly one class, so the masses of a query's attention row sum to 1.
"""

from __future__ import annotations

import numpy as np

from wings_jax.model.layout import IGNORE, IMAGE, TEXT

CLASSES = ("excluded", "before", "image", "between", "after")
ROWS = ("all", "after")
KINDS = ("text", "image")
SPANS = ("before", "image", "after")
BINS = 8  # equal parts of each span, for attention by query position
GROUPS = (*ROWS, *KINDS, *(f"{span}-{part}" for span in SPANS for part in range(BINS)))


def classify(modality: np.ndarray, exclude_prefix: int = 0) -> np.ndarray:
    """Returns i32[n], the class of every slot of one conversation with images.

    >>> modality = np.array([TEXT, TEXT, IMAGE, IMAGE, TEXT, IMAGE, TEXT])
    >>> [CLASSES[number] for number in classify(modality, exclude_prefix=1)]
    ['excluded', 'before', 'image', 'image', 'between', 'image', 'after']
    """
    slots, is_image = np.arange(len(modality)), modality == IMAGE
    first, last = np.flatnonzero(is_image)[[0, -1]]

    # The first class whose condition holds is that of the slot.
    is_class = {
        "excluded": slots < min(exclude_prefix, first),
        "before": slots < first,
        "image": is_image,
        "between": slots < last,
        "after": slots > last,
    }
    return np.argmax([is_class[class_name] for class_name in CLASSES], axis=0).astype(np.int32)


def group(modality: np.ndarray, end: int) -> np.ndarray:
    """Returns f32[n,Q]: for each of GROUPS weights that sum to 1, or to 0 without a query.

    Only the first `end` slots are queries. The text between images belongs to the span "image".

    >>> weights = group(np.array([TEXT, IMAGE, IMAGE, TEXT, TEXT]), end=4)
    >>> weights[:, GROUPS.index("all")].tolist()
    [0.25, 0.25, 0.25, 0.25, 0.0]
    >>> weights[:, GROUPS.index("image")].tolist()
    [0.0, 0.5, 0.5, 0.0, 0.0]
    """
    slots, is_image = np.arange(len(modality)), modality == IMAGE
    first, last = np.flatnonzero(is_image)[[0, -1]]
    is_query = slots < end
    is_after = is_query & (slots > last)
    # In the order of GROUPS: ROWS, KINDS, then SPANS.
    masks = [is_query, is_after, is_query & ~is_image, is_query & is_image]

    # Each span in BINS parts of equal length, for attention by query position.
    is_before = is_query & (slots < first)
    is_inside = is_query & (slots >= first) & (slots <= last)
    for is_span in (is_before, is_inside, is_after):
        position = np.cumsum(is_span) - 1
        part = position * BINS // max(is_span.sum(), 1)
        masks += [is_span & (part == number) for number in range(BINS)]

    weights = np.stack(masks, axis=-1).astype(np.float32)
    return weights / np.maximum(weights.sum(0), 1.0)


def last_prompt_slot(targets: np.ndarray) -> int:
    """Returns the number of slots before the last answer, all of them without an answer.

    In the example, slot 6 is the last of the prompt: its target is the answer's first token.

    >>> last_prompt_slot(np.array([IGNORE, IGNORE, 7, 7, IGNORE, IGNORE, 9, 9, IGNORE]))
    7
    """
    has_target = targets != IGNORE
    starts = np.flatnonzero(has_target & ~np.append(False, has_target[:-1]))
    return int(starts[-1]) + 1 if len(starts) else len(targets)


def count_text(modality: np.ndarray) -> tuple[int, int]:
    """Returns the number of text slots before the first image and after the last one.

    >>> count_text(np.array([TEXT, IMAGE, TEXT, IMAGE, TEXT, TEXT]))
    (1, 2)
    """
    first, last = np.flatnonzero(modality == IMAGE)[[0, -1]]
    return int(first), int((modality[last:] == TEXT).sum())
