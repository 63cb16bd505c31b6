"""Which values of a config are allowed, alone and together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wings_jax.errors import UserError
from wings_jax.model import attention, decoder, vision

if TYPE_CHECKING:
    from wings_jax.config import Config

DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
SEMANTICS = ("paper", "release")
LEARNERS = ((), ("visual",), ("textual",), ("visual", "textual"))
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def check_config(config: Config) -> None:
    """Raises UserError naming the key, its value and what is allowed."""
    _check_texts(config, "config")
    _check_choices(config)
    _check_bounds(config)
    _check_fit(config)


def _check_texts(value: Any, key: str) -> None:
    """Checks all texts below a dataclass or mapping."""
    if isinstance(value, str):
        check_text(key, value)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _check_texts(item, f"{key}.{name}")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _check_texts(getattr(value, field.name), f"{key}.{field.name}")


def check_text(key: str, text: str) -> None:
    """Raises UserError for a text that cannot be a path or be written as UTF-8."""
    if "\0" in text:
        raise UserError(f"{key}: {text!r} has a NUL character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{key}: {text!r} is not valid UTF-8")


def parse_profile(text: str) -> tuple[int, int]:
    """Returns the first step of `config.profile`, and the one after the last; (0, 0) for ''.

    >>> parse_profile("10:13")
    (10, 13)

    Raises:
      UserError: it has another form, or no step.
    """
    if not text:
        return 0, 0

    match = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", text)
    first, stop = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first < stop:
        raise UserError(
            f"config.profile: {text!r} is not START:STOP, steps from 1, with START less than STOP"
        )
    return first, stop


def _check_choices(config: Config) -> None:
    model, optimizer = config.model, config.optimizer

    # Key -> its value and the allowed ones.
    one_of = {
        "config.remat": (config.remat, tuple(decoder.REMAT)),
        "config.attention": (config.attention, attention.KERNELS),
        "config.compute_dtype": (config.compute_dtype, ("", *DTYPES)),
        "config.frozen_dtype": (config.frozen_dtype, ("", *DTYPES)),
        "config.optimizer.name": (optimizer.name, OPTIMIZERS),
        "config.optimizer.moment_dtype": (optimizer.moment_dtype, DTYPES),
        "config.optimizer.accumulation_dtype": (optimizer.accumulation_dtype, DTYPES),
        "config.model.projector": (model.projector, vision.PROJECTORS),
        "config.model.semantics": (model.semantics, SEMANTICS),
    }

    for key, (value, allowed) in one_of.items():
        if value not in allowed:
            choices = ", ".join(repr(choice) for choice in allowed)
            raise UserError(f"{key}: {value!r} is not one of {choices}")

    if model.learners not in LEARNERS:
        raise UserError(f"config.model.learners: {model.learners} is not one of {LEARNERS}")

    # The targets of LoRA are a set of names.
    unknown = sorted(set(model.lora_targets) - set(LORA_TARGETS))
    if unknown:
        raise UserError(
            f"config.model.lora_targets: {unknown[0]!r} is not one of {', '.join(LORA_TARGETS)}"
        )


def _check_bounds(config: Config) -> None:
    model, optimizer = config.model, config.optimizer

    # Key -> its value and the least allowed one.
    at_least = {
        "config.batch_size": (config.batch_size, 1),
        "config.steps": (config.steps, -1),
        "config.max_checkpoints": (config.max_checkpoints, 1),
        "config.keep_every_hours": (config.keep_every_hours, 0),
        "config.watchdog_minutes": (config.watchdog_minutes, 0),
        "config.host_timeout": (config.host_timeout, 1),
        "config.log_every": (config.log_every, 1),
        "config.laws_every": (config.laws_every, 0),
        "config.eval.every": (config.eval.every, 0),
        "config.eval.limit": (config.eval.limit, 0),
        "config.eval.batch_size": (config.eval.batch_size, 1),
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

    # Key -> its value, a share of 1.
    shares = {
        "config.optimizer.warmup_ratio": optimizer.warmup_ratio,
        "config.optimizer.b1": optimizer.b1,
        "config.optimizer.b2": optimizer.b2,
    }

    for key, value in shares.items():
        if not 0 <= value < 1:
            raise UserError(f"{key}: {value} is not at least 0 and less than 1")

    first, _ = parse_profile(config.profile)
    if 0 <= config.steps < first:
        raise UserError(
            f"config.profile: {config.profile} begins after the last step, {config.steps}"
        )

    # numpy and grain take seeds of 32 bits.
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed: {config.seed} is not at least 0 and less than 2**32")

    if config.steps < 0 and not config.epochs > 0:
        raise UserError(f"config.epochs: {config.epochs} is not more than 0")


def _check_fit(config: Config) -> None:
    """Checks pairs of keys."""
    model, optimizer = config.model, config.optimizer
    if model.router and len(model.learners) < 2:
        raise UserError(
            f"config.model.router: a router needs both learners, and config.model.learners is "
            f"{model.learners}"
        )

    if model.router and config.data.sequence_length > model.router_positions:
        raise UserError(
            f"config.data.sequence_length: {config.data.sequence_length} is more than "
            f"config.model.router_positions, {model.router_positions}"
        )

    # Every group needs a learning rate, 0 for frozen.
    if set(optimizer.groups) != set(optimizer.learning_rates):
        unpaired = sorted(set(optimizer.groups) ^ set(optimizer.learning_rates))
        raise UserError(
            f"config.optimizer: {unpaired[0]!r} is not in both groups and learning_rates"
        )

    # Micro-batches have the same size.
    if config.batch_size % optimizer.accumulation:
        raise UserError(
            f"config.batch_size: {config.batch_size} is not a multiple of "
            f"config.optimizer.accumulation, {optimizer.accumulation}"
        )
