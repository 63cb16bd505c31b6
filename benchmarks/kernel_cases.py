"""The attentions that `kernels.py` checks and times: sizes, rows and random inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from wings_jax.model import layout
from wings_jax.model.kernels import intervals

PATCHES = 729  # image slots of one SigLIP image at 384 pixels


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention at one size: MAIN has router probes, None is the vision tower's."""

    which: int | None
    rows: int
    slots: int
    heads: int
    kv_heads: int
    width: int = 128
    probes: int = 2
    packed: bool = False


CASES = (
    Case(layout.MAIN, 4, 1024, 16, 16),
    Case(layout.MAIN, 2, 2048, 32, 32),
    Case(layout.MAIN, 2, 2048, 32, 32, probes=0),
    Case(layout.MAIN, 2, 2048, 32, 32, packed=True),
    Case(layout.MAIN, 1, 4096, 32, 8),
    Case(layout.TEXTUAL, 2, 2048, 32, 32, probes=0),
    Case(layout.VISUAL, 2, 2048, 32, 32, probes=0),
    Case(None, 4, PATCHES, 16, 16, width=72, probes=0),
)
SLOW_CASES = (CASES[1],)  # of the kernels that are not made for accelerators
CHECK = Case(layout.MAIN, 2, 320, 4, 2, width=64, probes=3, packed=True)


def make_rows(case: Case, image: int, seed: int = 0) -> layout.Layout:
    """Returns rows with an image of `image` slots in each conversation, and padding at the end."""
    rng = np.random.default_rng(seed)
    modality = np.full((case.rows, case.slots), layout.TEXT)
    segments = np.ones_like(modality)
    for row in range(case.rows):
        bounds = [0, case.slots]
        if case.packed:
            bounds = [0, *sorted(rng.integers(image // 2, case.slots, 2)), case.slots]
        for index in range(len(bounds) - 1):
            start, stop = bounds[index : index + 2]
            segments[row, start:stop] = index + 1
            first = start + min(35, (stop - start) // 4)
            modality[row, first : min(first + image, stop)] = layout.IMAGE
        # The last conversation has a second image, and the row ends in padding.
        modality[row, case.slots - image // 8 : case.slots - image // 16] = layout.IMAGE
        padding = case.slots // 20
        modality[row, case.slots - padding :] = layout.PADDING
        segments[row, case.slots - padding :] = 0
    return layout.make_layout(np.ones_like(modality), modality, segments)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of `attend` for a case, in float32, and the mask with the order of its keys."""

    arrays: tuple[jax.Array, ...]
    visibility: Mapping[str, layout.Visibility]
    pairs: int


def make_inputs(case: Case, image: int, seed: int = 0) -> Inputs:
    """Returns random q, k, v and probes, and the visibility; visual keys are gathered."""
    if case.which is None:
        visibility, num_keys, pairs = {}, case.slots, case.rows * case.slots**2
    else:
        rows = make_rows(case, image, seed)
        query, key = layout.query_visibility(rows), layout.key_visibility(rows, case.which)
        if case.which == layout.VISUAL:
            order = intervals.pack_order(key)[
                :, : int((rows.modality == layout.IMAGE).sum(1).max())
            ]
            key = jax.tree.map(lambda x: intervals.take_slots(x, order), key)
        visibility = {"query": query, "key": key}
        num_keys = key.segments.shape[1]
        pairs = int(layout.visible(query, key).sum())

    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [
        (case.rows, case.slots, case.heads, case.width),
        (case.rows, num_keys, case.kv_heads, case.width),
        (case.rows, num_keys, case.kv_heads, case.width),
        (case.rows, num_keys, case.probes),
    ]
    arrays = tuple(jax.random.normal(x, shape) for x, shape in zip(keys, shapes, strict=True))
    return Inputs(arrays, visibility, pairs)
