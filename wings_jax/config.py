"""The typed tree that `configs/*.py` fill, and its validation.

`default()` gives it as a ConfigDict to edit; `typed()` turns an edited one into these frozen
dataclasses, and says by name which key is wrong. Nothing below the entry points sees a
ConfigDict, and `Config` itself stops at them.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from wings_jax.data.settings import DataConfig
from wings_jax.data.settings import SourceConfig as SourceConfig  # exported with the others
from wings_jax.errors import UserError
from wings_jax.model import attention, decoder, vision

DTYPES = ("float32", "bfloat16")
SEMANTICS = ("paper", "release")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model is built. The wings' fields are those of `presets.WingsArch`.

    llm, vision   a preset's name (`presets.DECODERS`, `presets.VISION`), a folder with a Hugging
                  Face `config.json`, or `tiny` for the base that ships with the package
    semantics     `paper`, or `release` to go on from the authors' checkpoint (docs/fidelity.md)
    prompt_length   of the release's semantics: slots of its system prompt and user header
    """

    llm: str = "tiny"
    vision: str = "tiny"
    projector: str = "mlp2x_gelu"
    learners: tuple[str, ...] = ()
    router: bool = False
    rank: int = 64
    learner_layers: tuple[int, ...] = ()
    gain: float = 1.0
    semantics: str = "paper"
    prompt_length: int = 14
    router_positions: int = 4096
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    prefix_length: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a learning rate per parameter group; 0 freezes the group.

    kind             'adamw', or 'muon': orthogonalised updates for matrices, AdamW for the rest;
                     it learns in fewer steps where there are only a few hundred
    groups           name -> regular expression over parameter paths (first match wins)
    learning_rates   name -> peak learning rate
    no_decay         regular expression of the paths without weight decay
    accumulation     micro-batches per step; they share one global mean over targets
    """

    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kind: str = "adamw"
    weight_decay: float = 0.0
    no_decay: str = ".*/(bias|scale|embedding|position|class_token)"
    warmup_ratio: float = 0.03
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    accumulation: int = 1
    skip_limit: int = 10
    skip_window: int = 100


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run.

    init_from   workdir or checkpoint to start from; '' for the LLM and tower of `model`
    steps       optimizer steps; -1 for `epochs` passes over the data
    laws_every  attention shift is measured every so many steps; 0 for never
    frozen_dtype  of parameters that do not train; '' is bfloat16, float32 on a CPU
    """

    stage: str = ""
    workdir: str = ""
    init_from: str = ""
    seed: int = 0
    steps: int = -1
    epochs: float = 1.0
    batch_size: int = 32
    compute_dtype: str = ""
    frozen_dtype: str = ""
    remat: str = "full"
    attention: str = "auto"
    loss_chunk: int = 512
    log_every: int = 10
    checkpoint_every: int = 1000
    keep: int = 2
    laws_every: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()


# What may differ between a run and its resumption: it changes no number of the run.
FREE = (
    "workdir",
    "log_every",
    "checkpoint_every",
    "keep",
    "laws_every",
    "data.threads",
    "data.workers",
    "data.cache",
    "data.scenes",
    "init_from",
)


# Class -> old field name -> new one, for what older versions wrote.
RENAMED: Mapping[str, Mapping[str, str]] = {"Semantics": {"lone_weight": "ungated_when_alone"}}


def default() -> config_dict.ConfigDict:
    """Returns the tree's defaults, open for editing; a key that is not there cannot be set."""
    return config_dict.ConfigDict(to_dict(Config()), sort_keys=False).lock()


def from_config_dict(tree: config_dict.ConfigDict) -> Config:
    """Returns the validated dataclasses of an edited tree.

    Raises:
      UserError: an unknown key, a value of the wrong type, or values that do not fit together.
    """
    config = from_dict(Config, tree.to_dict(), "config")
    _validate(config)
    return config


def differences(old: Config, new: Config) -> list[str]:
    """Returns 'key: old -> new' for every leaf that differs and is not free to."""
    left, right = flatten(to_dict(old)), flatten(to_dict(new))
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted({**left, **right})
        if left.get(key) != right.get(key)
        and key not in FREE
        and not any(key.startswith(f"{name}.") for name in ("mesh",))
    ]


