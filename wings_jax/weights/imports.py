"""From source files to parameters: plan an import by name, then stream it onto a mesh.

An `ImportSpec` is a list of parts, each with its tensors and its table (`sources` makes them).
Planning reads no tensor and names everything that does not fit; loading reads one at a time.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from wings_jax.formatting import format_names
from wings_jax.model import parameters, presets
from wings_jax.weights import transfer
from wings_jax.weights.rules import Rule, any_match
from wings_jax.weights.tensors import LazyTensor, WeightsError


@dataclasses.dataclass(frozen=True)
class ImportPart:
    """Tensors from one source, and the table that reads them.

    name        'LLM', 'tower', 'projector' or 'Wings', for messages
    source      file or directory, for messages
    rules       the table; its paths are those of the whole model
    tensors     Hugging Face key -> tensor, unread
    ignorable   keys (regular expressions) that may stay unused
    """

    name: str
    source: str
    rules: tuple[Rule, ...]
    tensors: Mapping[str, LazyTensor]
    ignorable: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ImportSpec:
    """A model, and where its parameters come from.

    arch                  of the whole model
    parts                 the sources
    fresh                 paths (regular expressions) that no part needs to fill
    hf_config             the LLM's `config.json`, for a later export
    tokenizer_directory   directory with the tokenizer's files, or None
    tokenizer_files       tokenizer files that no directory holds: name -> content
    notes                 what to print about choices that were made for the user
    merged                directories of adapters that are merged into a part
    """

    arch: presets.WingsArch
    parts: tuple[ImportPart, ...]
    fresh: tuple[str, ...]
    hf_config: Mapping[str, Any]
    tokenizer_directory: pathlib.Path | None = None
    tokenizer_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ImportStep:
    """What one part fills.

    part      the source
    plan      which keys fill which path
    targets   path -> shape, dtype and sharding of the arrays that the part fills
    """

    part: ImportPart
    plan: transfer.TransferPlan
    targets: dict[str, jax.ShapeDtypeStruct]


def plan_parts(
    spec: ImportSpec,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[list[ImportStep], list[str]]:
    """Returns each part's plan, and the paths that no part fills; no tensor is read.

    Args:
      dtype: of all parameters, or a function path -> dtype; None keeps each as it is stored.
      mesh: where given, arrays are placed on its devices by the model's sharding rules.

    Raises:
      WeightsError: naming whatever does not fit.
    """
    # `dtype` may be one dtype or a function of the path; np.float32 is callable, but a type.
    abstract = parameters.abstract_params(spec.arch, mesh=mesh)
    dtype_of = dtype if callable(dtype) and not isinstance(dtype, type) else lambda path: dtype

    steps = []
    filled_paths: set[str] = set()
    for part in spec.parts:
        # Only the paths of this part's table: the others come from other parts.
        table_paths = {rule.path for rule in part.rules}
        params = {path: struct for path, struct in abstract.items() if path in table_paths}
        plan = transfer.plan_import(
            part.rules, part.tensors, params, ignorable=part.ignorable, source=part.source
        )

        # All layers of a parameter get the dtype of its first one.
        targets = {}
        for path, (_, hf_keys) in plan.matches.items():
            stored_dtype = part.tensors[hf_keys[0]].dtype
            targets[path] = jax.ShapeDtypeStruct(
                params[path].shape,
                dtype_of(path) or stored_dtype,
                sharding=params[path].sharding,
            )

        steps.append(ImportStep(part, plan, targets))
        filled_paths |= set(targets)

    # Of the whole model, what no part fills has to be initialized later.
    unfilled_paths = [path for path in abstract if path not in filled_paths]
    unexpected = [path for path in unfilled_paths if not any_match(spec.fresh, path)]
    if unexpected:
        names = " and ".join(part.source for part in spec.parts)
        raise WeightsError(f"{names}: nothing for the parameters {format_names(unexpected, 6)}")
    return steps, unfilled_paths


def load_parts(
    steps: Sequence[ImportStep], on_read: Callable[[str, int], None] = transfer.no_progress
) -> dict[str, np.ndarray | jax.Array]:
    """Returns path -> array of all that the plans fill."""
    arrays: dict[str, np.ndarray | jax.Array] = {}
    for step in steps:
        part = step.part
        arrays |= transfer.import_tree(
            part.rules,
            part.tensors,
            step.targets,
            ignorable=part.ignorable,
            source=part.source,
            on_read=on_read,
        )
    return arrays


def bytes_to_read(steps: Sequence[ImportStep]) -> int:
    """Returns the bytes that loading these plans will read."""
    return sum(
        step.part.tensors[hf_key].nbytes
        for step in steps
        for _, hf_keys in step.plan.matches.values()
        for hf_key in hf_keys
    )
