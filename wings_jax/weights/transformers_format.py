"""Wings models as directories that `transformers` opens with the code that travels with them.

The tables reuse those of the LLM and the tower below the prefixes of `modeling_wings.py`; the
learners, the router, LoRA and the prefix have rows of their own. Everything that a checkpoint
holds has a key, so that an export is read back bit for bit.
"""

from __future__ import annotations

from typing import Any

from wings_jax.model import presets
from wings_jax.weights import hf, release, rules

LANGUAGE_MODEL = "model.language_model."
TOWER = "model.vision_tower."
PROJECTOR = "model.projector."
LAYER = f"{LANGUAGE_MODEL}layers.{rules.LAYER}."

LEARNER = rules.table("""
q.a.weight    q/a    R D <-> D R
q.b.weight    q/b    (N H) R <-> R N H
k.a.weight    k/a    R D <-> D R
k.b.weight    k/b    (N H) R <-> R N H
v.a.weight    v/a    R D <-> D R
v.b.weight    v/b    (N H) R <-> R N H
o.a.weight    o/a    R (N H) <-> N H R
o.b.weight    o/b    D R <-> R D
""")

ROUTER = rules.table("""
router.weight    router/kernel    M S <-> M S
router.bias      router/bias      M <-> M
""")

PREFIX = rules.table("""
self_attn.prefix.key      prefix/k       S K H <-> S K H
self_attn.prefix.value    prefix/v       S K H <-> S K H
self_attn.prefix.gate     prefix/gate    N <-> N
""")

# Projection -> its module in a layer, and the dimensions of LoRA's two matrices.
LORA = {
    "q": ("self_attn.q_proj", "attn/q", "R D <-> D R", "(N H) R <-> R N H"),
    "k": ("self_attn.k_proj", "attn/k", "R D <-> D R", "(K H) R <-> R K H"),
    "v": ("self_attn.v_proj", "attn/v", "R D <-> D R", "(K H) R <-> R K H"),
    "o": ("self_attn.o_proj", "attn/o", "R (N H) <-> N H R", "D R <-> R D"),
    "gate": ("mlp.gate_proj", "mlp/gate", "R D <-> D R", "F R <-> R F"),
    "up": ("mlp.up_proj", "mlp/up", "R D <-> D R", "F R <-> R F"),
    "down": ("mlp.down_proj", "mlp/down", "R F <-> F R", "D R <-> R D"),
}


def wings_rules(arch: presets.WingsArch) -> tuple[rules.Rule, ...]:
    """Returns the table of a whole model: every parameter path has exactly one row."""
    rows = []
    for rule in hf.decoder_rules(arch.decoder):
        key = rule.foreign.replace("model.", LANGUAGE_MODEL, 1)
        rows.append(rules.Rule(key, f"decoder/{rule.ours}", rule.dims))

    layers = "decoder/layers/"
    for name in arch.learners:
        key = f"{LAYER}learners.{name}."
        rows += rules.under(LEARNER, foreign=key, ours=f"{layers}{name}/")
    if arch.router:
        rows += rules.under(ROUTER, foreign=LAYER, ours=layers)
    if arch.prefix_length:
        rows += rules.under(PREFIX, foreign=LAYER, ours=layers)
    for target in arch.lora_targets if arch.lora_rank else ():
        module, path, a_dims, b_dims = LORA[target]
        rows.append(rules.Rule(f"{LAYER}{module}.lora_a.weight", f"{layers}{path}/a", a_dims))
        rows.append(rules.Rule(f"{LAYER}{module}.lora_b.weight", f"{layers}{path}/b", b_dims))

    for index in range(release.projector_depth(arch.projector)):
        key, path = f"{PROJECTOR}layers.{index}", f"projector/linear_{index}"
        dims = "O D <-> D O" if index else "D E <-> E D"
        rows.append(rules.Rule(f"{key}.weight", f"{path}/kernel", dims))
        rows.append(rules.Rule(f"{key}.bias", f"{path}/bias", "D <-> D"))
    return (*rows, *rules.under(hf.vision_rules(arch.vision), foreign=TOWER, ours="vision/"))


def wings_config(arch: presets.WingsArch, *, image_token_id: int) -> dict[str, Any]:
    """Returns the `config.json` of an exported model."""
    semantics = arch.semantics
    return {
        "architectures": ["WingsForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_wings.WingsConfig",
            "AutoModel": "modeling_wings.WingsForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_wings.WingsForConditionalGeneration",
            "AutoProcessor": "processing_wings.WingsProcessor",
        },
        "model_type": "wings",
        "text_config": hf.llm_config(arch.decoder),
        "vision_config": hf.vision_config(arch.vision),
        "tie_word_embeddings": arch.decoder.tie_embeddings,
        "image_token_id": image_token_id,
        "image_seq_length": arch.vision.num_patches,
        "projector": arch.projector,
        "learners": list(arch.learners),
        "learner_rank": arch.rank,
        "learner_layers": None if arch.learner_layers is None else list(arch.learner_layers),
        "router": arch.router,
        "router_positions": arch.router_positions,
        "gain": arch.gain,
        "learner_query": semantics.query,
        "learner_scaled_rope": semantics.scaled_rope,
        "ungated_when_alone": semantics.ungated_when_alone,
        "prompt_length": semantics.prompt_length,
        "lora_rank": arch.lora_rank,
        "lora_alpha": arch.lora_alpha,
        "lora_targets": list(arch.lora_targets) if arch.lora_rank else [],
        "prefix_length": arch.prefix_length,
    }
