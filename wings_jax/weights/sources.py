"""What a model is imported from: an LLM, a tower, a projector, or a checkpoint of the release."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from wings_jax.model import parameters, presets
from wings_jax.weights import gguf_file, hf, imports, release, rules, store
from wings_jax.weights.imports import ImportPart, ImportSpec
from wings_jax.weights.tensors import LazyTensor, WeightsError

# What a base LLM and its tower do not hold: training initializes it.
FRESH = (r"projector/.*", r"decoder/layers/(visual|textual|router)/.*")
FRESH_WITHOUT_TOWER = (r"vision/.*", *FRESH)
# The tower that an LLM alone is given, until a training config names another.
DEFAULT_TOWER = presets.VISION["siglip_so400m_384"]
# For tracing a tower by itself: the decoder does not change its shapes.
ANY_DECODER = presets.DECODERS["smollm2_135m"]


def load_model(
    llm: str | os.PathLike | None = None,
    vision: str | os.PathLike | None = None,
    *,
    arch: presets.WingsArch | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
) -> dict[str, np.ndarray | jax.Array]:
    """Returns the flat parameters of Hugging Face directories: an LLM, a tower, or both.

    Tensors are read one at a time. With a mesh each parameter is placed on its devices as soon
    as it is complete; without, it stays on the host.

    Args:
      arch: of the whole model; parts of it that no directory holds are not in the result. None
        for what the directories' config files describe (the LLM is needed then).
      dtype: of all parameters, or a function path -> dtype; None keeps each as it is stored.

    Raises:
      WeightsError, UserError: a source is missing, of another family, or does not fit `arch`.
    """
    if arch is None and llm is None:
        raise WeightsError("give the directory of an LLM, or an architecture")
    decoder = arch.decoder if arch else hf.read_decoder_arch(llm)
    tower = arch.vision if arch else DEFAULT_TOWER
    if vision is not None and arch is None:
        tower = hf.read_vision_arch(vision)

    # Each directory fills its own half of the model.
    parts = []
    if llm is not None:
        parts.append(llm_part(llm, decoder))
    if vision is not None:
        parts.append(vision_part(vision, tower))

    # Nothing has to be complete here: the caller checks what was loaded.
    whole = arch or presets.WingsArch(decoder, tower)
    spec = ImportSpec(whole, tuple(parts), fresh=(".*",), hf_config={})
    steps, _ = imports.plan_parts(spec, dtype=dtype, mesh=mesh)
    return imports.load_parts(steps)


def from_llm(
    llm: str | os.PathLike,
    vision: str | os.PathLike | None = None,
    *,
    projector: str | os.PathLike | None = None,
    projector_kind: str = "mlp2x_gelu",
) -> ImportSpec:
    """Returns the import of an LLM's directory, and if given a tower's and a `mm_projector.bin`.

    Raises:
      WeightsError, UserError: a source is missing, of another family, or broken.
    """
    config = store.read_config(llm)
    decoder = presets.decoder_from_hf(config)
    spec = _base_spec(decoder, llm_part(llm, decoder), vision, projector, projector_kind)
    return dataclasses.replace(spec, hf_config=config, tokenizer_directory=pathlib.Path(llm))


def from_gguf(
    file: str | os.PathLike,
    vision: str | os.PathLike | None = None,
    *,
    projector: str | os.PathLike | None = None,
    projector_kind: str = "mlp2x_gelu",
) -> ImportSpec:
    """Returns the import of an LLM in a GGUF file, dequantized; else as `from_llm`."""
    model = gguf_file.read_gguf(file)
    decoder = presets.decoder_from_hf(model.config)
    part = _decoder_part(decoder, model.tensors, str(file))
    spec = _base_spec(decoder, part, vision, projector, projector_kind)
    return dataclasses.replace(spec, hf_config=model.config, tokenizer_files=model.tokenizer_files)


def _base_spec(
    decoder: presets.DecoderArch,
    part: ImportPart,
    vision: str | os.PathLike | None,
    projector: str | os.PathLike | None,
    projector_kind: str,
) -> ImportSpec:
    """Returns the import of an LLM with the tower and the projector that are given."""
    parts = [part]
    tower = DEFAULT_TOWER
    if vision is not None:
        tower = hf.read_vision_arch(vision)
        parts.append(vision_part(vision, tower))

    arch = presets.WingsArch(decoder, tower, projector=projector_kind)
    if projector is not None:
        parts.append(_projector_part(arch, projector))

    fresh = FRESH_WITHOUT_TOWER if vision is None else FRESH
    return ImportSpec(arch, tuple(parts), fresh, hf_config={})


def llm_part(directory: str | os.PathLike, arch: presets.DecoderArch) -> ImportPart:
    """Returns the part of a directory with a Qwen2 or Llama."""
    tensors = hf.decoder_tensors(store.open_tensors(directory))
    return _decoder_part(arch, tensors, str(directory))


def _decoder_part(
    arch: presets.DecoderArch, tensors: Mapping[str, LazyTensor], source: str
) -> ImportPart:
    table = rules.with_prefix(hf.decoder_rules(arch), path="decoder/")
    return ImportPart("LLM", source, table, tensors, hf.decoder_ignorable(arch))


def vision_part(directory: str | os.PathLike, arch: presets.VisionArch) -> ImportPart:
    """Returns the part of a directory with a SigLIP or CLIP tower."""
    tensors = hf.vision_tensors(store.open_tensors(directory), str(directory))
    table = rules.with_prefix(hf.vision_rules(arch), path="vision/")
    return ImportPart("tower", str(directory), table, tensors, hf.vision_ignorable(arch))


def _projector_part(arch: presets.WingsArch, source: str | os.PathLike) -> ImportPart:
    """Returns the part of LLaVA's `mm_projector.bin`, whose keys may begin with `model.`."""
    tensors = {
        re.sub(r"^(.*\.)?mm_projector\.", "", hf_key): tensor
        for hf_key, tensor in store.open_tensors(source).items()
    }
    table = rules.with_prefix(release.projector_rules(arch.projector), path="projector/")

    # [D, E]: a projector of another tower is the usual mistake, so it gets its own message.
    first = tensors.get(table[0].hf_key) if table else None
    width = arch.vision.hidden_size
    if first is not None and len(first.shape) == 2 and first.shape[1] != width:
        raise WeightsError(
            f"the projector in {source} takes features of width {first.shape[1]}, "
            f"the vision tower has width {width}"
        )
    return ImportPart("projector", str(source), table, tensors)


