"""Describes a file or directory of weights in lines of text: what it is, and what imports it."""

from __future__ import annotations

import collections
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wings_jax.errors import UserError
from wings_jax.formatting import format_names
from wings_jax.model import families, parameters, presets
from wings_jax.weights import (
    adapter,
    hf,
    imports,
    llava,
    release,
    release_import,
    sources,
    store,
    transfer,
)
from wings_jax.weights.rules import group_name
from wings_jax.weights.tensors import LazyTensor, WeightsError


def describe(path: str | os.PathLike, vision: str | os.PathLike | None = None) -> list[str]:
    """Returns lines: what `path` is, its sizes and dtypes, which table reads it, what is missing.

    Raises:
      WeightsError: there are no weights at `path`, or they are broken.
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        spec = sources.from_gguf(path)
        sizes = _size_lines(spec.parts[0].tensors)
        return [f"{path}: an LLM in a GGUF file", *sizes, *_import_lines(lambda: spec)]

    if path.is_file() and adapter.is_adapter_file(path):
        return _adapter_lines(adapter.open_adapter(path, flag="inspect"))

    # A directory or a file of tensors: its config decides which table reads it.
    tensors = store.open_tensors(path)
    sizes = _size_lines(tensors)
    config = store.read_config(path) if (path / "config.json").is_file() else {}
    family = str(config.get("model_type") or "")

    # From the whole model to its parts.
    if family in release.FAMILIES:
        title = f"{path}: a checkpoint in the release's layout ({family})"
        return [title, *sizes, *_import_lines(lambda: release_import.from_release(path, vision))]
    if family in families.FAMILIES:
        title = f"{path}: an LLM ({family})"
        return [title, *sizes, *_import_lines(lambda: sources.from_llm(path, vision))]
    if family == "llava":
        return [f"{path}: a llava-hf model", *sizes, *_import_lines(lambda: llava.from_llava(path))]
    if "vision_config" in config or family.endswith("_vision_model"):
        return [f"{path}: a vision tower ({family})", *sizes, *_tower_lines(path)]
    if any(release.PROJECTOR.split(".")[1] in key for key in tensors):
        return [f"{path}: a projector", *sizes, *_key_lines(tensors)]

    kind = f"model_type {family!r}" if family else "no config.json"
    return [f"{path}: weights that no table here reads ({kind})", *sizes, *_key_lines(tensors)]


def _adapter_lines(opened: adapter.Adapter) -> list[str]:
    """Returns what an adapter holds, and which base it belongs to."""
    # The other tensors of the base are the tower's.
    llm = sum(not name.startswith("vision/") for name in opened.base)
    return [
        f"{opened.file}: an adapter, stage {opened.config.stage!r}, step {opened.step}",
        *_size_lines(opened.tensors),
        *_indent(arch_lines(opened.arch)),
        f"  belongs to an LLM of {llm} tensors and a tower of {len(opened.base) - llm}",
    ]


def _size_lines(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Returns the number of tensors, parameters, bytes and files."""
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    size = sum(tensor.nbytes for tensor in tensors.values())
    dtypes = collections.Counter(tensor.dtype.name for tensor in tensors.values())
    origins = {tensor.origin for tensor in tensors.values()}

    listed = ", ".join(f"{number} {dtype}" for dtype, number in dtypes.most_common())
    return [
        f"  {len(tensors)} tensors ({listed}), {count:,} parameters, "
        f"{size / 1e9:.3f} GB in {len(origins)} file(s)"
    ]


def _import_lines(open_spec: Callable[[], imports.ImportSpec]) -> list[str]:
    """Returns what an import would do, or why it cannot be done."""
    try:
        spec = open_spec()
    except UserError as error:
        return [f"  cannot be imported: {error}"]

    try:
        # A plan matches keys and shapes; no tensor is read.
        steps, unfilled_paths = imports.plan_parts(spec)
    except WeightsError as error:
        return [*_indent(arch_lines(spec.arch)), f"  does not fit: {error}"]
    return _indent(plan_lines(spec, steps, unfilled_paths))


