"""An LLM in a GGUF file: dequantised tensors under Hugging Face's keys, config, tokenizer.

Reads through the `gguf` package. Llama files hold the rows of q and k in the order of another
rope (neighbours paired instead of halves); they are put back here, so the usual tables apply.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from wings_jax.weights import rules

KEYS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{l}.attn_norm.weight": "model.layers.{l}.input_layernorm.weight",
    "blk.{l}.attn_q.weight": "model.layers.{l}.self_attn.q_proj.weight",
    "blk.{l}.attn_k.weight": "model.layers.{l}.self_attn.k_proj.weight",
    "blk.{l}.attn_v.weight": "model.layers.{l}.self_attn.v_proj.weight",
    "blk.{l}.attn_q.bias": "model.layers.{l}.self_attn.q_proj.bias",
    "blk.{l}.attn_k.bias": "model.layers.{l}.self_attn.k_proj.bias",
    "blk.{l}.attn_v.bias": "model.layers.{l}.self_attn.v_proj.bias",
    "blk.{l}.attn_output.weight": "model.layers.{l}.self_attn.o_proj.weight",
    "blk.{l}.ffn_norm.weight": "model.layers.{l}.post_attention_layernorm.weight",
    "blk.{l}.ffn_gate.weight": "model.layers.{l}.mlp.gate_proj.weight",
    "blk.{l}.ffn_up.weight": "model.layers.{l}.mlp.up_proj.weight",
    "blk.{l}.ffn_down.weight": "model.layers.{l}.mlp.down_proj.weight",
}
FAMILIES = ("llama", "qwen2")
CONTROL, USER_DEFINED = 3, 4

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a GGUF file holds: `config.json`'s entries, tensors unread, tokenizer files."""

    config: dict[str, Any]
    tensors: dict[str, rules.Tensor]
    tokenizer_files: dict[str, str]


def read_gguf(file: str | os.PathLike) -> Opened:
    """Returns the content of a GGUF file of the Llama or Qwen2 family.

    Raises:
      WeightsError: not a GGUF file, another family, or the `gguf` package is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise rules.WeightsError(f"{file}: install gguf to read it") from error
    try:
        reader = gguf.GGUFReader(file)
    except OSError as error:
        raise rules.WeightsError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, IndexError) as error:
        raise rules.WeightsError(f"{file} is not a GGUF file, or is cut short") from error
    fields = {key: field.contents() for key, field in reader.fields.items()}
    family = fields.get("general.architecture")
    if family not in FAMILIES:
        raise rules.WeightsError(f"{file}: architecture {family!r} is none of {FAMILIES}")
    config = _config(fields, family, {t.name: t for t in reader.tensors})
    tensors = {}
    for entry in reader.tensors:
        key, tensor = _tensor(gguf, entry, config, str(file))
        tensors[key] = tensor
    return Opened(config, tensors, tokenizer_files(fields, str(file)))


def _config(fields: Mapping[str, Any], family: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    heads = fields[f"{family}.attention.head_count"]
    width = fields[f"{family}.embedding_length"]
    return {
        "model_type": family,
        "architectures": ["Qwen2ForCausalLM" if family == "qwen2" else "LlamaForCausalLM"],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "num_hidden_layers": fields[f"{family}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{family}.attention.head_count_kv", heads),
        "head_dim": fields.get(f"{family}.attention.key_length", width // heads),
        "intermediate_size": fields[f"{family}.feed_forward_length"],
        # float32 in the file: 9.9999997e-06 stands for 1e-05.
        "rms_norm_eps": float(f"{fields[f'{family}.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(fields.get(f"{family}.rope.freq_base", 1e4)),
        "max_position_embeddings": fields[f"{family}.context_length"],
        "tie_word_embeddings": "output.weight" not in tensors,
        **{
            f"{role}_token_id": fields[f"tokenizer.ggml.{key}_token_id"]
            for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
            if f"tokenizer.ggml.{key}_token_id" in fields
        },
    }


def _tensor(gguf: Any, entry: Any, config: Mapping[str, Any], file: str) -> tuple:
    """Returns the key and the tensor of one entry of the file."""
    match = re.match(r"blk\.(\d+)\.", entry.name)
    layer = match[1] if match else ""
    pattern = re.sub(r"^blk\.\d+\.", "blk.{l}.", entry.name)
    key = KEYS.get(pattern, entry.name).replace("{l}", layer)
    heads = 0
    if config["model_type"] == "llama" and pattern.startswith(("blk.{l}.attn_q", "blk.{l}.attn_k")):
        is_query = pattern.startswith("blk.{l}.attn_q")
        heads = config["num_attention_heads" if is_query else "num_key_value_heads"]
    # The file names the fastest dimension first.
    shape = tuple(int(n) for n in reversed(entry.shape))
    return key, rules.Tensor(shape, np.dtype(np.float32), _loader(gguf, entry, shape, heads), file)


def _loader(gguf: Any, entry: Any, shape: tuple[int, ...], heads: int) -> Callable:
    def load() -> np.ndarray:
        array = gguf.quants.dequantize(entry.data, entry.tensor_type).astype(np.float32, copy=False)
        array = array.reshape(shape)
        if heads:
            split = array.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
            array = split.swapaxes(1, 2).reshape(shape)
        return array

    return load


def tokenizer_files(fields: Mapping[str, Any], file: str) -> dict[str, str]:
    """Returns `tokenizer.json` and `tokenizer_config.json`, rebuilt from the file's fields.

    Raises:
      WeightsError: the tokenizer is not byte-level BPE of a known kind.
    """
    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    steps = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), _bytes(use_regex=True)],
        "qwen2": [_split(_QWEN2), _bytes(use_regex=False)],
        "llama-bpe": [_split(_LLAMA3), _bytes(use_regex=False)],
        "gpt-2": [_bytes(use_regex=True)],
        "default": [_bytes(use_regex=True)],
    }
    if kind[0] != "gpt2" or kind[1] not in steps:
        raise rules.WeightsError(f"{file}: tokenizer {kind[0]}/{kind[1]} is not supported")
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if kind[1] == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps[kind[1]])
    backend.decoder = decoders.ByteLevel()
    pairs = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([_added(t) for t, kind in pairs if kind == CONTROL])
    backend.add_tokens([_added(t, special=False) for t, kind in pairs if kind == USER_DEFINED])
    named = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return {
        "tokenizer.json": backend.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }


def _bytes(*, use_regex: bool) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")


def _added(token: str, *, special: bool = True) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, special=special, normalized=False)
