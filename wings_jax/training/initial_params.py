"""The parameters of a run's first step: each is loaded, or newly initialized.

They are loaded from a checkpoint, or from Hugging Face directories (the LLM and the vision tower).
A table of where each group comes from is printed before the run.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from wings_jax import checkpoint, formatting, tree
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import parameters, presets
from wings_jax.model.presets import WingsArch
from wings_jax.training import optim
from wings_jax.weights import starting


def load_params(
    config: config_lib.Config,
    arch: WingsArch,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    labels: Mapping[str, str],
    source: pathlib.Path | None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns trained (f32) and frozen (`config.frozen_dtype`) parameters, as flat trees.

    They are at the shardings of `abstract`. A table of where they come from is printed.

    Args:
      labels: path -> group of the optimizer.
      source: a checkpoint's step directory; None for the directories of `config.model`.

    Raises:
      UserError: shapes or architectures differ, the LLM or the tower is missing in the source, or
        a newly initialized parameter is frozen.
    """
    # Trained parameters are f32, because small updates would be rounded away in bfloat16.
    frozen_dtype = jnp.dtype(config.frozen_dtype or parameters.default_dtype())
    is_trained = {path: optim.is_trained(labels, config.optimizer, path) for path in abstract}

    loaded: dict[str, Any]
    if source is None:
        origin = "config.model"
        loaded = starting.load_base(
            arch,
            config.model,
            mesh=next(iter(abstract.values())).sharding.mesh,
            dtype=lambda path: jnp.float32 if is_trained[path] else frozen_dtype,
        )
        starting.check_sources(abstract, loaded, origin)
    else:
        origin = str(source)
        dtypes = {path: jnp.float32 if is_trained[path] else frozen_dtype for path in abstract}
        loaded = _load_checkpoint(source, config, arch, abstract, dtypes)

    # What the source does not have is newly initialized, such as learners or a router.
    missing = [path for path in abstract if path not in loaded]
    _check_trainable(missing, labels, config.optimizer)
    initialized = parameters.initialize_params(arch, missing, abstract, config.seed)
    _print_table(abstract, labels, config.optimizer, missing, origin)

    # In the order of the model: the optimizer's state is saved in this order too.
    flat = {**loaded, **initialized}
    trained, frozen = tree.split({path: flat[path] for path in abstract}, is_trained.__getitem__)
    return (
        parameters.place_params(trained, abstract, jnp.float32),
        parameters.place_params(frozen, abstract, frozen_dtype),
    )


def _load_checkpoint(
    source: pathlib.Path,
    config: config_lib.Config,
    arch: WingsArch,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    dtypes: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """Returns the parameters of a checkpoint that the model has, read onto their devices."""
    saved = checkpoint.read_shapes(source)
    saved_arch = checkpoint.read_meta(source)[1]
    # An LLM alone has no tower to compare; that it is missing has its own message.
    has_tower = any(path.startswith("vision/") for path in saved)
    compared = arch if has_tower else dataclasses.replace(arch, vision=saved_arch.vision)

    check_compatible(compared, saved_arch, str(source))
    starting.check_sources(abstract, saved, str(source))
    check_learners(arch, saved_arch, str(source), accept=config.accept_changed_model)
    check_unused(saved, abstract, str(source))

    # The sharding of the model, and the dtype of its group, whatever was saved.
    targets = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtypes[path], sharding=leaf.sharding)
        for path, leaf in abstract.items()
        if path in saved
    }
    return checkpoint.read_params(source, targets, verify=config.verify_checkpoints)


def check_compatible(arch: WingsArch, saved_arch: WingsArch, source: str) -> None:
    """Checks that LLM and tower are those of the checkpoint, also where no shape shows it.

    Raises:
      UserError: naming the field and both values.
    """
    keys = {"decoder": "config.model.llm", "vision": "config.model.vision"}
    for part, name, saved, current in starting.arch_differences(saved_arch, arch):
        raise UserError(
            f"{keys[part]}: {part} {name} differs from the checkpoint's ({saved} -> {current}), "
            f"{source}; --{keys[part]}=checkpoint takes the checkpoint's own"
        )


def check_learners(
    arch: WingsArch, saved_arch: WingsArch, source: str, *, accept: bool = False
) -> None:
    """Checks that the learners compute the same from their parameters as in the checkpoint.

    Raises:
      UserError: gain or semantics differ and `accept` is not set; it has both values.
    """
    # Compared only where both models have the part that it applies to.
    compared: dict[str, tuple[Any, Any]] = {}
    if saved_arch.learners and arch.learners:
        compared["semantics"] = (_semantics_name(saved_arch), _semantics_name(arch))
    if saved_arch.router and arch.router:
        compared["gain"] = (saved_arch.gain, arch.gain)

    for name, (saved_value, value) in compared.items():
        if saved_value == value:
            continue

        change = f"{saved_value} -> {value}"
        message = f"config.model.{name} differs from the checkpoint's ({change}), {source}"
        if not accept:
            raise UserError(
                f"{message}: set it to the checkpoint's value, or accept the change with "
                "--config.accept_changed_model=true"
            )
        print(message, flush=True)


def check_unused(saved: Mapping[str, Any], abstract: Mapping[str, Any], source: str) -> None:
    """Prints which parameters of a checkpoint the model does not have.

    Raises:
      UserError: they are LoRA or a prefix: what the checkpoint learned would be lost.
    """
    unused = sorted(saved.keys() - abstract.keys())
    adapters = [path for path in unused if starting.is_adapter(path)]

    if adapters:
        raise UserError(
            f"{source}: {adapters[0]} is not in the config's model and would be lost: continue "
            "with the same LoRA or prefix, or merge LoRA with python -m wings_jax.convert"
        )
    if unused:
        names = formatting.format_names(unused)
        print(f"ignored parameters of the checkpoint {source}: {names}", flush=True)


def _semantics_name(arch: WingsArch) -> str:
    if arch.semantics == presets.PAPER:
        return "paper"
    return f"release, prompt_length {arch.semantics.prompt_length}"


def _check_trainable(
    missing: list[str], labels: Mapping[str, str], optimizer: config_lib.OptimizerConfig
) -> None:
    """Raises UserError for a newly initialized adapter that would never be trained."""
    for path in missing:
        if starting.is_adapter(path) and not optim.is_trained(labels, optimizer, path):
            raise UserError(
                f"config.optimizer.learning_rates.{labels[path]}: {path} is newly initialized but "
                "its group is frozen (learning rate 0): it would never be trained"
            )


def _print_table(
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    labels: Mapping[str, str],
    optimizer: config_lib.OptimizerConfig,
    missing: list[str],
    origin: str,
) -> None:
    """Prints per group: learning rate, where it starts from, and the number of parameters."""
    rates = {
        group: f"{rate:g}" if rate else "frozen" for group, rate in optimizer.learning_rates.items()
    }

    columns = {
        "group": labels,
        "learning rate": {path: rates[group] for path, group in labels.items()},
        "starts from": {path: "fresh" if path in missing else origin for path in abstract},
    }
    print(tree.describe(abstract, columns), flush=True)
