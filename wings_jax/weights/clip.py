"""CLIP vision towers as Hugging Face saves them; keys without the prefix `vision_model.`."""

from __future__ import annotations

from wings_jax.weights import rules, siglip

# `pre_layrnorm` is how the original spells it.
RULES = siglip.ENCODER + rules.table("""
embeddings.class_embedding    class_token       E <-> E
pre_layrnorm.weight           pre_norm/scale    E <-> E
pre_layrnorm.bias             pre_norm/bias     E <-> E
""")

IGNORABLE = (r"(.*\.)?position_ids",)
