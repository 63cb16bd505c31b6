"""Tables, durations and lists of names as text: for the terminal, Markdown and messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_duration(seconds: float) -> str:
    """Returns '1:02:03' or '2:03'."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_names(names: Iterable[str], limit: int = 4) -> str:
    """Returns the first names and how many more there are.

    >>> format_names(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def text_table(cells: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells for a terminal; the first row is the heading."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Returns the same in Markdown; a row whose name begins with "= " is set in bold."""
    header, *rows = cells
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for row in rows:
        is_total = row[0].startswith("= ")
        shown = [f"**{cell.removeprefix('= ')}**" for cell in row] if is_total else row
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)
