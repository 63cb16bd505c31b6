"""LLMs and vision towers in directories as Hugging Face lays them out, both directions.

A directory holds `config.json`, weights, and for an LLM the tokenizer's files. What is loaded
here are the subtrees `decoder/` and `vision/` of a Wings model.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from wings_jax import files, tree
from wings_jax.model import presets
from wings_jax.weights import rules, store, tables

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
PROCESSOR_FILE = "preprocessor_config.json"


def decoder_rules(arch: presets.DecoderArch) -> tuple[rules.Rule, ...]:
    """Returns the table of a decoder; ours are paths below `decoder/`."""
    rows = tables.QWEN2 if arch.qkv_bias else tables.LLAMA
    return tuple(r for r in rows if not (arch.tie_embeddings and r.ours.startswith("head/")))


def decoder_shapes(arch: presets.DecoderArch, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns path -> shape of all parameters below `decoder/` that come from the LLM."""
    sizes = {
        "L": arch.num_layers,
        "V": arch.vocab_size,
        "D": arch.hidden_size,
        "N": arch.num_heads,
        "K": arch.num_kv_heads,
        "H": arch.head_dim,
        "F": arch.ffn_size,
    }
    return rules.shapes(decoder_rules(arch), sizes, dtype)


def decoder_ignorable(arch: presets.DecoderArch) -> tuple[str, ...]:
    """Returns the keys (regular expressions) that an LLM's files may hold beyond its table."""
    return tables.LLAMA_IGNORABLE_TIED if arch.tie_embeddings else tables.LLAMA_IGNORABLE


def vision_rules(arch: presets.VisionArch) -> tuple[rules.Rule, ...]:
    """Returns the table of a tower (keys without prefix); ours are paths below `vision/`."""
    return tables.CLIP if arch.class_token else tables.SIGLIP


