"""What a tokenizer's chat template, a Jinja program, writes of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax.data import tokenization

# Templates that print the date take this one, so that prompts do not change from day to day.
_DATE = "26 Jul 2024"

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def make_turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    """Returns the turns of a conversation from pairs of speaker and text.

    >>> make_turns(("human", "Hello?"))
    [{'from': 'human', 'value': 'Hello?'}]
    """
    return [{"from": speaker, "value": text} for speaker, text in pairs]


def render_chat(
    tokenizer: tokenization.HFTokenizer, turns: Sequence[Mapping[str, str]], *, is_open: bool
) -> str:
    """Returns what the chat template writes. Raises ValueError if it refuses the conversation.

    A template of a processor reads the content of a message as parts; it gets such messages if it
    does not write the texts of others.
    """
    texts = [turn["value"].strip() for turn in turns]
    messages = [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    of_parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]

    # Where neither gives all texts, the result is that of messages of text, the usual ones.
    results: list[str | ValueError] = []
    for form in (messages, of_parts):
        try:
            written = _apply(tokenizer, form, is_open=is_open)
        except ValueError as error:
            results.append(error)
            continue

        if all(text in written for text in texts):
            return written
        results.append(written)

    if isinstance(results[0], ValueError):
        raise results[0]
    return results[0]


def _apply(
    tokenizer: tokenization.HFTokenizer, messages: list[dict[str, Any]], *, is_open: bool
) -> str:
    """Returns what the chat template writes of messages. Raises ValueError if it refuses them."""
    import jinja2

    options: dict[str, Any] = {"tokenize": False, "date_string": _DATE}
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=is_open, **options)
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from error
