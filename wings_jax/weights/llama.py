"""Llama decoders as Hugging Face saves them: Llama 2/3, Vicuna v1.5, SmolLM2."""

from __future__ import annotations

from wings_jax.weights import rules

RULES = rules.table("""
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

# Tables that older files carry although they follow from the configuration.
IGNORABLE = (r"(.*\.)?rotary_emb\.inv_freq",)
# A tied checkpoint may repeat its embedding as the head.
IGNORABLE_TIED = (*IGNORABLE, r"lm_head\.weight")
