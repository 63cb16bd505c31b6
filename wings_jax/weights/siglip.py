"""SigLIP vision towers as Hugging Face saves them; keys without the prefix `vision_model.`."""

from __future__ import annotations

from wings_jax.weights import rules

# What SigLIP and CLIP share.
ENCODER = rules.table("""
embeddings.patch_embedding.weight               patch/kernel             E c y x <-> y x c E
embeddings.position_embedding.weight            position                 S E <-> S E
encoder.layers.{l}.layer_norm1.weight           layers/norm_attn/scale   E <-> E
encoder.layers.{l}.layer_norm1.bias             layers/norm_attn/bias    E <-> E
encoder.layers.{l}.self_attn.q_proj.weight      layers/attn/q/kernel     (N H) E <-> E N H
encoder.layers.{l}.self_attn.q_proj.bias        layers/attn/q/bias       (N H) <-> N H
encoder.layers.{l}.self_attn.k_proj.weight      layers/attn/k/kernel     (N H) E <-> E N H
encoder.layers.{l}.self_attn.k_proj.bias        layers/attn/k/bias       (N H) <-> N H
encoder.layers.{l}.self_attn.v_proj.weight      layers/attn/v/kernel     (N H) E <-> E N H
encoder.layers.{l}.self_attn.v_proj.bias        layers/attn/v/bias       (N H) <-> N H
encoder.layers.{l}.self_attn.out_proj.weight    layers/attn/o/kernel     E (N H) <-> N H E
encoder.layers.{l}.self_attn.out_proj.bias      layers/attn/o/bias       E <-> E
encoder.layers.{l}.layer_norm2.weight           layers/norm_mlp/scale    E <-> E
encoder.layers.{l}.layer_norm2.bias             layers/norm_mlp/bias     E <-> E
encoder.layers.{l}.mlp.fc1.weight               layers/mlp/up/kernel     F E <-> E F
encoder.layers.{l}.mlp.fc1.bias                 layers/mlp/up/bias       F <-> F
encoder.layers.{l}.mlp.fc2.weight               layers/mlp/down/kernel   E F <-> F E
encoder.layers.{l}.mlp.fc2.bias                 layers/mlp/down/bias     E <-> E
post_layernorm.weight                           post_norm/scale          E <-> E
post_layernorm.bias                             post_norm/bias           E <-> E
""")

RULES = ENCODER + rules.table("""
embeddings.patch_embedding.bias    patch/bias    E <-> E
""")

# The pooling head serves the contrastive loss only; features are read before it.
IGNORABLE = (r"head\..*", r"(.*\.)?position_ids")