def from_release(
    directory: str | os.PathLike, vision: str | os.PathLike | None = None
) -> ImportSpec:
    """Returns the import of a checkpoint of the authors' release: Wings or their LLaVA.

    Its keys, shapes and config decide the architecture: learners, router, rank, projector, tower.
    With learners the model gets the release's semantics.

    Args:
      vision: a tower's directory. It fills a checkpoint that has no tower, and describes the
        sizes of one that fits no preset.

    Raises:
      WeightsError, UserError: the checkpoint is of another kind, broken, or without a tower.
    """
    source = str(directory)
    config = store.read_config(directory)
    tensors = store.open_tensors(directory)

    # Wings and LLaVA checkpoints differ in their keys only.
    family = release.FAMILIES.get(config.get("model_type"))
    if family is None:
        known = ", ".join(release.FAMILIES)
        raise WeightsError(
            f"{source}/config.json: model_type {config.get('model_type')!r} is not one of {known}"
        )

    decoder = presets.decoder_from_hf({**config, "model_type": family})
    wings_fields = _wings_fields(tensors, config, source)

    # The tower: the checkpoint's own, or that of the other directory.
    has_tower = any(hf_key.startswith(release.TOWER) for hf_key in tensors)
    if not has_tower and vision is None:
        raise WeightsError(f"{source} holds no vision tower; give its directory as --vision")
    tower = hf.read_vision_arch(vision) if vision is not None else _known_tower(tensors, source)

    arch = dataclasses.replace(
        presets.WingsArch(decoder, tower),
        projector=_projector_kind(tensors, config),
        **wings_fields,
    )
    # One part for the checkpoint, a second one for the tower of another directory.
    table = release.release_rules(arch)
    if not has_tower:
        table = tuple(rule for rule in table if not rule.path.startswith("vision/"))

    parts = [ImportPart("Wings", source, table, tensors, release.release_ignorable(arch))]
    if not has_tower:
        parts.append(vision_part(vision, tower))
    return ImportSpec(
        arch,
        tuple(parts),
        fresh=(),
        hf_config=config,
        tokenizer_directory=pathlib.Path(directory),
    )


