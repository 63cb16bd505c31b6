"""An LLM in a GGUF file: dequantized tensors under Hugging Face keys, config, tokenizer.

Dequantizes with the `gguf` package. Llama files store the rows of q and k in the order of another
rope (neighbors paired instead of halves); they are reordered here, so the usual tables apply.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from wings_jax.errors import UserError
from wings_jax.model.config_fields import ConfigFields
from wings_jax.weights import gguf_rope, gguf_tokenizer, text_files
from wings_jax.weights.gguf_header import GgufEntry, GgufHeader, read_header
from wings_jax.weights.tensors import LazyTensor, WeightsError

# GGUF name -> Hugging Face key; `{l}` stands for the layer.
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
ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """Content of a GGUF file.

    config            entries of a Hugging Face `config.json`
    tensors           Hugging Face key -> tensor (float32), unread
    tokenizer_files   name -> content; empty where the caller has another tokenizer
    """

    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    tokenizer_files: dict[str, str]


def read_gguf(file: str | os.PathLike, *, with_tokenizer: bool = True) -> GgufModel:
    """Returns the content of a GGUF file of the Llama or Qwen2 family.

    Raises:
      WeightsError: not a GGUF file, another family, a feature that is not supported, or the
        `gguf` package is missing.
    """
    text_files.check_not_pointer(file)
    header = read_header(file)
    _check_single_file(header, str(file))
    fields = ConfigFields(header.fields, str(file))
    family = header.fields.get("general.architecture")
    if family not in FAMILIES:
        raise WeightsError(f"{file}: architecture {family!r} is not one of {', '.join(FAMILIES)}")

    # The factors of Llama 3.1's rope are a tensor here, and numbers in Hugging Face's config.
    entries = {entry.name: entry for entry in header.entries}
    rope_factors = None
    if ROPE_FACTORS in entries:
        entry = entries.pop(ROPE_FACTORS)
        rope_factors = np.asarray(_open_tensor(entry, header, str(file), heads=0))

    # The entries of a `config.json` first: the keys and heads of tensors depend on them.
    config = _config(fields, family, entries)
    config |= gguf_rope.rope_entries(fields, family, config, rope_factors)
    tensors = {}
    for entry in entries.values():
        key, heads = _hf_key(entry.name, config)
        tensors[key] = _open_tensor(entry, header, str(file), heads=heads)

    tokenizer = gguf_tokenizer.tokenizer_files(fields, family) if with_tokenizer else {}
    return GgufModel(config, tensors, tokenizer)


def _check_single_file(header: GgufHeader, file: str) -> None:
    """Raises WeightsError if the file is one part of several."""
    count = header.fields.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        number = header.fields.get("split.no", 0) + 1
        raise WeightsError(
            f"{file} is part {number} of {count}: join the parts first "
            "(llama-gguf-split --merge FIRST_PART OUTPUT)"
        )


def _config(fields: ConfigFields, family: str, entries: Mapping[str, GgufEntry]) -> dict[str, Any]:
    """Returns `config.json` entries of the file's fields."""
    embedding = entries.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{fields.file}: token_embd.weight is missing, or not a matrix")

    heads = _head_count(fields, f"{family}.attention.head_count")
    width = fields.size(f"{family}.embedding_length")
    context = fields.size(f"{family}.context_length")
    # float32 in the file: 9.9999997e-06 stands for 1e-05.
    norm_eps = float(f"{fields.number(f'{family}.attention.layer_norm_rms_epsilon'):.6g}")

    # Attention to the last tokens only, where that is fewer than the context.
    window = fields.integer(f"{family}.attention.sliding_window", 0)
    if 0 < window < context:
        raise WeightsError(
            f"{fields.file}: {family}.attention.sliding_window {window} is not supported"
        )

    # The names that Hugging Face has for these fields.
    config = {
        "model_type": family,
        "architectures": ["Qwen2ForCausalLM" if family == "qwen2" else "LlamaForCausalLM"],
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "num_hidden_layers": fields.size(f"{family}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _head_count(fields, f"{family}.attention.head_count_kv", heads),
        "head_dim": fields.size(f"{family}.attention.key_length", max(width // heads, 1)),
        "intermediate_size": fields.size(f"{family}.feed_forward_length"),
        "rms_norm_eps": norm_eps,
        "max_position_embeddings": context,
        "tie_word_embeddings": "output.weight" not in entries,
    }

    # Special tokens, where the file names them.
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        field = f"tokenizer.ggml.{key}_token_id"
        if fields.has(field):
            config[f"{role}_token_id"] = fields.integer(field)
    return config


def _head_count(fields: ConfigFields, name: str, default: int | None = None) -> int:
    """Returns a number of heads; a list with one number per layer has to repeat it."""
    value = fields.value(name, default)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**16:
        raise UserError(f"{fields.file}: {name} {str(value)[:40]} is not one number of heads")
    return value


def _hf_key(name: str, config: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the Hugging Face key of a tensor, and the heads whose rows to reorder (or 0)."""
    # blk.3.attn_q.weight -> layer 3 of the pattern blk.{l}.attn_q.weight
    match = re.match(r"blk\.(\d+)\.", name)
    layer = match[1] if match else ""
    pattern = re.sub(r"^blk\.\d+\.", "blk.{l}.", name)
    key = KEYS.get(pattern, name).replace("{l}", layer)

    # Llama's q and k are stored with the pairs of the rope as neighbors, Qwen2's are not.
    heads = 0
    if config["model_type"] == "llama" and pattern.startswith("blk.{l}.attn_q."):
        heads = config["num_attention_heads"]
    if config["model_type"] == "llama" and pattern.startswith("blk.{l}.attn_k."):
        heads = config["num_key_value_heads"]
    return key, heads


def _open_tensor(entry: GgufEntry, header: GgufHeader, file: str, *, heads: int) -> LazyTensor:
    """Returns a tensor in float32, after checking that its type and bytes are there.

    Raises:
      WeightsError: the type cannot be dequantized, or the file is cut short.
    """
    try:
        import gguf
    except ImportError as error:
        raise WeightsError(f"{file}: install gguf to read it (pip install gguf)") from error

    # A quantized type stores values in blocks of fixed sizes.
    try:
        kind = gguf.GGMLQuantizationType(entry.type_id)
    except ValueError as error:
        raise WeightsError(f"{file}: {entry.name!a} has unknown type {entry.type_id}") from error
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:  # one block of zeros: is there a function for this type?
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError as error:
        raise WeightsError(
            f"{file}: {entry.name!a} has type {kind.name}, which gguf cannot dequantize"
        ) from error

    # Rows consist of whole blocks.
    count = math.prod(entry.shape)
    if not entry.shape or entry.shape[-1] % block_size or not count:
        raise WeightsError(f"{file}: {entry.name!a} has shape {list(entry.shape)} of {kind.name}")
    size = count // block_size * block_bytes
    offset = header.data_start + entry.offset
    if offset + size > header.file_size:
        raise WeightsError(f"{file} is cut short: {entry.name!a} ends past the end of the file")

    # u8[size] -> [rows, bytes per row] -> f32[shape]
    def load() -> np.ndarray:
        raw = np.fromfile(file, np.uint8, count=size, offset=offset)
        row_bytes = entry.shape[-1] // block_size * block_bytes
        array = gguf.quants.dequantize(raw.reshape(-1, row_bytes), kind)
        array = array.astype(np.float32, copy=False).reshape(entry.shape)
        return _reorder_rows(array, heads) if heads else array

    _check_heads(entry, heads, file)
    return LazyTensor(entry.shape, np.dtype(np.float32), load, file)


def _check_heads(entry: GgufEntry, heads: int, file: str) -> None:
    """Raises WeightsError if the rows cannot be reordered by heads."""
    if heads and entry.shape[0] % (2 * heads):
        raise WeightsError(f"{file}: {entry.name!a} has {entry.shape[0]} rows for {heads} heads")


def _reorder_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """Returns [N * H, D] (or [N * H]) with each head's pairs of neighbors as two halves."""
    # [N * H, ...] -> [N, H / 2, 2, ...] -> [N, 2, H / 2, ...] -> [N * H, ...]
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
