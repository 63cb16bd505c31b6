"""What an adapter of a checkpoint holds, and whether the rest of it is still the base."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from wings_jax import checkpoint, tree
from wings_jax.model import presets
from wings_jax.weights import adapter, digests, rules, stored_params, transfer
from wings_jax.weights.digests import TensorDigest
from wings_jax.weights.tensors import LazyTensor, WeightsError

IMPORT_STAGE = "import"  # of the config that an import writes


def as_adapter(
    params: Mapping[str, Any], arch: presets.WingsArch, *, dtype: Any = None
) -> dict[str, LazyTensor]:
    """Returns the tensors of an adapter under the keys of the transformers format.

    Raises:
      WeightsError: the checkpoint has no tower or nothing beside its LLM and tower.
    """
    table = adapter.adapter_rules(arch)
    missing = sorted({rules.group_name(rule.path) for rule in table if rule.path not in params})

    if missing or not table:
        raise WeightsError(
            f"an adapter holds what training added to an LLM and a tower: {missing[0]} is missing"
            if missing
            else "nothing was added to the LLM and the tower: there is nothing to export"
        )

    parts = {path: array for path, array in params.items() if adapter.is_part(path)}
    return transfer.export_tree(table, parts, dtype=dtype)


def check_recorded(step: pathlib.Path) -> list[str]:
    """Checks by the recorded learning rates that no stage trained the LLM or the tower.

    The stages are followed by `init_from` as far as their checkpoints can be read. Returns notes
    for the user.

    Raises:
      WeightsError: a stage trained it, naming the first parameter; or the checkpoint is an import,
        of which nothing is recorded.
    """
    # From the last stage back to the first; `visited` ends a cycle of directories.
    visited: set[pathlib.Path] = set()
    while step not in visited:
        visited.add(step)
        config, _, _ = checkpoint.read_meta(step)
        if config.stage == IMPORT_STAGE:
            # An import before the stages trained nothing; alone, it may hold any training.
            if len(visited) > 1:
                return []
            raise WeightsError(
                f"{step} was imported: nothing records what its training changed; compare it with "
                "its base, --base DIR"
            )

        # Group of each parameter, and whether it has a learning rate.
        shapes, optimizer = checkpoint.read_shapes(step), config.optimizer
        groups = tree.match_table(shapes, optimizer.groups, name=f"{step}: optimizer.groups")
        for path, group in groups.items():
            if optimizer.learning_rates[group] > 0 and adapter.is_base(path):
                raise WeightsError(
                    f"an adapter cannot hold {path}: stage {config.stage!r} trained it (group "
                    f"{group!r}), in {step}"
                )

        # The stage before this one.
        if not config.init_from:
            return []
        before = checkpoint.newest_step(config.init_from)
        if before is None:
            return [
                f"{config.init_from}, where {step} started from, has no checkpoint: whether it "
                "trained the LLM is not known; --base DIR compares with the base"
            ]
        step = before
    return []


def check_unchanged(base: pathlib.Path, own: Mapping[str, TensorDigest]) -> None:
    """Checks that the LLM and the tower of a checkpoint are those of its base.

    Args:
      base: the base checkpoint's step directory.
      own: name -> digest of the checkpoint's tensors.

    Raises:
      WeightsError: naming the first tensor that differs.
    """
    # Read one parameter at a time, as the checkpoint's own.
    stored = stored_params.open_params(base)
    frozen = {path: array for path, array in stored.items() if adapter.is_base(path)}
    theirs = digests.digest_tensors(digests.split_tensors(frozen))
    for name, digest in own.items():
        if name not in theirs or not digest.is_same(theirs[name]):
            raise WeightsError(f"an adapter cannot hold {name}, which differs from that of {base}")
