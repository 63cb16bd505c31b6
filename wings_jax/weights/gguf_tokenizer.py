"""The tokenizer of a GGUF file, rebuilt as the files that transformers opens."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from wings_jax.model.config_fields import ConfigFields
from wings_jax.weights.tensors import WeightsError

# Token types of the file.
CONTROL, USER_DEFINED = 3, 4

# How text is split before the merges, from the tokenizers of Qwen2 and Llama 3.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def tokenizer_files(fields: ConfigFields, family: str) -> dict[str, str]:
    """Returns `tokenizer.json` and `tokenizer_config.json` of the file's fields.

    Raises:
      WeightsError, UserError: the tokenizer is not byte-level BPE of a known kind, or damaged.
    """
    kind = fields.text("tokenizer.ggml.model", "none")
    pre_tokenizer = fields.text("tokenizer.ggml.pre", "default")

    # Files from before the field existed; Qwen2 has only ever had one.
    if family == "qwen2" and pre_tokenizer == "default":
        pre_tokenizer = "qwen2"
    steps = _pre_tokenizer_steps().get(pre_tokenizer)
    if kind != "gpt2" or steps is None:
        raise WeightsError(
            f"{fields.file}: tokenizer {kind!a}/{pre_tokenizer!a} is not supported; give the "
            "directory of the model's tokenizer with --tokenizer DIR"
        )

    # Vocabulary and merges, then how text is split before them.
    tokens = _strings(fields, "tokenizer.ggml.tokens")
    merges = [merge.split(" ") for merge in _strings(fields, "tokenizer.ggml.merges")]
    backend = _byte_level_bpe(fields, tokens, merges, has_whole_words=steps is _LLAMA3_STEPS)
    if steps is _QWEN2_STEPS:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    backend.decoder = decoders.ByteLevel()

    # Tokens that are never split.
    types = fields.value("tokenizer.ggml.token_type", [])
    if not isinstance(types, list) or len(types) not in (0, len(tokens)):
        raise WeightsError(f"{fields.file}: tokenizer.ggml.token_type has another length")

    pairs = list(zip(tokens, types, strict=False))
    backend.add_special_tokens([_added_token(t) for t, number in pairs if number == CONTROL])
    backend.add_tokens(
        [_added_token(t, special=False) for t, number in pairs if number == USER_DEFINED]
    )
    return {
        "tokenizer.json": backend.to_str(),
        "tokenizer_config.json": json.dumps(_tokenizer_config(fields, tokens), indent=2),
    }


def _byte_level_bpe(
    fields: ConfigFields, tokens: list[str], merges: list[list[str]], *, has_whole_words: bool
) -> tokenizers.Tokenizer:
    """Returns the vocabulary and its merges.

    Args:
      has_whole_words: a word that is a token stays whole, whatever the merges make of it.
    """
    # A merge of unknown tokens would only fail inside of the library.
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        is_pair = len(merge) == 2
        if not is_pair or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise WeightsError(
                f"{fields.file}: tokenizer.ggml.merges: {' '.join(merge)[:40]!a} is not a pair of "
                "tokens"
            )
        pairs.append((merge[0], merge[1]))

    return tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=has_whole_words)
    )


def _strings(fields: ConfigFields, name: str) -> list[str]:
    """Returns a list of strings."""
    value = fields.value(name, "missing")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise WeightsError(
            f"{fields.file}: {name} is not a list of texts; give the directory of the model's "
            "tokenizer with --tokenizer DIR"
        )
    return value


def _tokenizer_config(fields: ConfigFields, tokens: list[str]) -> dict[str, Any]:
    """Returns the class, the named tokens and the chat template."""
    # Ids of the file become texts here.
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        field = f"tokenizer.ggml.{key}_token_id"
        if not fields.has(field):
            continue
        index = fields.integer(field)
        if not 0 <= index < len(tokens):
            raise WeightsError(f"{fields.file}: {field} {index} of {len(tokens)} tokens")
        config[f"{role}_token"] = tokens[index]

    if fields.has("tokenizer.chat_template"):
        config["chat_template"] = fields.text("tokenizer.chat_template")
    return config


def _byte_level(*, use_regex: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")


_QWEN2_STEPS = (_split(_QWEN2), _byte_level(use_regex=False))
_LLAMA3_STEPS = (_split(_LLAMA3), _byte_level(use_regex=False))


def _pre_tokenizer_steps() -> dict[str, tuple]:
    """Returns the file's name of a pre-tokenizer -> its steps."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {
        "smollm": (digits, _byte_level(use_regex=True)),
        "qwen2": _QWEN2_STEPS,
        "deepseek-r1-qwen": _QWEN2_STEPS,
        "llama-bpe": _LLAMA3_STEPS,
        "llama3": _LLAMA3_STEPS,
        "llama-v3": _LLAMA3_STEPS,
        "gpt-2": (_byte_level(use_regex=True),),
    }


def _added_token(token: str, *, special: bool = True) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, special=special, normalized=False)
