"""Bytes per device that follow from shapes and shardings, and the largest batch that fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from wings_jax import config as config_lib
from wings_jax.model.presets import WingsArch
from wings_jax.planning import sizes
from wings_jax.planning.compiled import CompiledStep
from wings_jax.training import optim
from wings_jax.training.step import TrainState

# Share of the memory that a program may plan with; the rest is the runtime's.
USABLE = 0.95
_MAX_ROWS = 4096  # per device; more is not searched


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters of one optimizer group.

    name        of the group
    parameters  in all
    is_trained  whether it has a learning rate
    bytes       of one device: the parameters alone
    """

    name: str
    parameters: int
    is_trained: bool
    bytes: int


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of one device.

    trained    parameters that train
    frozen     the others
    optimizer  the optimizer's state
    gradients  of the trained parameters, and their sum over micro-batches
    boundaries residual stream between the layers, which every remat policy saves, and x0
    batch      tokens, layout and images
    """

    trained: int
    frozen: int
    optimizer: int
    gradients: int
    boundaries: int
    batch: int

    @property
    def total(self) -> int:
        """The sum of all of them."""
        return sum(dataclasses.astuple(self))


def count_groups(state: TrainState, config: config_lib.Config) -> list[Group]:
    """Returns the parameter groups in the order of the config."""
    params = {**state.trained, **state.frozen}
    labels = optim.label_groups(params, config.optimizer)
    groups = []
    for name in config.optimizer.groups:
        leaves = [leaf for path, leaf in params.items() if labels[path] == name]
        is_trained = config.optimizer.learning_rates[name] > 0
        count = sum(math.prod(leaf.shape) for leaf in leaves)
        groups.append(Group(name, count, is_trained, sum(map(sizes.device_bytes, leaves))))
    return groups


def count_state(
    state: TrainState, batch: Any, config: config_lib.Config, arch: WingsArch
) -> StateBytes:
    """Returns the bytes of one device, for a resolved config and a batch of shapes."""
    # Rows of one micro-batch on one device.
    micro = batch.targets.sharding.shard_shape(batch.targets.shape)[0]
    micro //= config.optimizer.accumulation

    # Gradients have the dtype of their parameters; with accumulation there is a sum beside them.
    gradients = sizes.tree_bytes(state.trained)
    if config.optimizer.accumulation > 1:
        summed = jnp.dtype(config.optimizer.accumulation_dtype).itemsize
        gradients += gradients * summed // 4

    # x0 is float32, the stream that each layer saves is of the compute dtype.
    stream = micro * config.data.sequence_length * arch.decoder.hidden_size
    width = jnp.dtype(config.compute_dtype).itemsize
    return StateBytes(
        trained=sizes.tree_bytes(state.trained),
        frozen=sizes.tree_bytes(state.frozen),
        optimizer=sizes.tree_bytes(state.opt_state),
        gradients=gradients,
        boundaries=stream * (arch.decoder.num_layers * width + 4),
        batch=sizes.tree_bytes(batch),
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """The largest batch that fits.

    rows           of the whole batch
    needed         bytes per device that it needs, by the line through two compiled batches
    verified       bytes that the compiler reports for it; None if it was not compiled
    next_needed    bytes for one row more per device, by the same line
    """

    rows: int
    needed: float
    verified: int | None
    next_needed: float


def largest_batch(
    compile_rows: Callable[[int], CompiledStep], shares: int, memory: float
) -> Fit | None:
    """Returns the largest batch that fits into `memory` bytes; None if no row per device does.

    Two compiled batches give the bytes per row; the answer of their line is compiled too, and
    lowered until the compiler agrees.

    Args:
      compile_rows: compiles a batch of so many rows.
      shares: of the batch: it is a multiple of this.
    """
    one, two = compile_rows(shares), compile_rows(2 * shares)
    per_row = max(two.needed - one.needed, 1)
    usable = memory * USABLE
    if one.needed > usable:
        return None

    # The line gives the first guess, the compiler decides.
    count = min(1 + int((usable - one.needed) // per_row), _MAX_ROWS)
    while count > 2:
        verified = compile_rows(count * shares)
        if verified.needed <= usable:
            break
        # The compiler needs more than the linear estimate: as many rows less as that is.
        count = max(2, count - max(1, math.ceil((verified.needed - usable) / per_row)))
    else:
        verified = two if count == 2 else one

    line = one.needed + per_row * (count - 1)
    return Fit(count * shares, line, verified.needed, line + per_row)
