"""The text of an answer while it is generated, and where stop strings cut it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from wings_jax.inference.dialogue import OutputPiece

REPLACEMENT = "\ufffd"  # what an unfinished character decodes to


class TextStream:
    """Turns tokens into text that never has to be taken back.

    The bytes of an unfinished character are held back, and so is what may become a stop string.

    Args:
      decode: returns the text of an answer's tokens.
      stop: strings that end an answer and are not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(string for string in stop if string)
        self._tokens: list[int] = []
        self._shown = 0
        self.text = ""
        self.is_cut = False

    def add(self, tokens: Sequence[int], *, is_last: bool = False) -> str:
        """Returns the text that these tokens add; "" while it is held back."""
        # All tokens are decoded together: one character may take several tokens.
        self._tokens += tokens
        self.text, self.is_cut = cut_at_stop(self._decode(self._tokens), self._stop)

        # What was shown stays shown; the end of the text may still change.
        end = len(self.text) if is_last or self.is_cut else self._safe_length()
        new_text = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new_text

    def _safe_length(self) -> int:
        """Returns how much of the text cannot change any more."""
        # An unfinished character decodes to U+FFFD until its last byte is there.
        text = self.text.rstrip(REPLACEMENT)
        held_back = max((overlap(text, string) for string in self._stop), default=0)
        return len(text) - held_back


def stream_text(
    pieces: Iterable[OutputPiece],
    decode: Callable[[Sequence[int]], str],
    *,
    stop_tokens: Collection[int],
    stop_strings: Sequence[str],
) -> Iterator[str]:
    """Yields the text of an answer as its tokens arrive, until it ends or a stop string occurs."""
    stream = TextStream(decode, stop_strings)
    for piece in pieces:
        # A stop token ends an answer and has no text.
        tokens = [token for token in piece.tokens if token not in stop_tokens]
        text = stream.add(tokens, is_last=piece.is_last)

        if text:
            yield text
        if stream.is_cut:
            return


def overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of `text` may be the start of a stop string.

    >>> overlap("the en", "end"), overlap("the end", "end"), overlap("a", "end")
    (2, 0, 0)
    """
    # The longest possible start of the stop string counts.
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Returns the text before the first stop string in it, and whether there was one.

    >>> cut_at_stop("red END blue", ["END", "blue"])
    ('red ', True)
    >>> cut_at_stop("red", ["END"])
    ('red', False)
    """
    positions = [text.find(string) for string in stop if string]
    ends = [position for position in positions if position >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
