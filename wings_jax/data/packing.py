"""Which samples share a row, planned once before the first step.

The plan needs only the samples' sizes, so every host computes the same one, and the rows of a
step do not depend on earlier steps. Every good sample is in exactly one row: none is dropped and
none is carried over. The price is one pass of the tokenizer over the data at the start, and that
the same samples share a row in every epoch; the order of the rows is shuffled for each epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

OPEN_ROWS = 64  # rows considered for a sample; more of them fill rows better, but take longer


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of sample numbers: row r holds `members[offsets[r]:offsets[r + 1]]`.

    members  i64[n]      sample numbers, row by row
    offsets  i64[rows+1]  where each row begins in `members`
    """

    members: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.members[self.offsets[row] : self.offsets[row + 1]]


def one_each(first: int, count: int) -> PackedRows:
    """Returns the rows of data without packing: samples first..first+count-1, one in each.

    >>> rows = one_each(5, 3)
    >>> [rows[row].tolist() for row in range(len(rows))]
    [[5], [6], [7]]
    """
    return PackedRows(np.arange(first, first + count), np.arange(count + 1))


def concatenate(pools: Sequence[PackedRows]) -> PackedRows:
    """Returns the rows of all pools, one pool after another."""
    # A pool's offsets begin where the members of the pools before it end.
    members = np.concatenate([pool.members for pool in pools])
    starts = np.cumsum([0] + [len(pool.members) for pool in pools])
    offsets = [pool.offsets[:-1] + start for pool, start in zip(pools, starts, strict=False)]
    return PackedRows(members, np.concatenate([*offsets, starts[-1:]]))


def first_fit(
    members: np.ndarray, slots: np.ndarray, images: np.ndarray, *, length: int, images_per_row: int
) -> PackedRows:
    """Returns rows of at most `length` slots and `images_per_row` images that hold every member.

    A member goes into the oldest open row with room for it; if none has room, the fullest of
    OPEN_ROWS is closed and a new one is opened.

    >>> sizes = np.array([6, 5, 4, 3])
    >>> rows = first_fit(np.arange(4), sizes, np.zeros(4, int), length=10, images_per_row=0)
    >>> [rows[row].tolist() for row in range(len(rows))]
    [[0, 2], [1, 3]]

    Args:
      members: i64[n] sample numbers, in the order in which they are placed.
      slots: i32[n] slots of each, at most `length`.
      images: i32[n] images of each, at most `images_per_row`.
    """
    closed: list[list[int]] = []
    open_rows: list[list[int]] = []
    # Free slots and images of each open row, oldest first; nothing fits where there is none.
    free_slots, free_images = np.full((2, OPEN_ROWS), -1)

    # Python's numbers, and one array for each quantity: this loop runs once per sample.
    for member, need, image_need in zip(
        members.tolist(), slots.tolist(), images.tolist(), strict=True
    ):
        fits = (free_slots >= need) & (free_images >= image_need)
        row = int(fits.argmax())
        if fits[row]:
            free_slots[row] -= need
            free_images[row] -= image_need
            open_rows[row].append(member)
            continue

        # Close the fullest row: the emptier ones can take more of the coming samples.
        if len(open_rows) == OPEN_ROWS:
            fullest = int(free_slots.argmin())
            closed.append(open_rows.pop(fullest))
            for free in (free_slots, free_images):
                free[fullest:-1] = free[fullest + 1 :]

        free_slots[len(open_rows)] = length - need
        free_images[len(open_rows)] = images_per_row - image_need
        open_rows.append([member])

    return _as_rows(closed + open_rows)


def _as_rows(groups: Iterable[list[int]]) -> PackedRows:
    groups = list(groups)
    sizes = np.array([0] + [len(group) for group in groups])
    members = np.array([member for group in groups for member in group], np.int64)
    return PackedRows(members, np.cumsum(sizes))