def plan_lines(
    spec: imports.ImportSpec, steps: Sequence[imports.ImportStep], unfilled_paths: Sequence[str]
) -> list[str]:
    """Returns the architecture, what each part fills, and what is left to initialize."""
    has_tower = any(path.startswith("vision/") for step in steps for path in step.targets)
    lines = arch_lines(spec.arch, has_tower=has_tower)

    # One line per source, one for the keys that it has beyond the table.
    for step in steps:
        unused_keys = step.plan.unused_keys
        used = len(step.part.tensors) - len(unused_keys)
        lines.append(
            f"{step.part.name}: {used} tensors of {step.part.source} fill "
            f"{len(step.targets)} arrays"
        )
        if unused_keys:
            lines.append(f"  not used: {format_names(sorted(unused_keys), 6)}")

    # Notes of the source, and the groups that no source fills.
    lines += [f"note: {note}" for note in spec.notes]
    if unfilled_paths:
        groups = {group_name(path) for path in unfilled_paths}
        lines.append(
            f"training initializes what the source does not have: {format_names(sorted(groups), 6)}"
        )
    return lines


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _tower_lines(path: pathlib.Path) -> list[str]:
    """Returns what an import of the tower alone would do, or why it cannot be done."""
    try:
        arch = hf.read_vision_arch(path)
        part = sources.vision_part(path, arch)
        # Tables need a whole architecture: any LLM will do, only the tower's paths are planned.
        whole = presets.WingsArch(sources.ANY_DECODER, arch)
        params = {
            name: struct
            for name, struct in parameters.abstract_params(whole).items()
            if name.startswith("vision/")
        }
        plan = transfer.plan_import(
            part.rules, part.tensors, params, ignorable=part.ignorable, source=str(path)
        )
    except UserError as error:
        return [f"  cannot be imported: {error}"]

    lines = [f"  {tower_line(arch)}", f"  holds all {len(plan.matches)} arrays of the tower"]
    if plan.unused_keys:
        lines.append(f"    not used: {format_names(sorted(plan.unused_keys), 6)}")
    return lines


def _key_lines(tensors: Mapping[str, Any]) -> list[str]:
    """Returns the first keys with their shapes."""
    shown = [f"  {key} {list(t.shape)} {t.dtype.name}" for key, t in list(tensors.items())[:8]]
    rest = len(tensors) - len(shown)
    return [*shown, f"  and {rest} more"] if rest > 0 else shown


def arch_lines(arch: presets.WingsArch, *, has_tower: bool = True) -> list[str]:
    """Returns the architecture in a few lines."""
    # The LLM, with its rope.
    decoder = arch.decoder
    scaling = decoder.rope_scaling
    rope = f"theta {decoder.rope_theta:g}"
    if scaling is not None:
        rope += f", {scaling.rope_type} x{scaling.factor:g}"
    lines = [
        f"LLM: {decoder.num_layers} layers, width {decoder.hidden_size}, "
        f"{decoder.num_heads}/{decoder.num_kv_heads} heads of {decoder.head_dim}, "
        f"ffn {decoder.ffn_size}, vocabulary {decoder.vocab_size}, {rope}, "
        f"{'tied' if decoder.tie_embeddings else 'untied'} head"
    ]

    # The tower and the learners, where the model has them.
    if has_tower or arch.learners:
        lines.append(tower_line(arch.vision))
    if arch.learners:
        semantics = "paper" if arch.semantics == presets.PAPER else "release"
        router = "with a router" if arch.router else "without a router"
        lines.append(
            f"wings: {' and '.join(arch.learners)}, rank {arch.rank}, {router}, "
            f"gain {arch.gain:g}, semantics {semantics!r}"
        )
    return lines


def tower_line(arch: presets.VisionArch) -> str:
    """Returns a tower in one line."""
    family = "CLIP" if arch.class_token else "SigLIP"
    return (
        f"vision: {family}, {arch.built_layers} of {arch.num_layers} layers used, width "
        f"{arch.hidden_size}, {arch.image_size} pixels in {arch.num_patches} patches"
    )
