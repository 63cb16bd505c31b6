"""The Wings that the CPU benchmarks run: 13 M parameters with both learners of rank 64."""

from __future__ import annotations

import dataclasses

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