def _wings_fields(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Returns the fields of WingsArch that a checkpoint's keys and config decide."""
    has_router = any(".reweight_module." in hf_key for hf_key in tensors)
    has_visual = any(".attn_pool." in hf_key for hf_key in tensors)
    if not has_visual:
        return {}

    # All learners have the same rank, which `lora_dim` repeats.
    ranks = {
        tensors[hf_key].shape[0]
        for hf_key in tensors
        if hf_key.endswith("attn_pool.q_proj.0.weight")
    }
    if len(ranks) != 1:
        raise WeightsError(f"{source}: attn_pool.q_proj.0.weight has ranks {sorted(ranks)}")
    rank = ranks.pop()
    if config.get("lora_dim", rank) != rank:
        raise WeightsError(
            f"{source}: config.json has lora_dim {config['lora_dim']}, the tensors have {rank}"
        )

    # A router exists from stage 2 on, where both learners are trained.
    fields = {
        "learners": ("visual", "textual") if has_router else ("visual",),
        "router": has_router,
        "rank": rank,
        "gain": 2.0 if has_router else 1.0,
        "semantics": presets.release_semantics(config.get("system_prompt_length", 14)),
    }
    if has_router:
        fields["router_positions"] = max(
            tensor.shape[-1]
            for hf_key, tensor in tensors.items()
            if hf_key.endswith("reweight_module.linear.weight")
        )
    return fields


def _projector_kind(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> str:
    """Returns the projector's kind by its keys, or the config's where it has no keys."""
    hf_keys = {
        hf_key.removeprefix(release.PROJECTOR)
        for hf_key in tensors
        if hf_key.startswith(release.PROJECTOR)
    }
    # A single Linear has no index in its keys.
    if "weight" in hf_keys:
        return "linear"
    depth = sum(hf_key.endswith(".weight") for hf_key in hf_keys)
    return f"mlp{depth}x_gelu" if depth else config.get("mm_projector_type", "identity")


def _known_tower(tensors: Mapping[str, LazyTensor], source: str) -> presets.VisionArch:
    """Returns the preset whose shapes the checkpoint's tower has.

    The number of heads is not in the shapes, so only towers of known sizes are recognized.
    """
    tower = {
        hf_key.removeprefix(release.TOWER): tensor
        for hf_key, tensor in tensors.items()
        if hf_key.startswith(release.TOWER)
    }
    for arch in presets.VISION.values():
        is_deeper = f"encoder.layers.{arch.num_layers}.layer_norm1.weight" in tower
        if not is_deeper and _tower_fits(arch, tower):
            return arch
    raise WeightsError(
        f"{source} holds a vision tower of no known size; give a directory with its config.json "
        "as --vision"
    )


def _tower_fits(arch: presets.VisionArch, tower: Mapping[str, LazyTensor]) -> bool:
    """Returns whether the tensors have all keys of an architecture, with its shapes."""
    shapes = parameters.abstract_params(presets.WingsArch(ANY_DECODER, arch))
    for rule in hf.vision_rules(arch):
        shape = shapes[f"vision/{rule.path}"].shape
        for hf_key in rule.hf_keys(shape):
            if hf_key not in tower or tuple(tower[hf_key].shape) != rule.hf_shape(shape):
                return False
    return True
