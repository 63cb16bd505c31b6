"""Trains the tiny tokenizer: byte-level BPE in Qwen's manner, with the ChatML control tokens."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from wings_jax.scenes import drawings

CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# A word includes the space before it, and every digit is a token by itself (as in Qwen's).
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def frequent_texts() -> Iterator[str]:
    """Yields what should take few tokens: the template's words, and beginnings of answers."""
    for _ in range(4000):
        yield from ("system\nYou are a helpful assistant.", "user\n", "assistant\n")
        yield from (*drawings.THINGS, *drawings.COLORS, *drawings.PLACES)
        yield from (f"the {thing}?" for thing in drawings.THINGS)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Returns a tokenizer of any text that needs few tokens for `texts`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROLS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(CONTROLS))
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path) -> None:
    """Writes the files from which `transformers.AutoTokenizer` loads it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "padding_side": "right",
    }
    text = json.dumps(config, indent=1) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
