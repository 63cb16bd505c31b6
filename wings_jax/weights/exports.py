"""What comes out of a model of ours: the release's Wings layout, or a plain LLM."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from wings_jax.model import presets
from wings_jax.weights import hf, release, rules, store

ROUTER_POSITIONS = 4096  # fixed in the release's code
# Paths of a Wings model that an LLM has no place for.
BEYOND_LLM = (r"vision/.*", r"projector/.*", r"decoder/layers/(visual|textual|router)/.*")
MODEL_TYPES = {  # (has learners, qkv bias) -> model_type
    (True, True): "wings_qwen2",
    (True, False): "wings_llama",
    (False, True): "llava_qwen2",
    (False, False): "llava_llama",
}


def merge_lora(flat: Mapping[str, Any], arch: presets.WingsArch) -> dict[str, Any]:
    """Returns the parameters with every LoRA pair added into its kernel, in the kernel's dtype."""
    merged = dict(flat)
    for path in flat:
        stem, _, last = path.rpartition("/")
        if last != "kernel" or f"{stem}/a" not in flat:
            continue
        kernel = np.asarray(flat[path])
        a, b = (np.asarray(merged.pop(f"{stem}/{n}"), np.float32) for n in ("a", "b"))
        rank = a.shape[-1]
        update = a.reshape(len(a), -1, rank) @ b.reshape(len(b), rank, -1)
        wide = kernel.astype(np.float32) + update.reshape(kernel.shape) * (arch.lora_alpha / rank)
        merged[path] = wide.astype(kernel.dtype)
    return merged


def common_dtype(flat: Mapping[str, Any]) -> np.dtype | None:
    """Returns None if all parameters share a dtype, which then stays; else bfloat16."""
    kinds = {np.dtype(array.dtype) for array in flat.values()}
    return None if len(kinds) == 1 else store.DTYPES["BF16"]


def as_llm(
    flat: Mapping[str, Any], arch: presets.WingsArch, *, dtype: Any = None
) -> tuple[dict[str, rules.Tensor], list[str]]:
    """Returns the LLM's tensors under Hugging Face's keys, and our paths that are left behind.

    Raises:
      WeightsError: LoRA is not merged, or there is a part that no LLM can hold.
    """
    _check_added(flat, arch)
    table = rules.under(hf.decoder_rules(arch.decoder), ours="decoder/")
    _check_whole(table, flat, "an LLM")
    tensors = rules.export_tree(table, flat, dtype=dtype, dropped=BEYOND_LLM)
    return tensors, [path for path in flat if rules.any_match(BEYOND_LLM, path)]


def as_release(
    flat: Mapping[str, Any], arch: presets.WingsArch, *, dtype: Any = None
) -> dict[str, rules.Tensor]:
    """Returns the tensors under the keys of the authors' release.

    Raises:
      WeightsError: LoRA is not merged, or the release has no place for a part or a size.
    """
    _check_added(flat, arch)
    if arch.learners not in ((), ("visual",), ("visual", "textual")):
        raise rules.WeightsError(f"the release has no models with learners {arch.learners}")
    if arch.router != (len(arch.learners) == 2):
        raise rules.WeightsError("the release has a router exactly where it has both learners")
    if arch.learner_layers is not None:
        raise rules.WeightsError("the release cannot load learners on some layers only")
    if arch.router and arch.router_positions != ROUTER_POSITIONS:
        raise rules.WeightsError(
            f"the release's router reads {ROUTER_POSITIONS} positions, "
            f"this model's {arch.router_positions}"
        )
    table = release.release_rules(arch)
    _check_whole(table, flat, "a checkpoint of the release")
    return rules.export_tree(table, flat, dtype=dtype)


def _check_whole(table: tuple[rules.Rule, ...], flat: Mapping[str, Any], what: str) -> None:
    missing = {rules.group_keys(rule.ours) for rule in table if rule.ours not in flat}
    if missing:
        raise rules.WeightsError(f"{what} needs {rules.format_keys(missing)}, which is not there")


def _check_added(flat: Mapping[str, Any], arch: presets.WingsArch) -> None:
    if arch.prefix_length:
        raise rules.WeightsError(
            "there is no place for decoder/layers/prefix in any foreign format: "
            f"{arch.prefix_length} trained keys and values with a gate in each layer"
        )
    pairs = [
        path for path in flat if path.endswith("/a") and f"{path.rpartition('/')[0]}/kernel" in flat
    ]
    if pairs:
        raise rules.WeightsError(
            f"LoRA is not merged ({rules.format_keys(pairs, 2)}); "
            "add --merge-lora to put it into the LLM"
        )


def release_config(arch: presets.WingsArch, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `config.json` of a checkpoint in the release's layout.

    `kept` are entries of the model's source; what the weights decide overrides them.
    """
    usual = {
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": "flat",
        "mm_vision_select_feature": "patch",
        "model_max_length": 2048,
        "system_prompt_length": arch.semantics.prompt_length or 14,
        "tokenizer_max_length": 2048,
        "tokenizer_padding_side": "right",
        "use_cache": False,
        "use_mm_proj": True,
    }
    decided = {
        **hf.llm_config(arch.decoder),
        "image_token_length": arch.vision.num_patches,
        "mm_hidden_size": arch.vision.hidden_size,
        "mm_projector_type": arch.projector,
        "mm_vision_select_layer": arch.vision.feature_layer,
        "model_type": MODEL_TYPES[bool(arch.learners), arch.decoder.qkv_bias],
        **({"lora_dim": arch.rank} if arch.learners else {}),
    }
    decided.pop("architectures")
    return {**usual, **kept, **decided}


def write_export(
    directory: str | os.PathLike,
    tensors: Mapping[str, rules.Tensor],
    config: Mapping[str, Any],
    files: Mapping[str, str],
    *,
    max_bytes: int = 5 * 10**9,
    on_write: Callable[[str, int], None] = lambda key, size: None,
) -> pathlib.Path:
    """Writes weights, `config.json` and the tokenizer's files; the directory appears when whole.

    Raises:
      WeightsError: the directory exists, cannot be written, or has too little space.
    """
    need = sum(tensor.nbytes for tensor in tensors.values())
    with files.new_directory(directory, need_bytes=need) as passing:
        store.write_shards(passing, tensors, max_bytes=max_bytes, on_write=on_write)
        kinds = {tensor.dtype for tensor in tensors.values()}
        dtype = kinds.pop().name if len(kinds) == 1 else "float32"
        entries = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
        store.write_config(passing, {**entries, "torch_dtype": dtype})
        for name, content in files.items():
            (passing / name).write_text(content, encoding="utf-8")
    return pathlib.Path(directory)
