"""The real Qwen tokenizer without a download: rebuilt from the ranks that `dashscope` carries."""

from __future__ import annotations

import base64
import functools
import importlib.util
import itertools
import pathlib

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

# How Qwen's tokenizer splits text into words before the byte-pair merges.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@functools.cache
def load_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns the tokenizer of Qwen 1 to 2, or skips the test if `dashscope` is not installed."""
    package = importlib.util.find_spec("dashscope")  # its path, without an import
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package dashscope, which carries Qwen's vocabulary, is not installed")

    path = pathlib.Path(package.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    rows = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    # Tokens are bytes; byte-level vocabularies write each byte as a printable letter.
    letters = _letters()
    printed = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {printed[token]: rank for token, rank in ranks.items()}
    merges = [(printed[left], printed[right]) for left, right in _merges(ranks)]

    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROLS))

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=CONTROLS[0], eos_token=CONTROLS[2]
    )


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns the pairs that were merged, in order: a token's last two parts below its rank."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda row: row[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            lowest = min(joined)
            if lowest >= rank:
                break
            index = joined.index(lowest)
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def _letters() -> dict[int, str]:
    """Returns the printable letter that stands for each byte in byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
