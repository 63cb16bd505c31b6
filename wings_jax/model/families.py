"""What a Hugging Face `model_type` decides about an LLM beside the sizes in its `config.json`.

A new family of LLMs is one row here: its class, what its layers have, the defaults that its
`config.json` may leave out, and the entries that must have one value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from wings_jax.errors import UserError
from wings_jax.model.presets import DecoderArch


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    class_name   class of transformers, as `architectures` names it
    qkv_bias     whether q, k and v have biases
    qk_norm      whether the heads of q and k are normalized before rope
    skips_rope   whether some layers have no rope (`no_rope_layers`)
    required     entry of `config.json` -> its only value that is computed here, which a missing
                 entry has and an export writes; a `sliding_window` of None may also be one that
                 cuts nothing (`hf_checks`)
    defaults     entry -> its value where `config.json` has none, if it is not the one of
                 `hf_config.decoder_from_hf`
    nested       the same for a `text_config`, where older files leave out whatever is the default
                 of transformers
    """

    class_name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    skips_rope: bool = False
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    nested: Mapping[str, Any] = dataclasses.field(default_factory=dict)


NO_BIASES = {"attention_bias": False, "mlp_bias": False}
NO_WINDOW = {"use_sliding_window": False}
# What transformers assumes for SmolLM3.
SMOLLM3_DEFAULTS = {
    "num_key_value_heads": 4,
    "rope_theta": 2e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "no_rope_layer_interval": 4,
}


def _sizes(vocab: int, ffn: int, positions: int, **others: Any) -> dict[str, Any]:
    """Returns what transformers assumes where a nested config has no sizes."""
    return {
        "vocab_size": vocab,
        "hidden_size": 4096,
        "intermediate_size": ffn,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": positions,
        **others,
    }


# model_type -> what it decides. Of families with the same layers an export takes the first.
FAMILIES: Mapping[str, Family] = {
    # Qwen1.5, Qwen2, Qwen2.5
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        required=NO_WINDOW,
        nested=_sizes(151936, 22016, 32768, num_key_value_heads=32),
    ),
    # Llama 2, 3, 3.1, 3.2; Vicuna; TinyLlama; SmolLM2
    "llama": Family("LlamaForCausalLM", required=NO_BIASES, nested=_sizes(32000, 11008, 2048)),
    "mistral": Family(
        "MistralForCausalLM",
        required={"sliding_window": None},
        defaults={"num_key_value_heads": 8},
        nested=_sizes(32000, 14336, 131072, sliding_window=4096),
    ),
    # Qwen3, the dense models
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        required={"attention_bias": False, **NO_WINDOW},
        defaults={"head_dim": 128},
        nested=_sizes(151936, 22016, 32768, num_key_value_heads=32),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        skips_rope=True,
        required={**NO_BIASES, **NO_WINDOW},
        defaults=SMOLLM3_DEFAULTS,
    ),
}


def find_model_type(arch: DecoderArch, preferred: str = "") -> str:
    """Returns the `model_type` whose models have this architecture's layers.

    Args:
      preferred: taken if it is such a one: Mistral has the layers of Llama.

    Raises:
      UserError: no family of transformers has these layers.
    """
    # Several families may have the same layers; then `preferred` decides, or their order.
    matches = [name for name, family in FAMILIES.items() if has_layers_of(arch, family)]

    if preferred in matches:
        return preferred

    if not matches:
        raise UserError(
            "no LLM of transformers has these layers: "
            f"qkv_bias {arch.qkv_bias}, qk_norm {arch.qk_norm}, no_rope_layers "
            f"{arch.no_rope_layers}"
        )
    return matches[0]


def has_layers_of(arch: DecoderArch, family: Family) -> bool:
    """Returns whether a family's models can have the layers of this architecture."""
    has_options = (family.qkv_bias, family.qk_norm) == (arch.qkv_bias, arch.qk_norm)
    return has_options and family.skips_rope == bool(arch.no_rope_layers)
