"""LoRA as the `peft` package stores it: merged into an LLM that is read, or written alone.

A directory holds `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), with the two
matrices of every projection: the weight is W + B A scale, scale = lora_alpha / r.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from wings_jax.formatting import format_names
from wings_jax.model import presets
from wings_jax.weights import rules, store, text_files, transfer, transformers_format
from wings_jax.weights.tensors import LazyTensor, WeightsError

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<half>A|B)\.weight")
_EMBEDDING = re.compile(r"(?P<module>lm_head|(model\.)?embed_tokens)\.(base_layer\.)?weight")
# Entries of the config that change nothing here: which modules have LoRA is read from the weights,
# its rank from their shapes, and the rest is for training.
_READ = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
)
# Initial values under which the base's weights stay what they are.
_PLAIN_INITIALIZERS = (True, False, None, "gaussian", "orthogonal", "eva")
_EMPTY: tuple[Any, ...] = (None, False, "", "none", [], {})


@dataclasses.dataclass(frozen=True)
class PeftLora:
    """The LoRA of a PEFT directory, unread."""

    directory: pathlib.Path
    """The PEFT directory."""
    base: str
    """Directory or hub id of the LLM that it was trained on, '' if it is not recorded."""
    matrices: Mapping[str, tuple[LazyTensor, LazyTensor]]
    """Module of the LLM, as `model.layers.0.self_attn.q_proj` -> A [R, in] and B [out, R]."""
    embeddings: Mapping[str, LazyTensor]
    """`model.embed_tokens` and `lm_head` -> their own weights, where peft saved them too."""
    scales: Mapping[str, float]
    """Module -> factor on B A."""


def is_peft(directory: str | os.PathLike) -> bool:
    """Returns whether a directory holds a PEFT adapter and no model."""
    path = pathlib.Path(directory)
    return (path / store.ADAPTER_CONFIG).is_file() and not store.has_weights(path)


def open_peft(directory: str | os.PathLike) -> PeftLora:
    """Returns the LoRA of a PEFT directory.

    Raises:
      WeightsError: it is no LoRA, has a part or an option that cannot be merged, or is incomplete.
    """
    path = pathlib.Path(directory)
    config_file = path / store.ADAPTER_CONFIG
    if not config_file.is_file():
        raise WeightsError(f"{path} is not a PEFT directory: it has no {store.ADAPTER_CONFIG}")
    config = text_files.read_json(config_file)
    _check_config(config, config_file)

    found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    if not found:
        raise WeightsError(f"{path} has neither {' nor '.join(WEIGHT_FILES)}")
    tensors = {key.removeprefix(PREFIX): t for key, t in store.open_file(found[0]).items()}

    # Embeddings that peft saved whole are not matrices of LoRA.
    embeddings = {}
    for key in list(tensors):
        match = _EMBEDDING.fullmatch(key)
        if match:
            embeddings[match["module"]] = tensors.pop(key)

    # The rank, and with it the scale, may differ by module.
    matrices = _pair_matrices(tensors, found[0])
    scales = {module: _scale(module, config, pair[0]) for module, pair in matrices.items()}
    base = str(config.get("base_model_name_or_path") or "")
    return PeftLora(path, base, matrices, embeddings, scales)


def _check_config(config: Mapping[str, Any], file: pathlib.Path) -> None:
    """Raises WeightsError naming the first entry under which W + B A scale is not the weight."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise WeightsError(f"{file}: peft_type {kind!r} cannot be merged, only 'LORA'")

    # Some initializers move a part of the base's weights into A and B.
    initializer = config.get("init_lora_weights", True)
    if initializer not in _PLAIN_INITIALIZERS:
        raise WeightsError(
            f"{file}: init_lora_weights {initializer!r} changed the base's weights; save it as a "
            "plain LoRA with peft (path_initial_model_for_weight_conversion)"
        )

    # An unknown entry that is set may change what the adapter computes.
    for name, value in config.items():
        if name not in _READ and value not in _EMPTY:
            raise WeightsError(
                f"{file}: {name} {str(value)[:60]!r} is not supported; merge it with peft "
                "(merge_and_unload) and import the result"
            )

    for name in ("r", "lora_alpha"):
        if type(config.get(name)) not in (int, float):
            raise WeightsError(f"{file}: {name} {config.get(name)!r} is not a number")


