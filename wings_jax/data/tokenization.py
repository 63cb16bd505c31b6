"""Text to token ids, where text is never anything but text."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

import tokenizers

from wings_jax.errors import UserError

_SHORT = 32  # characters


class TextTokenizer:
    """Text to ids where no part of the text is ever read as a control token.

    Holds its own copy of a `transformers` fast tokenizer's (or a `tokenizers.Tokenizer`'s)
    rules, so it may be used from several threads and sent to other processes.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise UserError(f"a fast tokenizer (tokenizer.json) is needed, not {type(tokenizer)}")
        self._set(backend.to_str())

    def _set(self, rules: str) -> None:
        self._rules = rules
        self._backend = tokenizers.Tokenizer.from_str(rules)
        self._backend.encode_special_tokens = True  # sic: read special tokens as ordinary text
        self._backend.no_truncation()
        self._backend.no_padding()
        self._short = functools.lru_cache(maxsize=4096)(self._encode)
        self._controls: dict[tuple[str, ...], Mapping[str, int]] = {}

    def __getstate__(self) -> str:
        return self._rules

    def __setstate__(self, rules: str) -> None:
        self._set(rules)

    def encode(self, text: str) -> tuple[int, ...]:
        """Returns the ids of `text` alone, no control tokens added or read."""
        # Templates consist of short strings, and so do many answers.
        return self._short(text) if len(text) < _SHORT else self._encode(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=False).ids) if text else ()

    def encode_after(self, anchor: str, text: str) -> tuple[int, ...]:
        """Returns the ids of `text` as it is spelt after `anchor`, apart where they would merge.

        Tokenizers may spell a word differently at the start of a text than within it. If the
        two strings share a token at their border, `text` is encoded alone, so that `anchor`'s
        own ids never depend on what follows.
        """
        before, ids = self.encode(anchor), self.encode(anchor + text)
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return self.encode(text)

    def id_of(self, token: str) -> int | None:
        """Returns the id of a single token, None where the vocabulary has none such."""
        return self._backend.token_to_id(token)

    def controls(self, tokens: tuple[str, ...]) -> Mapping[str, int]:
        """Returns control token -> id.

        Raises:
          UserError: the vocabulary lacks one, or text could produce one.
        """
        if tokens not in self._controls:
            self._controls[tokens] = self._find_controls(tokens)
        return self._controls[tokens]

    def _find_controls(self, tokens: tuple[str, ...]) -> Mapping[str, int]:
        ids = {token: self.id_of(token) for token in tokens}
        missing = [token for token, known in ids.items() if known is None]
        if missing:
            raise UserError(
                f"the tokenizer lacks {', '.join(missing)}, which the template needs; "
                "choose the template of this model"
            )
        loose = [token for token, known in ids.items() if known in self.encode(token)]
        if loose:
            raise UserError(
                f"the tokenizer reads {', '.join(loose)} out of ordinary text; "
                'mark it "special" in tokenizer.json'
            )
        return ids


_known_tokenizers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def as_text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """Returns `tokenizer` as a TextTokenizer, made once per tokenizer object."""
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer
    if tokenizer not in _known_tokenizers:
        _known_tokenizers[tokenizer] = TextTokenizer(tokenizer)
    return _known_tokenizers[tokenizer]
