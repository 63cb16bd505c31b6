"""Flat parameter trees and path tables: regular expressions that assign every path to a row.

A parameter tree is nested dicts; a *flat* tree is `{'decoder/norm/scale': leaf}`. A path table is
an ordered mapping name -> regular expression. The first match wins, every path must match a row,
and every row must match a path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from flax import traverse_util

from wings_jax import formatting
from wings_jax.errors import UserError

Leaf = TypeVar("Leaf")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {'a/b': leaf} of nested dicts.

    >>> flatten({"norm": {"scale": 1}, "bias": 2})
    {'norm/scale': 1, 'bias': 2}
    """
    return traverse_util.flatten_dict(tree, sep="/")


def nest(flat: Mapping[str, Leaf]) -> dict[str, Any]:
    """Returns nested dicts of {'a/b': leaf}, the inverse of `flatten`.

    >>> nest({"norm/scale": 1, "bias": 2})
    {'norm': {'scale': 1}, 'bias': 2}
    """
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def match_table(paths: Iterable[str], table: Mapping[str, str], *, name: str) -> dict[str, str]:
    """Returns path -> name of the first row whose expression matches the whole path.

    `name` is the table's, for messages.

    >>> table = {"frozen": "vision/.*", "trained": ".*"}
    >>> match_table(["vision/patch/kernel", "decoder/norm/scale"], table, name="groups")
    {'vision/patch/kernel': 'frozen', 'decoder/norm/scale': 'trained'}

    Raises:
      UserError: a path that no row matches, a row that is not the first match of any path, or
        an invalid regular expression.
    """
    try:
        rows = {row: re.compile(pattern) for row, pattern in table.items()}
    except re.error as error:
        raise UserError(
            f"{name}: {error.pattern!r} is not a regular expression: {error}"
        ) from error

    matches: dict[str, str] = {}
    unmatched = []
    # The order of the rows is their priority.
    for path in paths:
        row = next((row for row, pattern in rows.items() if pattern.fullmatch(path)), None)
        if row is None:
            unmatched.append(path)
        else:
            matches[path] = row

    if unmatched:
        raise UserError(f"{name}: no row matches {formatting.format_names(unmatched)}")

    # A row that never matches is a mistake in its expression, or in the order of the rows.
    unused = [row for row in rows if row not in matches.values()]
    if unused:
        listed = ", ".join(f"{row} ({table[row]})" for row in unused)
        raise UserError(f"{name}: row is not the first match of any parameter: {listed}")
    return matches


def split(
    flat: Mapping[str, Leaf], chosen: Callable[[str], bool]
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Returns two flat trees: the paths for which `chosen` is true, and the others.

    >>> split({"a/b": 1, "c": 2}, lambda path: path.startswith("a/"))
    ({'a/b': 1}, {'c': 2})
    """
    selected = {path: leaf for path, leaf in flat.items() if chosen(path)}
    return selected, {path: leaf for path, leaf in flat.items() if path not in selected}


def count(flat: Mapping[str, Any]) -> int:
    """Returns the number of parameters in the leaves of a flat tree."""
    return sum(math.prod(leaf.shape) for leaf in flat.values())


def describe(flat: Mapping[str, Any], columns: Mapping[str, Mapping[str, str]]) -> str:
    """Returns a table of parameter counts per distinct combination of the columns' labels.

    `columns` maps a heading to the labels (path -> text) of the flat tree's paths.

    >>> import numpy as np
    >>> shapes = {"a/kernel": np.zeros((8, 128)), "a/bias": np.zeros(128), "b": np.zeros(3)}
    >>> print(describe(shapes, {"group": {"a/kernel": "a", "a/bias": "a", "b": "rest"}}))
    group  arrays  parameters
    -------------------------
    a           2       1,152
    rest        1           3
    """
    # The columns' labels together are the key of a row.
    paths_by_labels: dict[tuple[str, ...], list[str]] = {}
    for path in flat:
        labels = tuple(column[path] for column in columns.values())
        paths_by_labels.setdefault(labels, []).append(path)

    cells: list[tuple[str, ...]] = [(*columns, "arrays", "parameters")]
    for labels, paths in paths_by_labels.items():
        total = count({path: flat[path] for path in paths})
        cells.append((*labels, str(len(paths)), f"{total:,}"))

    return formatting.text_table(cells)
