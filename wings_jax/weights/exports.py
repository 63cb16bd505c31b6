"""From parameters to other formats: the release's Wings layout, or an LLM for transformers."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from wings_jax import files
from wings_jax.formatting import format_names
from wings_jax.model import presets
from wings_jax.weights import hf, release, release_settings, rules, store, transfer
from wings_jax.weights.safetensors_file import DTYPES
from wings_jax.weights.tensors import LazyTensor, WeightsError

ROUTER_POSITIONS = 4096  # fixed in the release's code
# Paths of a Wings model that an LLM cannot hold.
BEYOND_LLM = (r"vision/.*", r"projector/.*", r"decoder/layers/(visual|textual|router)/.*")
MODEL_TYPES = {  # (has learners, qkv bias) -> model_type
    (True, True): "wings_qwen2",
    (True, False): "wings_llama",
    (False, True): "llava_qwen2",
    (False, False): "llava_llama",
}


class MergedKernel:
    """A kernel with its LoRA pair added to it, computed when it is read, layer by layer.

    kernel + a b alpha / rank, with a [L, ..., R], b [L, R, ...]; the sum is computed in float32 and
    rounded once, to the kernel's dtype.
    """

    def __init__(self, kernel: Any, a: np.ndarray, b: np.ndarray, alpha: float):
        self._kernel, self._a, self._b = kernel, a, b
        self._scale = alpha / a.shape[-1]
        self.shape, self.dtype = tuple(kernel.shape), np.dtype(kernel.dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, layer: int) -> np.ndarray:
        kernel = np.asarray(self._kernel[layer])
        a, b = (half[layer].astype(np.float32) for half in (self._a, self._b))
        # [in, R] @ [R, out] -> [in, out]
        rank = a.shape[-1]
        update = a.reshape(-1, rank) @ b.reshape(rank, -1)
        total = kernel.astype(np.float32) + update.reshape(kernel.shape) * self._scale
        return total.astype(kernel.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack([self[layer] for layer in range(self.shape[0])]).astype(dtype or self.dtype)


def merge_lora(params: Mapping[str, Any], arch: presets.WingsArch) -> dict[str, Any]:
    """Returns the parameters with every LoRA pair added to its kernel, in the kernel's dtype."""
    merged = dict(params)
    # An `a` beside a kernel is of a LoRA pair; learners have no kernel there.
    for path in params:
        stem, _, name = path.rpartition("/")
        if name == "kernel" and f"{stem}/a" in params:
            a, b = (np.asarray(merged.pop(f"{stem}/{half}")) for half in ("a", "b"))
            merged[path] = MergedKernel(params[path], a, b, arch.lora_alpha)
    return merged


def common_dtype(params: Mapping[str, Any]) -> np.dtype | None:
    """Returns None (keep it) if all parameters have the same dtype, else bfloat16."""
    dtypes = {np.dtype(array.dtype) for array in params.values()}
    return None if len(dtypes) == 1 else DTYPES["BF16"]


