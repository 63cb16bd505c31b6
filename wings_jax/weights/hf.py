"""Hugging Face layouts of LLMs and vision towers: rule tables, key prefixes, config files.

The table of a decoder has paths below `decoder/`, that of a tower below `vision/`; both are
written here without that prefix.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from wings_jax.model import families, hf_checks, hf_config, presets
from wings_jax.weights import store, tables
from wings_jax.weights.rules import Rule
from wings_jax.weights.tensors import LazyTensor, WeightsError

PROCESSOR_FILE = "preprocessor_config.json"
NESTED_PROCESSOR_FILE = "processor_config.json"


def decoder_rules(arch: presets.DecoderArch) -> tuple[Rule, ...]:
    """Returns the table of a decoder."""
    rules = tables.LLAMA
    rules += tables.QKV_BIAS if arch.qkv_bias else ()
    rules += tables.QK_NORM if arch.qk_norm else ()
    if arch.tie_embeddings:
        return tuple(rule for rule in rules if not rule.path.startswith("head/"))
    return rules


def decoder_ignorable(arch: presets.DecoderArch) -> tuple[str, ...]:
    """Returns the keys (regular expressions) that an LLM's files may hold beyond its table."""
    return tables.LLAMA_IGNORABLE_TIED if arch.tie_embeddings else tables.LLAMA_IGNORABLE


