"""Bytes per device that follow from shapes and shardings, and the largest batch that fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
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
MAX_ROWS = 4096  # per device and micro-batch; more is not searched
_MAX_COMPILATIONS = 10


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
    """The largest batch that fits, as compiled.

    rows           of the whole batch
    needed         bytes per device that it needs
    next_needed    bytes for one row more per device, which does not fit; None where the search
                   ended without compiling it
    """

    rows: int
    needed: int
    next_needed: int | None


def largest_batch(
    compile_rows: Callable[[int], CompiledStep],
    shares: int,
    memory: float,
    *,
    tried: int,
    guess: int,
) -> Fit | None:
    """Returns the largest batch that fits into `memory` bytes; None if no row per device does.

    Each compiled batch fits or does not. The next one to compile is where the line through two of
    them crosses the limit, until a batch fits and the next larger one does not. The bytes are
    not linear in the rows: the peak of a program is in another place for few rows than for many.

    Args:
      compile_rows: compiles a batch of so many rows.
      shares: of the batch: it is a multiple of this.
      tried: rows of a share to compile first.
      guess: rows of a share to compile second.
    """
    usable = memory * USABLE
    needed: dict[int, int] = {}  # rows of a share -> bytes

    def does_fit(count: int) -> bool:
        needed[count] = compile_rows(count * shares).needed
        return needed[count] <= usable

    # If the first batch does not fit, one row may.
    tried = min(tried, MAX_ROWS)
    if does_fit(tried):
        low, high = tried, MAX_ROWS + 1
    elif tried > 1 and does_fit(1):
        low, high = 1, tried
    else:
        return None

    # `low` fits and `high` does not. Near a bend the line converges slowly, from one side: bisect.
    count, sides = guess, [True]
    while high - low > 1 and len(needed) < _MAX_COMPILATIONS:
        count = min(max(count, low + 1), high - 1)
        sides.append(does_fit(count))
        low, high = (count, high) if sides[-1] else (low, count)
        is_slow = high in needed and len(sides) > 3 and sides[-1] == sides[-2]
        count = (low + high) // 2 if is_slow else _crossing(needed, usable)
    return Fit(low * shares, needed[low], needed.get(low + 1))


def _crossing(needed: Mapping[int, int], usable: float) -> int:
    """Returns the rows at which the line through the two sizes nearest to the limit crosses it."""
    below = [count for count in sorted(needed) if needed[count] <= usable]
    above = [count for count in sorted(needed) if needed[count] > usable]
    # The limit is between the two; while everything fits, it is beyond.
    first, second = (below[-1], above[0]) if above else below[-2:]
    per_row = max((needed[second] - needed[first]) / (second - first), 1e-3)
    return first + int((usable - needed[first]) / per_row)