def as_llm(
    params: Mapping[str, Any], arch: presets.WingsArch, *, dtype: Any = None
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Returns the LLM's tensors by Hugging Face key, and the paths that are left out.

    Raises:
      WeightsError: LoRA is not merged, or there is a part that an LLM cannot hold.
    """
    check_no_adapters(params, arch)
    table = rules.with_prefix(hf.decoder_rules(arch.decoder), path="decoder/")
    check_complete(table, params, "an LLM")

    tensors = transfer.export_tree(table, params, dtype=dtype, dropped=BEYOND_LLM)
    return tensors, [path for path in params if rules.any_match(BEYOND_LLM, path)]


def as_release(
    params: Mapping[str, Any], arch: presets.WingsArch, *, dtype: Any = None
) -> dict[str, LazyTensor]:
    """Returns the tensors under the keys of the authors' release.

    Raises:
      WeightsError: LoRA is not merged, or the release cannot hold a part or a size.
    """
    check_no_adapters(params, arch)

    # The release's code builds no other models than these.
    decoder = arch.decoder
    if decoder.qk_norm or decoder.no_rope_layers or decoder.learner_heads != decoder.num_heads:
        raise WeightsError(
            "the release has no models with norms of q and k, layers without rope, or heads that "
            "are not as wide as the model together; --format transformers can hold them"
        )
    if arch.learners not in ((), ("visual",), ("visual", "textual")):
        raise WeightsError(f"the release has no models with learners {arch.learners}")
    if arch.router != (len(arch.learners) == 2):
        raise WeightsError("the release has a router exactly where it has both learners")
    if arch.learner_layers is not None:
        raise WeightsError("the release cannot load learners on some layers only")
    if arch.router and arch.router_positions != ROUTER_POSITIONS:
        raise WeightsError(
            f"the release's router reads {ROUTER_POSITIONS} positions, "
            f"this model's {arch.router_positions}"
        )

    table = release.release_rules(arch)
    check_complete(table, params, "a checkpoint of the release")
    return transfer.export_tree(table, params, dtype=dtype)


def check_complete(table: tuple[rules.Rule, ...], params: Mapping[str, Any], what: str) -> None:
    """Raises WeightsError if a rule of the table has no parameter."""
    missing = {rules.group_name(rule.path) for rule in table if rule.path not in params}
    if missing:
        raise WeightsError(f"{what} needs {format_names(sorted(missing))}: not in this checkpoint")


def check_no_adapters(params: Mapping[str, Any], arch: presets.WingsArch) -> None:
    """Raises WeightsError if there is a prefix, or LoRA beside its kernel."""
    if arch.prefix_length:
        raise WeightsError(
            "other formats cannot hold decoder/layers/prefix: "
            f"{arch.prefix_length} trained keys and values with a gate in each layer"
        )

    # `a` beside a kernel is LoRA; learners have `a` and `b` alone.
    pairs = [
        path
        for path in params
        if path.endswith("/a") and f"{path.rpartition('/')[0]}/kernel" in params
    ]
    if pairs:
        raise WeightsError(
            f"LoRA is not merged ({format_names(pairs, 2)}); "
            "add --merge-lora to add it to the LLM's weights"
        )


def release_config(arch: presets.WingsArch, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `config.json` of a checkpoint in the release's layout.

    `hf_config` has entries of the model's source; those that the weights decide override them.
    """
    # What the release's training script writes.
    defaults = {
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

    # What the weights determine.
    decided = hf.llm_config(arch.decoder) | {
        "image_token_length": arch.vision.num_patches,
        "mm_hidden_size": arch.vision.hidden_size,
        "mm_projector_type": arch.projector,
        "mm_vision_select_layer": arch.vision.feature_layer,
        "model_type": MODEL_TYPES[bool(arch.learners), arch.decoder.qkv_bias],
    }

    if arch.learners:
        decided["lora_dim"] = arch.rank
    decided[release_settings.ENTRY] = release_settings.make_settings(arch)
    del decided["architectures"]
    return {**defaults, **hf_config, **decided}


def write_export(
    directory: str | os.PathLike,
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    text_files: Mapping[str, str],
    *,
    max_bytes: int = 5 * 10**9,
    on_write: transfer.Progress = transfer.no_progress,
) -> pathlib.Path:
    """Writes weights, `config.json` and text files; the directory appears when complete.

    Raises:
      UserError: the directory exists, cannot be written, or has too little space.
    """
    need_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with files.new_directory(directory, need_bytes=need_bytes) as temporary:
        store.write_shards(temporary, tensors, max_bytes=max_bytes, on_write=on_write)

        # Loaders of transformers cast to this dtype.
        dtypes = {tensor.dtype for tensor in tensors.values()}
        dtype = dtypes.pop().name if len(dtypes) == 1 else "float32"
        entries = {key: v for key, v in config.items() if key not in ("dtype", "torch_dtype")}
        store.write_config(temporary, {**entries, "torch_dtype": dtype})

        for name, content in text_files.items():
            files.write_text(temporary / name, content)
    return pathlib.Path(directory)
