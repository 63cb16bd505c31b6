"""Numbers, tables, durations and lists of names as text: for the terminal, Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

Interval = tuple[float, float]  # its low and its high end
Cells = Sequence[Sequence[str]]  # rows of a table; the first row is the heading
TOTAL = "= "  # prefix of the name of a row that adds up others


def format_duration(seconds: float) -> str:
    """Returns hours, minutes and seconds.

    >>> format_duration(3723)
    '1:02:03'
    >>> format_duration(123)
    '2:03'
    """
    minutes, remainder = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{remainder:02}" if hours else f"{minutes}:{remainder:02}"


def format_names(names: Iterable[str], limit: int = 4) -> str:
    """Returns the first names and how many more there are.

    >>> format_names(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def format_number(value: float, *, digits: int = 1, scale: float = 1.0, sign: str = "") -> str:
    """Returns `scale * value`; `sign` "+" shows the sign of positive numbers too.

    >>> format_number(0.803, scale=100)
    '80.3'
    >>> format_number(-0.0001, scale=100, sign="+")
    '+0.0'
    """
    return f"{scale * value:{sign}z.{digits}f}"  # z: 0.0 instead of -0.0


def format_estimate(
    value: float,
    interval: Interval | None,
    *,
    digits: int = 1,
    scale: float = 1.0,
    sign: str = "",
) -> str:
    """Returns a number and, where it is known, its interval; options as in `format_number`.

    >>> format_estimate(0.803, (0.776, 0.827), scale=100)
    '80.3 [77.6, 82.7]'
    >>> format_estimate(31.2, None, digits=3)
    '31.200'
    """
    center = format_number(value, digits=digits, scale=scale, sign=sign)
    if interval is None:
        return center
    return f"{center} {format_interval(interval, digits=digits, scale=scale, sign=sign)}"


def format_interval(
    interval: Interval, *, digits: int = 1, scale: float = 1.0, sign: str = ""
) -> str:
    """Returns both ends in brackets; options as in `format_number`.

    >>> format_interval((0.776, 0.827), scale=100)
    '[77.6, 82.7]'
    """
    low, high = (format_number(end, digits=digits, scale=scale, sign=sign) for end in interval)
    return f"[{low}, {high}]"


def text_table(cells: Cells) -> str:
    """Returns rows of cells for a terminal: the first column to the left, the others to the right.

    >>> print(text_table([["", "n", "base"], ["digit", "12", "9.1"]]))
            n  base
    ---------------
    digit  12   9.1
    """
    # The widest cell of each column.
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]

    lines = []
    for name, *values in cells:
        aligned = (cell.rjust(width) for cell, width in zip(values, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))

    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def markdown_table(cells: Cells) -> str:
    """Returns the same in Markdown; a row whose name begins with `TOTAL` is set in bold.

    >>> print(markdown_table([["", "n"], ["digit", "12"], ["= all", "12"]]))
    |  | n |
    |---|---:|
    | digit | 12 |
    | **all** | **12** |
    """
    header, *rows = cells
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]

    for row in rows:
        # The mark is for tables in plain text, which have no bold.
        is_total = row[0].startswith(TOTAL)
        shown = [f"**{cell.removeprefix(TOTAL)}**" for cell in row] if is_total else row
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def round_for_json(value: float | None, digits: int = 6) -> float | None:
    """Returns the rounded number; None for None and for NaN, which JSON does not have.

    >>> round_for_json(2 / 3), round_for_json(float("nan"))
    (0.666667, None)
    """
    if value is None or math.isnan(value):
        return None
    return round(float(value), digits)


def round_interval(interval: Interval | None, digits: int = 6) -> list[float | None] | None:
    """Returns both ends as `round_for_json` does, None where there is no interval."""
    return None if interval is None else [round_for_json(end, digits) for end in interval]


def json_text(content: Any) -> str:
    """Returns the text of a report in JSON, with a newline at its end."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def json_lines(records: Iterable[Any]) -> str:
    r"""Returns the text of a JSONL file: one line of JSON per record.

    >>> json_lines([{"id": 1}, {"id": 2}])
    '{"id": 1}\n{"id": 2}\n'
    """
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
