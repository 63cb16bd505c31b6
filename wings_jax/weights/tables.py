"""Weight tables of the Hugging Face layouts: LLMs, and vision towers (SigLIP, CLIP).

Each row is `Hugging Face key, path, dimensions of the tensor <-> dimensions of the parameter`
(`rules.table`). Keys of the towers are without the prefix `vision_model.`.
"""

from __future__ import annotations

from wings_jax.weights import rules

# What all families of LLMs have; Llama, Mistral and SmolLM have nothing else.
LLAMA = rules.table("""
model.embed_tokens.weight                           embed/embedding           V D <-> V D
model.layers.{l}.input_layernorm.weight             layers/norm_attn/scale    D <-> D
model.layers.{l}.self_attn.q_proj.weight            layers/attn/q/kernel      (N H) D <-> D N H
model.layers.{l}.self_attn.k_proj.weight            layers/attn/k/kernel      (K H) D <-> D K H
model.layers.{l}.self_attn.v_proj.weight            layers/attn/v/kernel      (K H) D <-> D K H
model.layers.{l}.self_attn.o_proj.weight            layers/attn/o/kernel      D (N H) <-> N H D
model.layers.{l}.post_attention_layernorm.weight    layers/norm_mlp/scale     D <-> D
model.layers.{l}.mlp.gate_proj.weight               layers/mlp/gate/kernel    F D <-> D F
model.layers.{l}.mlp.up_proj.weight                 layers/mlp/up/kernel      F D <-> D F
model.layers.{l}.mlp.down_proj.weight               layers/mlp/down/kernel    D F <-> F D
model.norm.weight                                   norm/scale                D <-> D
lm_head.weight                                      head/kernel               V D <-> D V
""")

# Rotary tables, which older files hold although the configuration determines them.
LLAMA_IGNORABLE = (r"(.*\.)?rotary_emb\.inv_freq",)
# A tied checkpoint may repeat its embedding as the head.
LLAMA_IGNORABLE_TIED = (*LLAMA_IGNORABLE, r"lm_head\.weight")

# Qwen1.5, Qwen2, Qwen2.5
QKV_BIAS = rules.table("""
model.layers.{l}.self_attn.q_proj.bias    layers/attn/q/bias    (N H) <-> N H
model.layers.{l}.self_attn.k_proj.bias    layers/attn/k/bias    (K H) <-> K H
model.layers.{l}.self_attn.v_proj.bias    layers/attn/v/bias    (K H) <-> K H
""")

# Qwen3
QK_NORM = rules.table("""
model.layers.{l}.self_attn.q_norm.weight    layers/attn/q_norm/scale    H <-> H
model.layers.{l}.self_attn.k_norm.weight    layers/attn/k_norm/scale    H <-> H
""")

# What SigLIP and CLIP have in common.
VISION_ENCODER = rules.table("""
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

SIGLIP = VISION_ENCODER + rules.table("""
embeddings.patch_embedding.bias    patch/bias    E <-> E
""")

# The pooling head is for the contrastive loss only; features are read before it.
SIGLIP_IGNORABLE = (r"head\..*", r"(.*\.)?position_ids")

# `pre_layrnorm` is the original's spelling.
CLIP = VISION_ENCODER + rules.table("""
embeddings.class_embedding    class_token       E <-> E
pre_layrnorm.weight           pre_norm/scale    E <-> E
pre_layrnorm.bias             pre_norm/bias     E <-> E
""")

CLIP_IGNORABLE = (r"(.*\.)?position_ids",)
