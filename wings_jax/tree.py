"""Path tables: what holds for which parameter, said once, by regular expressions over paths.

A parameter tree is nested dicts; a *flat* tree is `{'decoder/norm/scale': leaf}`. A table is an
ordered mapping name -> regular expression. First match wins, every parameter is matched, and no
row is dead: a table that breaks this fails with the offenders' names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flax import traverse_util

from wings_jax import formatting
from wings_jax.errors import UserError

Leaf = TypeVar("Leaf")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {'a/b': leaf} of nested dicts."""
    return traverse_util.flatten_dict(tree, sep="/")


def nest(flat: Mapping[str, Leaf]) -> dict[str, Any]:
    """Returns nested dicts of {'a/b': leaf}."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def match_table(paths: Mapping[str, Any], table: Mapping[str, str], *, name: str) -> dict[str, str]:
    """Returns path -> name of the first row whose expression matches the whole path.

    Raises:
      UserError: a path without a row, a row that matches no path, or one that is no regular
        expression; `name` is the table's.
    """
    try:
        rows = {row: re.compile(pattern) for row, pattern in table.items()}
    except re.error as error:
        raise UserError(f"{name}: {error.pattern!r} is no regular expression: {error}") from error
    found = {
        path: next((row for row, pattern in rows.items() if pattern.fullmatch(path)), None)
        for path in paths
    }
    lost = [path for path, row in found.items() if row is None]
    if lost:
        raise UserError(f"{name}: no row matches {formatting.format_names(lost)}")
    dead = [row for row, pattern in rows.items() if row not in found.values()]
    if dead:
        listed = ", ".join(f"{row} ({table[row]})" for row in dead)
        raise UserError(f"{name}: row matches no parameter of its own: {listed}")
    return found


def split(
    flat: Mapping[str, Leaf], chosen: Callable[[str], bool]
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Returns the flat tree in two: the paths that are chosen, and the rest."""
    yes = {path: leaf for path, leaf in flat.items() if chosen(path)}
    return yes, {path: leaf for path, leaf in flat.items() if path not in yes}


def count(flat: Mapping[str, Any]) -> int:
    """Returns the number of parameters in the leaves of a flat tree."""
    return sum(math.prod(leaf.shape) for leaf in flat.values())


def describe(flat: Mapping[str, Any], columns: Mapping[str, Mapping[str, str]]) -> str:
    """Returns a table of parameter counts per distinct combination of the columns' labels.

    `columns` maps a heading to a labelling (path -> text) of the flat tree.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in flat:
        groups.setdefault(tuple(column[path] for column in columns.values()), []).append(path)
    rows = [
        (*key, f"{len(paths)}", f"{count({p: flat[p] for p in paths}):,}")
        for key, paths in groups.items()
    ]
    rows = [(*columns, "arrays", "parameters"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = len(columns)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
