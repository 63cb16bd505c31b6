"""Copies of large arrays with their dimensions in another order, near the speed of memory.

numpy copies a transposed matrix row by row of the result, and reads one element of each cache
line at a time. Here a strip of the source's rows is copied at a time: its lines stay in the cache
until all of their elements are used.
"""

from __future__ import annotations

import math

import numpy as np

STRIP_BYTES = 32  # of a row of the result per strip; half a cache line was fastest


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """Copies an array into another one of the same shape, cast to its dtype.

    Fast where the source is a transposed view whose dimensions were rotated, as `rules` makes
    them: (N, H, D) -> (D, N, H) is the transpose of a matrix [N*H, D].
    """
    matrix = _as_transposed_matrix(source)
    if matrix is None or not target.flags.c_contiguous:
        target[...] = source
        return

    # matrix [rows, columns] -> [columns, rows], a strip of rows at a time.
    rows, columns = matrix.shape
    flat = target.reshape(columns, rows)
    strip = max(1, STRIP_BYTES // target.dtype.itemsize)
    for start in range(0, rows, strip):
        flat[:, start : start + strip] = matrix[start : start + strip].T


def _as_transposed_matrix(source: np.ndarray) -> np.ndarray | None:
    """Returns the contiguous matrix that `source` is the transpose of, or None.

    >>> _as_transposed_matrix(np.zeros((3, 4, 5)).transpose(2, 0, 1)).shape
    (12, 5)
    """
    if source.flags.c_contiguous:
        return None
    for split in range(1, source.ndim):
        order = (*range(split, source.ndim), *range(split))
        original = source.transpose(order)
        if original.flags.c_contiguous:
            rows = math.prod(source.shape[split:])
            return original.reshape(rows, -1)
    return None
