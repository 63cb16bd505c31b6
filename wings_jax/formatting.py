"""Tables, durations and lists of names as text: for the terminal, Markdown and messages."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Returns '1:02:03' or '2:03'."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
