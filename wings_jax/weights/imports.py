"""What goes into a model of ours: an LLM, a tower, a projector, or a checkpoint of the release.

An `Import` is a list of parts, each with its tensors and its table. Planning it reads no tensor
and fails by name; loading it streams tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from wings_jax.model import parameters, presets
from wings_jax.weights import gguf_file, hf, release, rules, store

# What a base LLM and its tower leave for training to initialise.
FRESH = (r"projector/.*", r"decoder/layers/(visual|textual|router)/.*")
NO_TOWER = (r"vision/.*", *FRESH)
RELEASE_FAMILIES = {
    "wings_qwen2": "qwen2",
    "llava_qwen2": "qwen2",
    "wings_llama": "llama",
    "llava_llama": "llama",
}


@dataclasses.dataclass(frozen=True)
class ImportPart:
    """Tensors from one source, and the table that reads them.

    name        'LLM', 'tower', 'projector' or 'Wings'
    source      file or directory, for messages
    ignorable   keys (regular expressions) that may be left unread
    """

    name: str
    source: str
    rules: tuple[rules.Rule, ...]
    tensors: Mapping[str, rules.Tensor]
    ignorable: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ImportSpec:
    """A model to be, and where its parameters come from.

    fresh       paths (regular expressions) that no part needs to fill
    hf_config   the LLM's `config.json` as it was, for a later export
    tokenizer   directory with the tokenizer's files, or None
    files       tokenizer files made rather than copied: name -> content
    """

    arch: presets.WingsArch
    parts: tuple[ImportPart, ...]
    fresh: tuple[str, ...]
    hf_config: Mapping[str, Any]
    tokenizer: pathlib.Path | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ImportStep:
    """One part's plan, with the dtype and shape of each path it makes."""

    part: ImportPart
    plan: rules.TablePlan
    ours: dict[str, jax.ShapeDtypeStruct]


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
    tensors = hf.decoder_tensors(store.open_tensors(llm))
    part = _decoder_part(decoder, tensors, str(llm))
    return _base(part, decoder, config, vision, projector, projector_kind, tokenizer=llm)


def from_gguf(
    file: str | os.PathLike,
    vision: str | os.PathLike | None = None,
    *,
    projector: str | os.PathLike | None = None,
    projector_kind: str = "mlp2x_gelu",
) -> ImportSpec:
    """Returns the import of an LLM in a GGUF file, dequantised; else as `from_llm`."""
    opened = gguf_file.read_gguf(file)
    decoder = presets.decoder_from_hf(opened.config)
    part = _decoder_part(decoder, opened.tensors, str(file))
    made = _base(part, decoder, opened.config, vision, projector, projector_kind, tokenizer=None)
    return dataclasses.replace(made, files=opened.tokenizer_files)


def _decoder_part(arch: presets.DecoderArch, tensors: Mapping, source: str) -> ImportPart:
    table = rules.under(hf.decoder_rules(arch), ours="decoder/")
    return ImportPart("LLM", source, table, tensors, hf.decoder_ignorable(arch))


def _base(
    part: ImportPart,
    decoder: presets.DecoderArch,
    config: Mapping[str, Any],
    vision: str | os.PathLike | None,
    projector: str | os.PathLike | None,
    kind: str,
    *,
    tokenizer: str | os.PathLike | None,
) -> ImportSpec:
    parts = [part]
    tower = presets.VISION["siglip_so400m_384"]
    if vision is not None:
        tower, tower_part = vision_part(vision)
        parts.append(tower_part)
    arch = presets.WingsArch(decoder, tower, projector=kind)
    if projector is not None:
        parts.append(_projector_part(arch, projector))
    return ImportSpec(
        arch=arch,
        parts=tuple(parts),
        fresh=NO_TOWER if vision is None else FRESH,
        hf_config=config,
        tokenizer=None if tokenizer is None else pathlib.Path(tokenizer),
    )


def vision_arch(directory: str | os.PathLike) -> presets.VisionArch:
    """Returns the architecture of a directory with a SigLIP or CLIP, from its config files."""
    processor = None
    if (pathlib.Path(directory) / hf.PROCESSOR_FILE).is_file():
        processor = store.read_config(directory, hf.PROCESSOR_FILE)
    return presets.vision_from_hf(store.read_config(directory), processor)


