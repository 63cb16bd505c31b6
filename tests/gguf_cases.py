"""Writes small GGUF files of random Llama and Qwen2 models, as llama.cpp's converter does."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import gguf
import numpy as np
import pytest
import tokenizers
import transformers

from wings_jax.weights import gguf_file

torch = pytest.importorskip("torch")

SIZES = {
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns q or k rows in the order of llama.cpp's rope: the halves' elements alternate."""
    head = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return head.swapaxes(1, 2).reshape(weight.shape)


def random_state(family: str) -> dict[str, np.ndarray]:
    """Returns a random model's weights by Hugging Face key; Llama's head is tied."""
    name = "Llama" if family == "llama" else "Qwen2"
    config = getattr(transformers, f"{name}Config")(**SIZES, tie_word_embeddings=family == "llama")
    torch.manual_seed(0)
    state = getattr(transformers, f"{name}ForCausalLM")(config).state_dict()
    if family == "llama":
        del state["lm_head.weight"]
    return {key: value.numpy() for key, value in state.items()}


def gguf_name(key: str) -> str:
    """Returns the GGUF name of a Hugging Face key."""
    names = {hf_key: name for name, hf_key in gguf_file.KEYS.items()}
    layer = key.split(".")[2] if ".layers." in key else ""
    pattern = key.replace(f".{layer}.", ".{l}.") if layer else key
    return names[pattern].replace("{l}", layer)


def add_sizes(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e4)


def add_tokenizer(
    writer: gguf.GGUFWriter, model: str, pre_tokenizer: str | None, *, has_merges: bool = True
) -> None:
    """Adds all bytes, three control tokens, and two merges: ' a' and '12'."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Ġa", "12"]
    writer.add_tokenizer_model(model)
    if pre_tokenizer:
        writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(letters) + 2))
    if has_merges:
        writer.add_token_merges(["Ġ a", "1 2"])
    writer.add_eos_token_id(2)


def write_gguf(
    path: pathlib.Path,
    family: str,
    *,
    architecture: str = "",
    tokenizer: str = "gpt2",
    pre_tokenizer: str | None = "",
    has_merges: bool = True,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> dict[str, np.ndarray]:
    """Writes a random model; returns its weights by Hugging Face key.

    Args:
      pre_tokenizer: '' for the family's; None leaves the field out.
      edit: adds fields or tensors.
    """
    state = random_state(family)
    writer = gguf.GGUFWriter(path, architecture or family)
    add_sizes(writer)
    if pre_tokenizer == "":
        pre_tokenizer = "smollm" if family == "llama" else "qwen2"
    add_tokenizer(writer, tokenizer, pre_tokenizer, has_merges=has_merges)
    edit(writer)

    for key, array in state.items():
        heads = 0
        if family == "llama":
            heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2], 0)
        writer.add_tensor(gguf_name(key), interleaved(array, heads) if heads else array)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state