def decoder_tensors(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Returns an LLM's tensors under the keys of a causal LM, also where a bare model was saved."""
    # A bare model has no prefix `model.`.
    if "embed_tokens.weight" not in tensors:
        return dict(tensors)
    return {
        hf_key if hf_key == "lm_head.weight" else f"model.{hf_key}": tensor
        for hf_key, tensor in tensors.items()
    }


def vision_rules(arch: presets.VisionArch) -> tuple[Rule, ...]:
    """Returns the table of a tower, its keys without `vision_model.`."""
    return tables.CLIP if arch.class_token else tables.SIGLIP


def vision_ignorable(arch: presets.VisionArch) -> tuple[str, ...]:
    """Returns the keys that a tower's files may hold: its head, and the layers not used."""
    table = tables.CLIP_IGNORABLE if arch.class_token else tables.SIGLIP_IGNORABLE
    unused_layers = range(arch.built_layers, arch.num_layers)
    return (*table, *(rf"encoder\.layers\.{layer}\..*" for layer in unused_layers))


def vision_tensors(tensors: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the vision half of a checkpoint's tensors, their keys without any prefix.

    The prefix is what precedes the patch embedding: nothing (transformers 5), `vision_model.`
    (transformers 4, and the full SigLIP and CLIP models), or a multimodal model's own.

    Raises:
      WeightsError: there is no tower in `source`, or more than one.
    """
    landmark = "embeddings.patch_embedding.weight"
    prefixes = [hf_key.removesuffix(landmark) for hf_key in tensors if hf_key.endswith(landmark)]
    if len(prefixes) != 1:
        raise WeightsError(f"{source} has {len(prefixes)} vision towers ({landmark})")

    # Whatever precedes the landmark precedes all keys of the tower.
    prefix = prefixes[0]
    return {
        hf_key.removeprefix(prefix): tensor
        for hf_key, tensor in tensors.items()
        if hf_key.startswith(prefix)
    }


def read_decoder_arch(directory: str | os.PathLike) -> presets.DecoderArch:
    """Returns the architecture of a directory with an LLM.

    It is that of `config.json`, except for a tied head that the weights contradict (`untie`).
    """
    file = str(pathlib.Path(directory) / "config.json")
    arch = hf_config.decoder_from_hf(store.read_config(directory), file=file)
    # Only a tied config can be contradicted by the weights.
    if not arch.tie_embeddings or not store.has_weights(directory):
        return arch
    return untie(arch, decoder_tensors(store.open_tensors(directory)))


def untie(arch: presets.DecoderArch, tensors: Mapping[str, LazyTensor]) -> presets.DecoderArch:
    """Returns the architecture with its own head where the checkpoint has a different one.

    A config may say `tie_word_embeddings` beside an `lm_head.weight` of other values; then the
    head is used, as in transformers 5. Equal values are tied.
    """
    # Both are read only where a tied checkpoint holds a head at all.
    head = tensors.get("lm_head.weight")
    embedding = tensors.get("model.embed_tokens.weight")
    if not arch.tie_embeddings or head is None or embedding is None:
        return arch

    is_equal = head.shape == embedding.shape and np.array_equal(
        np.asarray(head), np.asarray(embedding)
    )
    return arch if is_equal else dataclasses.replace(arch, tie_embeddings=False)


def read_vision_arch(directory: str | os.PathLike) -> presets.VisionArch:
    """Returns the architecture of a directory with a SigLIP or CLIP, from its config files."""
    file = str(pathlib.Path(directory) / "config.json")
    config = store.read_config(directory)
    return hf_config.vision_from_hf(config, read_processor(directory), file=file)


def read_processor(directory: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the entries of a directory's image processor; None if it has none.

    transformers 5 nests them in `processor_config.json`, which then precedes the older file.
    """
    # Not every `processor_config.json` is of the nested kind.
    directory = pathlib.Path(directory)
    if (directory / NESTED_PROCESSOR_FILE).is_file():
        nested = store.read_config(directory, NESTED_PROCESSOR_FILE).get("image_processor")
        if nested is not None:
            return nested

    if (directory / PROCESSOR_FILE).is_file():
        return store.read_config(directory, PROCESSOR_FILE)
    return None


def llm_config(arch: presets.DecoderArch, *, model_type: str = "") -> dict[str, Any]:
    """Returns the `config.json` of a decoder, which both transformers 4 and 5 read.

    `model_type` is that of the model's source; it is kept where it has the same layers.

    Raises:
      UserError: no family of transformers has these layers.
    """
    model_type = families.find_model_type(arch, model_type)
    family = families.FAMILIES[model_type]

    # Entries that all families have.
    config: dict[str, Any] = {
        **family.required,
        "architectures": [family.class_name],
        "model_type": model_type,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.ffn_size,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "max_position_embeddings": arch.max_positions,
        "tie_word_embeddings": arch.tie_embeddings,
        "hidden_act": "silu",
    }

    # What some families have and others do not.
    if family.skips_rope:
        layers = range(arch.num_layers)
        config["no_rope_layers"] = [int(layer not in arch.no_rope_layers) for layer in layers]

    # Both transformers 4 and 5 read `rope_scaling`.
    scaling = arch.rope_scaling
    if scaling is not None:
        config["rope_scaling"] = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling is not None and scaling.rope_type == "llama3":
        config["rope_scaling"] |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return config


def vision_config(arch: presets.VisionArch) -> dict[str, Any]:
    """Returns the `config.json` of a tower that ends with the layer whose features are used.

    Its features are the *last* hidden state: `vision_feature_layer` is -1.
    """
    family = "clip" if arch.class_token else "siglip"

    config = {
        "architectures": ["CLIPVisionModel" if arch.class_token else "SiglipVisionModel"],
        "model_type": f"{family}_vision_model",
        "hidden_size": arch.hidden_size,
        "num_hidden_layers": arch.built_layers,
        "num_attention_heads": arch.num_heads,
        "intermediate_size": arch.ffn_size,
        "image_size": arch.image_size,
        "patch_size": arch.patch_size,
        "hidden_act": arch.activation,
        "layer_norm_eps": arch.norm_eps,
        "num_channels": 3,
        "vision_feature_layer": -1,
    }

    if arch.dropped_tokens is not None:
        config["vision_feature_select_strategy"] = select_strategy(arch)
    return config if arch.class_token else {**config, "vision_use_head": False}


def select_strategy(arch: presets.VisionArch) -> str:
    """Returns llava-hf's `vision_feature_select_strategy` of a tower."""
    return "default" if arch.first_feature else "full"


def processor_config(arch: presets.VisionArch) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` of a tower: resize, mean and std."""
    # Both families convert to RGB, resize, scale to 0..1 and normalize.
    side = arch.image_size
    config = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": hf_checks.RESAMPLE[arch.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(arch.mean),
        "image_std": list(arch.std),
        "do_convert_rgb": True,
    }

    if arch.class_token:  # CLIP resizes the shorter side, then crops the center
        config |= {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
        }
    return config
