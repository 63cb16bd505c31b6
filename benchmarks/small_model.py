"""The Wings that the CPU benchmarks run: 13 M parameters with both learners of rank 64."""

from __future__ import annotations

import dataclasses
from typing import Any

from wings_jax.model import presets

DECODER = dataclasses.replace(
    presets.DECODERS["qwen1_5_1_8b"],
    vocab_size=8192,
    hidden_size=256,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=32,
    ffn_size=688,
    max_positions=4096,
)
# A tower whose images have 64 slots.
TOWER = dataclasses.replace(
    presets.VISION["siglip_base_224"],
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    ffn_size=128,
    image_size=128,
)


def qwen2_config(arch: presets.DecoderArch, **changes: Any) -> Any:
    """Returns transformers' Qwen2Config of the same sizes; `changes` are further settings of it."""
    import transformers

    return transformers.Qwen2Config(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        num_key_value_heads=arch.num_kv_heads,
        max_position_embeddings=arch.max_positions,
        tie_word_embeddings=arch.tie_embeddings,
        **changes,
    )
