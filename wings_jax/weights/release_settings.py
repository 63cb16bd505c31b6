"""What `config.json` of a release checkpoint decides beyond its weights.

The release's own entries are LLaVA's: which hidden layer of the tower, how images are padded. A
value that is computed differently here is refused by name. An export of wings_jax adds the entry
`wings_jax` with what the release's code does not know, so that an import restores it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from wings_jax import serialization
from wings_jax.errors import UserError
from wings_jax.model import presets
from wings_jax.model.config_fields import ConfigFields

ENTRY = "wings_jax"
DEFAULT_PROMPT_LENGTH = 14


def make_settings(arch: presets.WingsArch) -> dict[str, Any]:
    """Returns the entry `wings_jax` of an exported `config.json`."""
    return {
        "semantics": serialization.to_dict(arch.semantics),
        "gain": arch.gain,
        "learner_layers": arch.learner_layers and list(arch.learner_layers),
        "router_positions": arch.router_positions,
        "vision": serialization.to_dict(arch.vision),
    }


def read_settings(config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Returns the fields of WingsArch that an export recorded; {} for the release's own files.

    Raises:
      UserError: naming an entry of the wrong type.
    """
    if ENTRY not in config:
        return {}

    # Typed as in a checkpoint's own config.
    recorded = ConfigFields(config[ENTRY], f"{file}: {ENTRY}")
    types = {
        "semantics": presets.Semantics,
        "gain": float,
        "learner_layers": tuple[int, ...] | None,
        "router_positions": int,
        "vision": presets.VisionArch,
    }
    return {
        name: serialization.from_dict(kind, recorded.value(name), f"{recorded.file}.{name}")
        for name, kind in types.items()
        if recorded.has(name)
    }


def named_semantics(name: str, config: Mapping[str, Any], file: str) -> presets.Semantics:
    """Returns the semantics 'paper', or 'release' with the config's length of the system prompt."""
    if name == "paper":
        return presets.PAPER

    length = ConfigFields(config, file).integer("system_prompt_length", DEFAULT_PROMPT_LENGTH)
    if length < 0:
        raise UserError(f"{file}: system_prompt_length {length} is negative")
    return presets.release_semantics(length)


def check_llava_entries(
    config: Mapping[str, Any], tower: presets.VisionArch, file: str
) -> presets.VisionArch:
    """Returns the tower with the hidden layer that the config selects.

    Raises:
      UserError: naming an entry whose value is not computed here.
    """
    # What is computed differently here.
    fields = ConfigFields(config, file)
    fields.refuse("mm_vision_select_feature", ["patch"])
    fields.refuse("image_aspect_ratio", ["pad"])
    fields.refuse("mm_use_im_start_end", [False])
    if "unpad" in fields.text("mm_patch_merge_type", "flat"):
        raise UserError(
            f"{file}: mm_patch_merge_type {config['mm_patch_merge_type']!r} is not supported"
        )

    # Only CLIP towers of the release and of LLaVA use the entry.
    layer = fields.integer("mm_vision_select_layer", -2)
    if tower.class_token:
        if not -(tower.num_layers + 1) <= layer <= tower.num_layers:
            raise UserError(f"{file}: mm_vision_select_layer {layer} of {tower.num_layers} layers")
        return dataclasses.replace(tower, feature_layer=layer)

    # The release's SigLIP ends before its last layer, whatever the config selects.
    if layer % (tower.num_layers + 1) != tower.built_layers:
        raise UserError(
            f"{file}: mm_vision_select_layer {layer} is not supported for SigLIP, only "
            f"{tower.built_layers - tower.num_layers - 1}"
        )
    return tower


def padding_notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns a line where the config leaves open how images become squares."""
    if config.get("image_aspect_ratio") or ENTRY in config:
        return ()
    return ("config.json has no image_aspect_ratio: images are padded to squares",)
