"""An answer's text while it is being written, and where it is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what half a character decodes to


class TextStream:
    """Turns tokens into text that never has to be taken back.

    Held back are the bytes of an unfinished character, and what may become a stop string.

    Args:
      decode: returns the text of an answer's tokens.
      stop: strings that end an answer and are not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode, self._stop = decode, tuple(string for string in stop if string)
        self._tokens: list[int] = []
        self._shown = 0
        self.text = ""
        self.is_cut = False

    def add(self, tokens: Sequence[int], *, is_last: bool = False) -> str:
        """Returns the text to show after these tokens have been written too."""
        self._tokens += tokens
        self.text, self.is_cut = cut_at_stop(self._decode(self._tokens), self._stop)
        safe = len(self.text) if is_last or self.is_cut else self._safe()
        fresh = self.text[self._shown : safe]
        self._shown = max(self._shown, safe)
        return fresh

    def _safe(self) -> int:
        text = self.text.rstrip(UNFINISHED)
        held = 0
        for string in self._stop:
            sizes = range(min(len(string) - 1, len(text)), held, -1)
            held = next((n for n in sizes if text.endswith(string[:n])), held)
        return len(text) - held


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Returns the text before the first stop string in it, and whether there was one."""
    ends = [at for at in (text.find(string) for string in stop if string) if at >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