def to_dict(value: Any) -> Any:
    """Returns nested dataclasses as nested dicts, which JSON can hold; `build` reads them."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {'a.b': value} of nested mappings."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found.update(flatten(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found


def from_dict(kind: Any, value: Any, key: str) -> Any:
    """Returns `value`, as JSON or a ConfigDict holds it, as the type `kind`.

    Dataclasses, mappings, tuples and optional values are built from the inside out.

    Raises:
      UserError: naming the key that is unknown, or whose value has another type.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_dict(kind, value, key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else from_dict(arguments[0], value, key)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise UserError(f"{key}: {value!r} is not a tuple")
        return tuple(from_dict(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is not None:  # Mapping[str, X]
        if not isinstance(value, Mapping):
            raise UserError(f"{key}: {value!r} is not a mapping")
        return {k: from_dict(arguments[1], item, f"{key}.{k}") for k, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{key}: {value!r} is not of type {kind.__name__}")
    return value


def _dataclass_from_dict(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"{key}: {value!r} is not a mapping")
    names = RENAMED.get(kind.__name__, {})
    value = {names.get(name, name): item for name, item in value.items()}
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise UserError(f"{key}.{unknown[0]}: no such key; there are {', '.join(sorted(hints))}")
    return kind(**{k: from_dict(hints[k], item, f"{key}.{k}") for k, item in value.items()})


def _validate(config: Config) -> None:
    _check_choices(config)
    _check_bounds(config)
    _check_fit(config)


def _check_choices(config: Config) -> None:
    model, optimizer = config.model, config.optimizer
    one_of = {
        "config.remat": (config.remat, tuple(decoder.REMAT)),
        "config.attention": (config.attention, attention.KERNELS),
        "config.compute_dtype": (config.compute_dtype, ("", *DTYPES)),
        "config.frozen_dtype": (config.frozen_dtype, ("", *DTYPES)),
        "config.optimizer.kind": (optimizer.kind, ("adamw", "muon")),
        "config.model.projector": (model.projector, vision.PROJECTORS),
        "config.model.semantics": (model.semantics, SEMANTICS),
    }
    for key, (value, allowed) in one_of.items():
        if value not in allowed:
            raise UserError(f"{key}: {value!r} is not one of {', '.join(map(repr, allowed))}")
    if model.learners not in ((), ("visual",), ("textual",), ("visual", "textual")):
        raise UserError(f"config.model.learners: {model.learners} is no subset of visual, textual")
    unknown = sorted(set(model.lora_targets) - set(ModelConfig.lora_targets))
    if unknown:
        raise UserError(f"config.model.lora_targets: there is no {unknown[0]!r}")


def _check_bounds(config: Config) -> None:
    model, optimizer = config.model, config.optimizer
    at_least = {
        "config.batch_size": (config.batch_size, 1),
        "config.steps": (config.steps, -1),
        "config.keep": (config.keep, 1),
        "config.log_every": (config.log_every, 1),
        "config.laws_every": (config.laws_every, 0),
        "config.checkpoint_every": (config.checkpoint_every, 1),
        "config.loss_chunk": (config.loss_chunk, 1),
        "config.optimizer.accumulation": (optimizer.accumulation, 1),
        "config.optimizer.skip_limit": (optimizer.skip_limit, 1),
        "config.optimizer.skip_window": (optimizer.skip_window, 1),
        "config.optimizer.weight_decay": (optimizer.weight_decay, 0),
        "config.model.rank": (model.rank, 1),
        "config.model.router_positions": (model.router_positions, 1),
        "config.model.lora_rank": (model.lora_rank, 0),
        "config.model.prefix_length": (model.prefix_length, 0),
        "config.data.sequence_length": (config.data.sequence_length, 2),
        "config.data.images_per_row": (config.data.images_per_row, 0),
    }
    for group, rate in optimizer.learning_rates.items():
        at_least[f"config.optimizer.learning_rates.{group}"] = (rate, 0)
    for key, (value, least) in at_least.items():
        if not value >= least:
            raise UserError(f"{key}: {value} is less than {least}")
    shares = {
        "config.optimizer.warmup_ratio": optimizer.warmup_ratio,
        "config.optimizer.b1": optimizer.b1,
        "config.optimizer.b2": optimizer.b2,
    }
    for key, value in shares.items():
        if not 0 <= value < 1:
            raise UserError(f"{key}: {value} is not at least 0 and less than 1")
    if config.steps < 0 and not config.epochs > 0:
        raise UserError(f"config.epochs: {config.epochs} is not more than 0")


def _check_fit(config: Config) -> None:
    """Raises UserError where one key does not fit another."""
    model, optimizer = config.model, config.optimizer
    if model.router and len(model.learners) < 2:
        raise UserError("config.model.router: there is nothing to route with fewer than 2 learners")
    if model.router and config.data.sequence_length > model.router_positions:
        raise UserError(
            f"config.data.sequence_length: {config.data.sequence_length} is more than "
            f"config.model.router_positions, {model.router_positions}"
        )
    if set(optimizer.groups) != set(optimizer.learning_rates):
        odd = sorted(set(optimizer.groups) ^ set(optimizer.learning_rates))
        raise UserError(f"config.optimizer: {odd[0]!r} is not in both groups and learning_rates")
    if config.batch_size % optimizer.accumulation:
        raise UserError(
            f"config.batch_size: {config.batch_size} is not a multiple of "
            f"config.optimizer.accumulation, {optimizer.accumulation}"
        )