def vision_part(directory: str | os.PathLike) -> tuple[presets.VisionArch, ImportPart]:
    """Returns the architecture of a directory with a SigLIP or CLIP tower, and its part."""
    arch = vision_arch(directory)
    tensors = hf.vision_tensors(store.open_tensors(directory), str(directory))
    table = rules.under(hf.vision_rules(arch), ours="vision/")
    return arch, ImportPart("tower", str(directory), table, tensors, hf.vision_ignorable(arch))


def _projector_part(arch: presets.WingsArch, source: str | os.PathLike) -> ImportPart:
    """Reads LLaVA's `mm_projector.bin`, whose keys may begin with `model.`."""
    tensors = {}
    for key, tensor in store.open_tensors(source).items():
        tensors[re.sub(r"^(.*\.)?mm_projector\.", "", key)] = tensor
    table = rules.under(release.projector_rules(arch.projector), ours="projector/")
    first = tensors.get(table[0].foreign) if table else None
    width = arch.vision.hidden_size
    if first is not None and len(first.shape) == 2 and first.shape[1] != width:
        raise rules.WeightsError(
            f"the projector in {source} reads features of width {first.shape[1]}, "
            f"the vision tower gives {width}"
        )
    return ImportPart("projector", str(source), table, tensors)


def from_release(
    directory: str | os.PathLike, vision: str | os.PathLike | None = None
) -> ImportSpec:
    """Returns the import of a checkpoint of the authors' release: Wings or their LLaVA.

    What it holds decides the architecture: learners, router, rank, projector, tower. With
    learners the model gets the release's semantics. `vision` is a tower's directory: it fills a
    checkpoint that has no tower, and names the sizes of one that fits no preset.
    """
    source = str(directory)
    config = store.read_config(directory)
    tensors = dict(store.open_tensors(directory))
    family = RELEASE_FAMILIES.get(config.get("model_type"))
    if family is None:
        known = ", ".join(RELEASE_FAMILIES)
        raise rules.WeightsError(
            f"{source}/config.json: model_type {config.get('model_type')!r} is none of {known}"
        )
    decoder = presets.decoder_from_hf({**config, "model_type": family})
    arch = dataclasses.replace(
        presets.WingsArch(decoder, presets.VISION["siglip_so400m_384"]),
        projector=_projector_kind(tensors, config),
        **_wings_entries(tensors, config, source),
    )
    has_tower = any(key.startswith(release.TOWER) for key in tensors)
    parts = []
    if has_tower:
        tower = _known_tower(tensors, source) if vision is None else vision_arch(vision)
    elif vision is not None:
        tower, tower_part = vision_part(vision)
        parts.append(tower_part)
    else:
        raise rules.WeightsError(f"{source} holds no vision tower; give its directory as --vision")
    arch = dataclasses.replace(arch, vision=tower)
    table = tuple(
        rule
        for rule in release.release_rules(arch)
        if has_tower or not rule.ours.startswith("vision/")
    )
    parts.insert(0, ImportPart("Wings", source, table, tensors, release.release_ignorable(arch)))
    return ImportSpec(arch, tuple(parts), (), config, pathlib.Path(directory))


def _wings_entries(tensors: Mapping, config: Mapping, source: str) -> dict[str, Any]:
    """Returns the fields of WingsArch that a checkpoint's keys and config decide."""
    has_router = any(".reweight_module." in key for key in tensors)
    has_visual = any(".attn_pool." in key for key in tensors)
    if not has_visual:
        return {}
    ranks = {tensors[key].shape[0] for key in tensors if key.endswith("attn_pool.q_proj.0.weight")}
    if len(ranks) != 1:
        raise rules.WeightsError(f"{source}: attn_pool.q_proj.0.weight has ranks {sorted(ranks)}")
    rank = ranks.pop()
    if config.get("lora_dim", rank) != rank:
        asked = config["lora_dim"]
        raise rules.WeightsError(f"{source}: config.json has lora_dim {asked}, the tensors {rank}")
    entries = {
        "learners": ("visual", "textual") if has_router else ("visual",),
        "router": has_router,
        "rank": rank,
        "gain": 2.0 if has_router else 1.0,
        "semantics": presets.release_semantics(config.get("system_prompt_length", 14)),
    }
    if has_router:
        widths = {t.shape[-1] for key, t in tensors.items() if key.endswith("module.linear.weight")}
        entries["router_positions"] = max(widths)
    return entries


