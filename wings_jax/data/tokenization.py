"""Text to token ids, where text never becomes a control token."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import tokenizers

from wings_jax.errors import UserError

_SHORT_TEXT = 32  # characters; shorter texts are cached


class HFTokenizer(Protocol):
    """What the package uses of a fast tokenizer of `transformers`."""

    eos_token_id: int | None
    chat_template: str | None

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer's rules, as `tokenizers` holds them."""
        ...

    def __len__(self) -> int:
        """The number of tokens, control tokens included."""
        ...

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        """Returns the text of `ids`."""
        ...

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, **options
    ) -> str:
        """Returns messages of role and content, written by the tokenizer's chat template."""
        ...


class TextTokenizer:
    """Text to ids where no part of the text is ever read as a control token.

    Holds its own copy of the tokenizer's rules, so that several threads may use it and it can be
    sent to other processes.

    Args:
      tokenizer: a fast tokenizer of `transformers`, or a `tokenizers.Tokenizer`.

    Raises:
      UserError: it is neither.
    """

    def __init__(self, tokenizer: HFTokenizer | tokenizers.Tokenizer):
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise UserError(f"a fast tokenizer (tokenizer.json) is needed, not {type(tokenizer)}")
        self._set_rules(backend.to_str())

    def _set_rules(self, rules: str) -> None:
        self._rules = rules
        self._backend = tokenizers.Tokenizer.from_str(rules)
        # Despite its name, this setting makes the backend read special tokens as ordinary text.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()

        self._encode_short = functools.lru_cache(maxsize=4096)(self._encode)
        self._controls: dict[tuple[str, ...], Mapping[str, int]] = {}

    def __getstate__(self) -> str:
        return self._rules

    def __setstate__(self, rules: str) -> None:
        self._set_rules(rules)

    def encode(self, text: str) -> tuple[int, ...]:
        """Returns the ids of `text` alone, without any control token."""
        # Templates consist of short strings, and so do many answers.
        return self._encode_short(text) if len(text) < _SHORT_TEXT else self._encode(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=False).ids) if text else ()

    def encode_after(self, prefix: str, text: str) -> tuple[int, ...]:
        """Returns the ids of `text` as it is tokenized after `prefix`.

        Tokenizers may split a word differently at the start of a text than within it. If the two
        strings would share a token at their border, `text` is encoded alone, so that the ids of
        `prefix` never depend on what follows.
        """
        before, ids = self.encode(prefix), self.encode(prefix + text)
        # The ids of `prefix` are unchanged: the border is between two tokens.
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return self.encode(text)

    def id_of(self, token: str) -> int | None:
        """Returns the id of a single token, None if the vocabulary does not have it."""
        return self._backend.token_to_id(token)

    def controls(self, tokens: tuple[str, ...]) -> Mapping[str, int]:
        """Returns control token -> id.

        Raises:
          UserError: the vocabulary does not have one of them, or text could produce one.
        """
        if tokens not in self._controls:
            self._controls[tokens] = self._find_controls(tokens)
        return self._controls[tokens]

    def _find_controls(self, tokens: tuple[str, ...]) -> Mapping[str, int]:
        found = {token: self.id_of(token) for token in tokens}
        ids = {token: number for token, number in found.items() if number is not None}

        missing = [token for token in found if token not in ids]
        if missing:
            raise UserError(
                f"the tokenizer does not have {', '.join(missing)}, which the template needs; "
                "choose the template of this model"
            )

        # A token that is not marked special could be produced by a user's text.
        unprotected = [token for token, number in ids.items() if number in self.encode(token)]
        if unprotected:
            raise UserError(
                f"the tokenizer reads {', '.join(unprotected)} out of ordinary text; "
                'mark it "special" in tokenizer.json'
            )
        return ids


def special_tokens(tokenizer: HFTokenizer) -> list[str]:
    """Returns the tokens that the tokenizer marks as special."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return [token.content for token in added if token.special]


AnyTokenizer = TextTokenizer | HFTokenizer | tokenizers.Tokenizer

_text_tokenizers: weakref.WeakKeyDictionary[Any, TextTokenizer] = weakref.WeakKeyDictionary()


def as_text_tokenizer(tokenizer: AnyTokenizer) -> TextTokenizer:
    """Returns `tokenizer` as a TextTokenizer, built once per tokenizer object."""
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer
    if tokenizer not in _text_tokenizers:
        _text_tokenizers[tokenizer] = TextTokenizer(tokenizer)
    return _text_tokenizers[tokenizer]