def vision_shapes(arch: presets.VisionArch, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns path -> shape of all parameters below `vision/`."""
    sizes = {
        "L": arch.built_layers,
        "E": arch.hidden_size,
        "N": arch.num_heads,
        "H": arch.hidden_size // arch.num_heads,
        "F": arch.ffn_size,
        "S": arch.num_patches + arch.class_token,
        "y": arch.patch_size,
        "x": arch.patch_size,
        "c": 3,
    }
    return rules.shapes(vision_rules(arch), sizes, dtype)


def vision_ignorable(arch: presets.VisionArch) -> tuple[str, ...]:
    """Returns the keys that a tower's files may hold: its head, and the layers never read."""
    table = tables.CLIP_IGNORABLE if arch.class_token else tables.SIGLIP_IGNORABLE
    unread = range(arch.built_layers, arch.num_layers)
    return (*table, *(rf"encoder\.layers\.{layer}\..*" for layer in unread))


def vision_tensors(tensors: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the vision half of a checkpoint's tensors, their keys without any prefix.

    The prefix is what stands before the patch embedding: none (transformers 5), `vision_model.`
    (transformers 4, and the full SigLIP and CLIP models), or a multimodal model's own.
    """
    landmark = "embeddings.patch_embedding.weight"
    found = [key.removesuffix(landmark) for key in tensors if key.endswith(landmark)]
    if len(found) != 1:
        raise rules.WeightsError(f"{source} has {len(found)} vision towers ({landmark})")
    prefix = found[0]
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def decoder_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an LLM's tensors under the usual keys, also where a bare model was saved."""
    if "embed_tokens.weight" in tensors:
        return {f"model.{key}" if key != "lm_head.weight" else key: t for key, t in tensors.items()}
    return dict(tensors)


def load_llm(
    directory: str | os.PathLike,
    arch: presets.DecoderArch,
    dtype: Any = np.float32,
    *,
    on_read: Callable[[str, int], None] = lambda key, size: None,
) -> dict[str, Any]:
    """Returns the subtree of `decoder/` that an LLM fills: embed, layers, norm, head if untied.

    Raises:
      WeightsError: naming the files or keys that are missing, unknown or of another shape.
    """
    flat = rules.import_tree(
        decoder_rules(arch),
        decoder_tensors(store.open_tensors(directory)),
        decoder_shapes(arch, dtype),
        ignorable=decoder_ignorable(arch),
        source=str(directory),
        on_read=on_read,
    )
    return tree.nest(flat)


def load_vision(
    directory: str | os.PathLike,
    arch: presets.VisionArch,
    dtype: Any = np.float32,
    *,
    on_read: Callable[[str, int], None] = lambda key, size: None,
) -> dict[str, Any]:
    """Returns the subtree of `vision/` from a SigLIP or CLIP checkpoint, vision-only or full.

    Raises:
      WeightsError: as `load_llm`.
    """
    flat = rules.import_tree(
        vision_rules(arch),
        vision_tensors(store.open_tensors(directory), str(directory)),
        vision_shapes(arch, dtype),
        ignorable=vision_ignorable(arch),
        source=str(directory),
        on_read=on_read,
    )
    return tree.nest(flat)


def save_llm(
    params: Mapping[str, Any],
    arch: presets.DecoderArch,
    directory: str | os.PathLike,
    *,
    dtype: Any = None,
    config: Mapping[str, Any] | None = None,
    tokenizer: str | os.PathLike | None = None,
    max_bytes: int = 5 * 10**9,
) -> pathlib.Path:
    """Writes an LLM directory that `transformers` opens; returns it.

    Args:
      params: the subtree of `decoder/`; learners, router and the like are left out by the caller.
      config: entries of `config.json` to keep from the model's source.
      tokenizer: directory whose tokenizer files are copied along.
    """
    tensors = rules.export_tree(decoder_rules(arch), tree.flatten(params), dtype=dtype)
    need = sum(t.nbytes for t in tensors.values())
    with files.new_directory(directory, need_bytes=need) as passing:
        store.write_shards(passing, tensors, max_bytes=max_bytes)
        kinds = {str(t.dtype) for t in tensors.values()}
        saved_as = {"torch_dtype": kinds.pop() if len(kinds) == 1 else "float32"}
        store.write_config(passing, {**(config or {}), **llm_config(arch), **saved_as})
        if tokenizer is not None:
            copy_files(tokenizer, passing, TOKENIZER_FILES)
    return pathlib.Path(directory)


def save_vision(
    params: Mapping[str, Any],
    arch: presets.VisionArch,
    directory: str | os.PathLike,
    *,
    dtype: Any = None,
) -> pathlib.Path:
    """Writes a tower's directory that `transformers` opens (keys with `vision_model.`).

    Only the layers that are read exist, so the directory's `config.json` counts these, and its
    features are the *last* hidden state: `vision_from_hf(config, feature_layer=-1)`.
    """
    table = rules.under(vision_rules(arch), foreign="vision_model.")
    tensors = rules.export_tree(table, tree.flatten(params), dtype=dtype)
    need = sum(t.nbytes for t in tensors.values())
    with files.new_directory(directory, need_bytes=need) as passing:
        store.write_shards(passing, tensors)
        store.write_config(passing, vision_config(arch))
        processor = store.dump_json(processor_config(arch))
        (passing / PROCESSOR_FILE).write_text(processor)
    return pathlib.Path(directory)


def copy_files(
    source: str | os.PathLike, target: str | os.PathLike, files: Sequence[str]
) -> list[str]:
    """Copies those of the named files that exist; returns their names."""
    here = [name for name in files if (pathlib.Path(source) / name).is_file()]
    for name in here:
        shutil.copyfile(pathlib.Path(source) / name, pathlib.Path(target) / name)
    return here


def llm_config(arch: presets.DecoderArch) -> dict[str, Any]:
    """Returns the Hugging Face `config.json` of a decoder, which both transformers 4 and 5 read."""
    family = "qwen2" if arch.qkv_bias else "llama"
    config = {
        "architectures": ["Qwen2ForCausalLM" if arch.qkv_bias else "LlamaForCausalLM"],
        "model_type": family,
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
    if family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    else:
        config |= {"use_sliding_window": False}
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
    """Returns the Hugging Face `config.json` of a tower that ends with the layer that is read."""
    family = "clip" if arch.class_token else "siglip"
    return {
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
        **({} if arch.class_token else {"vision_use_head": False}),
    }


def processor_config(arch: presets.VisionArch) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` of a tower: bicubic resize, mean and std."""
    side = arch.image_size
    family = "CLIP" if arch.class_token else "Siglip"
    crop = {"do_center_crop": True, "crop_size": {"height": side, "width": side}}
    return {
        "image_processor_type": f"{family}ImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side} if arch.class_token else {"height": side, "width": side},
        **(crop if arch.class_token else {}),
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(arch.mean),
        "image_std": list(arch.std),
        "do_convert_rgb": True,
    }
