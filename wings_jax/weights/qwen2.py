"""Qwen2 decoders as Hugging Face saves them (Qwen1.5, Qwen2, Qwen2.5): Llama with qkv biases."""

from __future__ import annotations

from wings_jax.weights import llama, rules

RULES = llama.RULES + rules.table("""
model.layers.{l}.self_attn.q_proj.bias    layers/attn/q/bias    (N H) <-> N H
model.layers.{l}.self_attn.k_proj.bias    layers/attn/k/bias    (K H) <-> K H
model.layers.{l}.self_attn.v_proj.bias    layers/attn/v/bias    (K H) <-> K H
""")
