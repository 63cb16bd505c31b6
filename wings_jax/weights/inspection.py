"""What a file or directory of weights is, told in lines for people."""

from __future__ import annotations

import collections
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax.errors import UserError
from wings_jax.model import presets
from wings_jax.weights import hf, imports, release, rules, store


def describe(path: str | os.PathLike, vision: str | os.PathLike | None = None) -> list[str]:
    """Returns lines: what `path` is, its sizes and dtypes, which table reads it, what is missing.

    Raises:
      WeightsError: there are no weights at `path`, or they are broken.
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        made = imports.from_gguf(path)
        return [f"{path}: an LLM in a GGUF file", *_sizes(made.parts[0].tensors), *_fit(made)]
    tensors = store.open_tensors(path)
    lines = _sizes(tensors)
    config = store.read_config(path) if (path / "config.json").is_file() else {}
    family = config.get("model_type", "")
    if family in imports.RELEASE_FAMILIES:
        kind = f"a checkpoint in the release's layout ({family})"
        return [f"{path}: {kind}", *lines, *_try(imports.from_release, path, vision)]
    if family in ("qwen2", "llama"):
        return [f"{path}: an LLM ({family})", *lines, *_try(imports.from_llm, path, vision)]
    if "vision_config" in config or family.endswith("_vision_model"):
        return [f"{path}: a vision tower ({family})", *lines, *_tower(path)]
    if any(release.PROJECTOR.split(".")[1] in key for key in tensors):
        return [f"{path}: a projector", *lines, *_keys(tensors)]
    kind = f"model_type {family!r}" if family else "no config.json"
    return [f"{path}: weights that no table here reads ({kind})", *lines, *_keys(tensors)]


def _sizes(tensors: Mapping[str, Any]) -> list[str]:
    count = sum(math.prod(t.shape) for t in tensors.values())
    size = sum(t.nbytes for t in tensors.values())
    kinds = collections.Counter(t.dtype.name for t in tensors.values())
    files = {t.origin for t in tensors.values()}
    dtypes = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    return [
        f"  {len(tensors)} tensors ({dtypes}), {count:,} parameters, "
        f"{size / 1e9:.3f} GB in {len(files)} file(s)"
    ]


def _try(reader: Any, *sources: Any) -> list[str]:
    try:
        return _fit(reader(*sources))
    except UserError as error:
        return [f"  cannot be imported: {error}"]


def _fit(made: imports.ImportSpec) -> list[str]:
    try:
        steps, fresh = imports.plan_parts(made)
    except rules.WeightsError as error:
        return [*_indented(arch_lines(made.arch)), f"  does not fit: {error}"]
    return _indented(fit_lines(made, steps, fresh))


def fit_lines(
    made: imports.ImportSpec, steps: Sequence[imports.ImportStep], fresh: Sequence[str]
) -> list[str]:
    """Returns the architecture, what each part fills, and what stays fresh."""
    has_tower = any(path.startswith("vision/") for step in steps for path in step.ours)
    lines = arch_lines(made.arch, has_tower=has_tower)
    for step in steps:
        read = len(step.part.tensors) - len(step.plan.ignored)
        name = step.part.name
        lines.append(f"{name}: {read} tensors of {step.part.source} fill {len(step.ours)} arrays")
        if step.plan.ignored:
            lines.append(f"  left unread: {rules.format_keys(step.plan.ignored)}")
    if fresh:
        groups = {rules.group_keys(path) for path in fresh}
        lines.append(f"not in it, fresh in training: {rules.format_keys(groups)}")
    return lines


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _tower(path: pathlib.Path) -> list[str]:
    try:
        arch, part = imports.vision_part(path)
        table = hf.vision_shapes(arch, "float32")
        ours = {f"vision/{name}": struct for name, struct in table.items()}
        plan = rules.plan_import(
            part.rules, part.tensors, ours, ignorable=part.ignorable, source=str(path)
        )
    except UserError as error:
        return [f"  cannot be imported: {error}"]
    lines = [f"  {tower_line(arch)}", f"  all {len(plan.made)} of our arrays are in it"]
    if plan.ignored:
        lines.append(f"    left unread: {rules.format_keys(plan.ignored)}")
    return lines


def _keys(tensors: Mapping[str, Any]) -> list[str]:
    shown = [f"  {key} {list(t.shape)} {t.dtype.name}" for key, t in list(tensors.items())[:8]]
    rest = len(tensors) - len(shown)
    return [*shown, f"  and {rest} more"] if rest > 0 else shown


def arch_lines(arch: presets.WingsArch, *, has_tower: bool = True) -> list[str]:
    """Returns the architecture in a few lines."""
    d = arch.decoder
    rope = f"theta {d.rope_theta:g}"
    rope += f", {d.rope_scaling.rope_type} x{d.rope_scaling.factor:g}" if d.rope_scaling else ""
    lines = [
        f"LLM: {d.num_layers} layers, width {d.hidden_size}, {d.num_heads}/{d.num_kv_heads} heads "
        f"of {d.head_dim}, ffn {d.ffn_size}, vocabulary {d.vocab_size}, {rope}, "
        f"{'tied' if d.tie_embeddings else 'untied'} head"
    ]
    if has_tower or arch.learners:
        lines.append(tower_line(arch.vision))
    if arch.learners:
        semantics = "the paper's" if arch.semantics == presets.PAPER else "the release's"
        router = "a router" if arch.router else "no router"
        lines.append(
            f"wings: {' and '.join(arch.learners)}, rank {arch.rank}, {router}, "
            f"gain {arch.gain:g}, {semantics} semantics"
        )
    return lines


def tower_line(arch: presets.VisionArch) -> str:
    """Returns a tower in one line."""
    family = "CLIP" if arch.class_token else "SigLIP"
    return (
        f"vision: {family}, {arch.num_layers} layers of which {arch.built_layers} are read, width "
        f"{arch.hidden_size}, {arch.image_size} pixels in {arch.num_patches} patches"
    )
