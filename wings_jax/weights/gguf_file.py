"""An LLM in a GGUF file: dequantized tensors under Hugging Face keys, config, tokenizer.

Reads through the `gguf` package. Llama files store the rows of q and k in the order of another
rope (neighbors paired instead of halves); they are reordered here, so the usual tables apply.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from wings_jax.weights import gguf_tokenizer
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


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """Content of a GGUF file.

    config            entries of a Hugging Face `config.json`
    tensors           Hugging Face key -> tensor (float32), unread
    tokenizer_files   name -> content
    """

    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    tokenizer_files: dict[str, str]


def read_gguf(file: str | os.PathLike) -> GgufModel:
    """Returns the content of a GGUF file of the Llama or Qwen2 family.

    Raises:
      WeightsError: not a GGUF file, another family, or the `gguf` package is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise WeightsError(f"{file}: install gguf to read it") from error

    try:
        reader = gguf.GGUFReader(file)
    except OSError as error:
        raise WeightsError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, IndexError) as error:
        raise WeightsError(f"{file} is not a GGUF file, or is cut short") from error

    fields = {key: field.contents() for key, field in reader.fields.items()}
    family = fields.get("general.architecture")
    if family not in FAMILIES:
        raise WeightsError(f"{file}: architecture {family!r} is not one of {', '.join(FAMILIES)}")

    config = _config(fields, family, {entry.name: entry for entry in reader.tensors})
    tensors = dict(_open_entry(gguf, entry, config, str(file)) for entry in reader.tensors)
    return GgufModel(config, tensors, gguf_tokenizer.tokenizer_files(fields, str(file)))


def _config(fields: Mapping[str, Any], family: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `config.json` entries of the file's fields."""
    heads = fields[f"{family}.attention.head_count"]
    width = fields[f"{family}.embedding_length"]
    # float32 in the file: 9.9999997e-06 stands for 1e-05.
    norm_eps = float(f"{fields[f'{family}.attention.layer_norm_rms_epsilon']:.6g}")

    config = {
        "model_type": family,
        "architectures": ["Qwen2ForCausalLM" if family == "qwen2" else "LlamaForCausalLM"],
        "vocab_size": int(entries["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "num_hidden_layers": fields[f"{family}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{family}.attention.head_count_kv", heads),
        "head_dim": fields.get(f"{family}.attention.key_length", width // heads),
        "intermediate_size": fields[f"{family}.feed_forward_length"],
        "rms_norm_eps": norm_eps,
        "rope_theta": float(fields.get(f"{family}.rope.freq_base", 1e4)),
        "max_position_embeddings": fields[f"{family}.context_length"],
        "tie_word_embeddings": "output.weight" not in entries,
    }

    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        field = f"tokenizer.ggml.{key}_token_id"
        if field in fields:
            config[f"{role}_token_id"] = fields[field]
    return config


def _open_entry(
    gguf: Any, entry: Any, config: Mapping[str, Any], file: str
) -> tuple[str, LazyTensor]:
    """Returns the Hugging Face key and the tensor of one entry of the file."""
    match = re.match(r"blk\.(\d+)\.", entry.name)
    layer = match[1] if match else ""
    pattern = re.sub(r"^blk\.\d+\.", "blk.{l}.", entry.name)
    key = KEYS.get(pattern, entry.name).replace("{l}", layer)

    # The heads whose rows have to be reordered; 0 for none.
    heads = 0
    if config["model_type"] == "llama" and pattern.startswith("blk.{l}.attn_q"):
        heads = config["num_attention_heads"]
    if config["model_type"] == "llama" and pattern.startswith("blk.{l}.attn_k"):
        heads = config["num_key_value_heads"]

    # The file lists the fastest dimension first.
    shape = tuple(int(size) for size in reversed(entry.shape))
    load = _tensor_loader(gguf, entry, shape, heads)
    return key, LazyTensor(shape, np.dtype(np.float32), load, file)


def _tensor_loader(
    gguf: Any, entry: Any, shape: tuple[int, ...], heads: int
) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        array = gguf.quants.dequantize(entry.data, entry.tensor_type)
        array = array.astype(np.float32, copy=False).reshape(shape)
        if not heads:
            return array

        # [N * H, D]: per head, pairs of neighbors -> first half, second half.
        pairs = array.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
        return pairs.swapaxes(1, 2).reshape(shape)

    return load