def _pair_matrices(
    tensors: Mapping[str, LazyTensor], file: pathlib.Path
) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """Returns module -> (A, B) of the tensors of a PEFT file."""
    # A tensor under another key belongs to a method that is not plain LoRA.
    halves: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in tensors.items():
        match = _MATRIX.fullmatch(key)
        if match is None:
            raise WeightsError(f"{file}: {key} is not a matrix of LoRA: only those can be merged")
        halves.setdefault(match["module"], {})[match["half"]] = tensor

    # A [R, in] and B [out, R] have to agree on the rank R.
    pairs = {}
    for module, half in halves.items():
        if len(half) != 2:
            raise WeightsError(f"{file}: {module} has only one of lora_A and lora_B")
        a, b = half["A"], half["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            raise WeightsError(f"{file}: {module}: lora_A and lora_B of shapes {shapes}")
        pairs[module] = (a, b)

    if not pairs:
        raise WeightsError(f"{file} holds no tensors")
    return pairs


def _scale(module: str, config: Mapping[str, Any], a: LazyTensor) -> float:
    """Returns alpha / r of a module, or alpha / sqrt(r) with rank stabilization."""
    # As peft matches it: a name, the end of a path, or a regular expression.
    alpha = next(
        (
            value
            for pattern, value in (config.get("alpha_pattern") or {}).items()
            if re.fullmatch(rf"(.*\.)?({pattern})", module)
        ),
        config["lora_alpha"],
    )

    rank = a.shape[0]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def merge(tensors: Mapping[str, LazyTensor], lora: PeftLora) -> dict[str, LazyTensor]:
    """Returns an LLM's tensors with LoRA added; the sums are computed when they are read.

    Raises:
      WeightsError: the LLM lacks a module that has LoRA, or its sizes differ.
    """
    merged = dict(tensors)
    missing = []

    # An embedding of the adapter's own replaces the LLM's, and may have LoRA on it.
    for module, embedding in lora.embeddings.items():
        key = _find_key(module, tensors)
        if key is not None:  # a tied LLM has no head of its own
            _check_shape(lora, module, embedding.shape, tensors[key].shape)
            merged[key] = embedding

    # A projection becomes W + B A scale; its LazyTensor computes the sum on use.
    for module, (a, b) in lora.matrices.items():
        key = _find_key(module, tensors)
        if key is None:
            missing.append(module)
            continue
        weight = merged[key]
        _check_shape(lora, module, (b.shape[0], a.shape[1]), weight.shape)
        load = _MergedWeight(weight, a, b, lora.scales[module])
        merged[key] = LazyTensor(weight.shape, weight.dtype, load, weight.origin)

    if missing:
        names = format_names(sorted(missing))
        raise WeightsError(f"{lora.directory}: LoRA of modules that the LLM does not have: {names}")
    return merged


def _find_key(module: str, tensors: Mapping[str, LazyTensor]) -> str | None:
    """Returns the key of a module's weight; a bare model was saved without `model.`."""
    keys = (f"{module}.weight", f"model.{module}.weight")
    return next((key for key in keys if key in tensors), None)


def _check_shape(
    lora: PeftLora, module: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Raises WeightsError if a module of the adapter has another shape than the LLM's."""
    if shape != expected:
        raise WeightsError(
            f"{lora.directory}: {module} is for a weight {list(shape)}, the LLM's is "
            f"{list(expected)}: it belongs to {lora.base or 'another LLM'}"
        )


@dataclasses.dataclass(frozen=True)
class _MergedWeight:
    """Computes W + B A scale in float32, rounded once to W's dtype."""

    weight: LazyTensor
    """W [out, in]."""
    a: LazyTensor
    """A [R, in]."""
    b: LazyTensor
    """B [out, R]."""
    scale: float
    """Factor on B A."""

    def __call__(self) -> np.ndarray:
        # [out, R] @ [R, in] -> [out, in]
        update = np.asarray(self.b).astype(np.float32) @ np.asarray(self.a).astype(np.float32)
        total = np.asarray(self.weight).astype(np.float32) + update * np.float32(self.scale)
        return total.astype(self.weight.dtype)


def as_peft(
    params: Mapping[str, Any], arch: presets.WingsArch, *, dtype: Any = None
) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Returns the tensors of a PEFT directory with a model's LoRA, and its `adapter_config.json`.

    Raises:
      WeightsError: the model has no LoRA.
    """
    if not arch.lora_rank:
        raise WeightsError("there is no LoRA, which is all that a PEFT directory can hold")

    # Rows as those of the transformers format, under the keys of peft.
    rows = []
    modules = []
    for target in arch.lora_targets:
        module, path, a_dims, b_dims = transformers_format.LORA[target]
        key = f"{PREFIX}model.layers.{rules.LAYER}.{module}"
        for half, dims in (("A", a_dims), ("B", b_dims)):
            path_of_half = f"decoder/layers/{path}/{half.lower()}"
            rows.append(rules.Rule(f"{key}.lora_{half}.weight", path_of_half, dims))
        modules.append(module.rpartition(".")[2])

    # Everything else belongs to the base, which is not in a PEFT directory.
    paths = {rule.path for rule in rows}
    lora = {path: array for path, array in params.items() if path in paths}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": arch.lora_rank,
        "lora_alpha": arch.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return transfer.export_tree(rows, lora, dtype=dtype), config