def _projector_kind(tensors: Mapping, config: Mapping) -> str:
    """Returns the projector's kind as the keys tell it, the config's where there are none."""
    keys = {
        key.removeprefix(release.PROJECTOR) for key in tensors if key.startswith(release.PROJECTOR)
    }
    if "weight" in keys:
        return "linear"
    depth = sum(key.endswith(".weight") for key in keys)
    return f"mlp{depth}x_gelu" if depth else config.get("mm_projector_type", "identity")


def _known_tower(tensors: Mapping, source: str) -> presets.VisionArch:
    """Returns the preset whose shapes the checkpoint's tower has; heads are not in the shapes."""
    inside = {k.removeprefix(release.TOWER): t for k, t in tensors.items()}
    for arch in presets.VISION.values():
        table, shapes = hf.vision_rules(arch), hf.vision_shapes(arch, np.float32)
        wanted = {
            key: rule.foreign_shape(shapes[rule.ours].shape)
            for rule in table
            for key in rule.keys(shapes[rule.ours].shape)
        }
        fits = all(k in inside and tuple(inside[k].shape) == w for k, w in wanted.items())
        deeper = f"encoder.layers.{arch.num_layers}.layer_norm1.weight" in inside
        if fits and not deeper:
            return arch
    raise rules.WeightsError(
        f"{source} holds a vision tower of no known size; give a directory with its config.json "
        "as --vision"
    )


def plan_parts(
    made: ImportSpec, *, dtype: Any = None, mesh: Any = None
) -> tuple[list[ImportStep], list[str]]:
    """Returns each part's plan, and the paths that stay fresh; no tensor is read.

    Args:
      dtype: of all parameters; None keeps each as it is stored.
      mesh: where given, parameters lie on its devices by the model's sharding rules.

    Raises:
      WeightsError: naming whatever does not fit.
    """
    model = parameters.abstract_params(made.arch, mesh=mesh)
    steps, filled = [], set()
    for part in made.parts:
        table = {rule.ours for rule in part.rules}
        ours = {path: struct for path, struct in model.items() if path in table}
        found = rules.plan_import(
            part.rules, part.tensors, ours, ignorable=part.ignorable, source=part.source
        )
        final = {
            path: _with_dtype(ours[path], dtype or part.tensors[keys[0]].dtype)
            for path, (_, keys) in found.made.items()
        }
        steps.append(ImportStep(part, found, final))
        filled |= set(final)
    left = [path for path in model if path not in filled]
    unmade = [path for path in left if not rules.any_match(made.fresh, path)]
    if unmade:
        sources = " and ".join(part.source for part in made.parts)
        raise rules.WeightsError(f"nothing in {sources} makes our {rules.format_keys(unmade)}")
    return steps, left


def _with_dtype(struct: jax.ShapeDtypeStruct, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(struct.shape, dtype, sharding=struct.sharding)


def load_parts(
    steps: Sequence[ImportStep], on_read: Callable[[str, int], None] = lambda key, size: None
) -> dict[str, np.ndarray | jax.Array]:
    """Returns path -> array of all that the plan makes."""
    flat: dict[str, np.ndarray | jax.Array] = {}
    for step in steps:
        part = step.part
        flat |= rules.import_tree(
            part.rules,
            part.tensors,
            step.ours,
            ignorable=part.ignorable,
            source=part.source,
            on_read=on_read,
        )
    return flat


def nbytes(steps: Sequence[ImportStep]) -> int:
    """Returns the bytes that loading these plans will read."""
    return sum(
        step.part.tensors[key].nbytes
        for step in steps
        for _, keys in step.plan.made.values()
        for key in keys
    )
