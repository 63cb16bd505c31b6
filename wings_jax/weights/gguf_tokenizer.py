"""The tokenizer of a GGUF file, rebuilt as the files that transformers opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from wings_jax.weights.tensors import WeightsError

# Token types of the file.
CONTROL, USER_DEFINED = 3, 4

# How text is split before the merges, from the tokenizers of Qwen2 and Llama 3.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def tokenizer_files(fields: Mapping[str, Any], file: str) -> dict[str, str]:
    """Returns `tokenizer.json` and `tokenizer_config.json` of the file's fields.

    Raises:
      WeightsError: the tokenizer is not byte-level BPE of a known kind.
    """
    kind = fields.get("tokenizer.ggml.model")
    pre_tokenizer = fields.get("tokenizer.ggml.pre", "default")
    steps = _pre_tokenizer_steps().get(pre_tokenizer)
    if kind != "gpt2" or steps is None:
        raise WeightsError(f"{file}: tokenizer {kind}/{pre_tokenizer} is not supported")

    # The model: tokens by id, and merges.
    tokens = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if pre_tokenizer == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()

    # Tokens that are never split.
    types = fields["tokenizer.ggml.token_type"]
    pairs = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([_added_token(t) for t, kind in pairs if kind == CONTROL])
    backend.add_tokens(
        [_added_token(t, special=False) for t, kind in pairs if kind == USER_DEFINED]
    )
    return {
        "tokenizer.json": backend.to_str(),
        "tokenizer_config.json": json.dumps(_tokenizer_config(fields), indent=2),
    }


def _tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the class, the named tokens and the chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        field = f"tokenizer.ggml.{key}_token_id"
        if field in fields:
            config[f"{role}_token"] = tokens[fields[field]]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return config


def _pre_tokenizer_steps() -> dict[str, list]:
    """Returns the file's name of a pre-tokenizer -> its steps."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {
        "smollm": [digits, _byte_level(use_regex=True)],
        "qwen2": [_split(_QWEN2), _byte_level(use_regex=False)],
        "llama-bpe": [_split(_LLAMA3), _byte_level(use_regex=False)],
        "gpt-2": [_byte_level(use_regex=True)],
        "default": [_byte_level(use_regex=True)],
    }


def _byte_level(*, use_regex: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")


def _added_token(token: str, *, special: bool = True) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, special=special, normalized=False)
