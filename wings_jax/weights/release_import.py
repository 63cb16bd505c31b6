"""The import of a checkpoint of the authors' release: Wings of both stages, or their LLaVA.

Its keys, shapes and config decide the architecture: learners, router, rank, projector, tower.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from wings_jax.model import hf_config, parameters, presets
from wings_jax.weights import hf, release, release_settings, sources, store
from wings_jax.weights.imports import ImportPart, ImportSpec
from wings_jax.weights.tensors import LazyTensor, WeightsError, check_not_quantized


def from_release(
    directory: str | os.PathLike,
    vision: str | os.PathLike | None = None,
    *,
    semantics: str = "",
) -> ImportSpec:
    """Returns the import of a checkpoint in the release's layout.

    With learners the model gets the release's semantics, except for an export of wings_jax, which
    records its own (`release_settings`).

    Args:
      vision: a tower's directory. It fills a checkpoint that has no tower, and describes the
        sizes of one that fits no preset.
      semantics: 'paper' or 'release' overrides what the checkpoint decides.

    Raises:
      WeightsError, UserError: the checkpoint is of another kind, broken, or without a tower.
    """
    source = str(directory)
    file = str(pathlib.Path(directory) / "config.json")
    config = store.read_config(directory)
    family = release.FAMILIES.get(str(config.get("model_type")))
    if family is None:
        known = ", ".join(release.FAMILIES)
        raise WeightsError(f"{file}: model_type {config.get('model_type')!r} is not one of {known}")

    # The LLM and what the learners' tensors decide.
    tensors = store.open_tensors(directory)
    check_not_quantized(tensors, source)
    decoder = hf_config.decoder_from_hf({**config, "model_type": family}, file=file)
    decoder = hf.untie(decoder, tensors)
    fields = _wings_fields(tensors, config, source)

    # What an export recorded precedes; a flag precedes that.
    recorded = release_settings.read_settings(config, file)
    fields |= {name: value for name, value in recorded.items() if name != "vision"}
    if semantics and fields.get("learners"):
        fields["semantics"] = release_settings.named_semantics(semantics, config, file)

    # The tower is in the checkpoint, or in a directory of its own.
    has_tower = any(hf_key.startswith(release.TOWER) for hf_key in tensors)
    if not has_tower and vision is None:
        raise WeightsError(f"{source} holds no vision tower; give its directory as --vision")
    tower = recorded.get("vision") if vision is None else hf.read_vision_arch(vision)
    tower = tower or _known_tower(tensors, source)
    if "vision" not in recorded:
        tower = release_settings.check_llava_entries(config, tower, file)

    projector = _projector_kind(tensors, config)
    sources.check_projector_kind(projector, f"{file}: mm_projector_type")
    arch = dataclasses.replace(presets.WingsArch(decoder, tower), projector=projector, **fields)
    parts = _parts(arch, tensors, source, vision=None if has_tower else vision)
    notes = (*sources.tie_notes(config, decoder), *release_settings.padding_notes(config))
    return ImportSpec(arch, parts, (), config, pathlib.Path(directory), notes=notes)


def _parts(
    arch: presets.WingsArch,
    tensors: Mapping[str, LazyTensor],
    source: str,
    *,
    vision: str | os.PathLike | None,
) -> tuple[ImportPart, ...]:
    """Returns one part for the checkpoint, and a second one for a tower from `vision`."""
    # The table of the whole model, without the tower where that comes from elsewhere.
    table = release.release_rules(arch)
    ignorable = release.release_ignorable(arch)
    if vision is None:
        return (ImportPart("Wings", source, table, tensors, ignorable),)

    without_tower = tuple(rule for rule in table if not rule.path.startswith("vision/"))
    checkpoint = ImportPart("Wings", source, without_tower, tensors, ignorable)
    return (checkpoint, sources.vision_part(vision, arch.vision))


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
        tensor.shape[:1]
        for hf_key, tensor in tensors.items()
        if hf_key.endswith("attn_pool.q_proj.0.weight")
    }
    if len(ranks) != 1 or ranks == {()}:
        shown = sorted(rank[0] for rank in ranks if rank)
        raise WeightsError(f"{source}: attn_pool.q_proj.0.weight has ranks {shown}")

    ((rank,),) = ranks
    if config.get("lora_dim", rank) != rank:
        raise WeightsError(
            f"{source}: config.json has lora_dim {config['lora_dim']!r}, the tensors have {rank}"
        )

    # A router exists from stage 2 on, where both learners are trained.
    fields = {
        "learners": ("visual", "textual") if has_router else ("visual",),
        "router": has_router,
        "rank": rank,
        "gain": 2.0 if has_router else 1.0,
        "semantics": release_settings.named_semantics("release", config, f"{source}/config.json"),
    }

    # A router has one weight per position of the longest conversation.
    widths = [
        tensor.shape[-1]
        for hf_key, tensor in tensors.items()
        if hf_key.endswith("reweight_module.linear.weight") and tensor.shape
    ]
    if widths:
        fields["router_positions"] = max(widths)
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

    # A deeper tower has all keys of a shallower one.
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
    shapes = parameters.abstract_params(presets.WingsArch(sources.ANY_DECODER, arch))
    for rule in hf.vision_rules(arch):
        shape = shapes[f"vision/{rule.path}"].shape
        for hf_key in rule.hf_keys(shape):
            if hf_key not in tower or tuple(tower[hf_key].shape) != rule.hf_shape(shape):
                return False
    return True
