"""The training state: created for step 0, and converted to what a checkpoint holds and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wings_jax.training.step import TrainState


def make_state(
    trained: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Returns the state of step 0; moments have the shardings of their parameters."""
    shapes = abstract_opt_state(trained, optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    replicated = NamedSharding(mesh, PartitionSpec())

    # Computed by one jit, so that the moments are created with their final shardings.
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(dict(trained))
    step, skipped = (jax.device_put(np.zeros((), np.int32), replicated) for _ in range(2))
    return TrainState(step, skipped, dict(trained), dict(frozen), opt_state)


def abstract_opt_state(
    trained: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> optax.OptState:
    """Returns the optimizer's state as shapes; moments have the shardings of their parameters."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def shaped(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # Groups of `optax.partition` mask the parameters of the others: such a leaf has no shape.
    def like_parameter(leaf: Any, parameter: Any) -> Any:
        is_masked = isinstance(leaf, optax.MaskedNode)
        return leaf if is_masked else shaped(leaf, parameter.sharding)

    # Counters are replicated; only what is like a parameter is sharded.
    return optax.tree_map_params(
        optimizer,
        like_parameter,
        jax.eval_shape(optimizer.init, dict(trained)),
        dict(trained),
        transform_non_params=lambda leaf: shaped(leaf, replicated),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


def to_checkpoint(state: TrainState) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Returns what a checkpoint holds of a state: flat parameters, and what resuming needs."""
    params = {**state.frozen, **state.trained}
    return params, {"step": state.step, "skipped": state.skipped, "opt_state": state.opt_state}


def from_checkpoint(
    state: TrainState, params: Mapping[str, jax.Array], saved: Mapping[str, Any]
) -> TrainState:
    """Returns the state of `to_checkpoint`'s two parts; `state` defines which parameters train."""
    return TrainState(
        saved["step"],
        saved["skipped"],
        {path: params[path] for path in state.trained},
        {path: params[path] for path in state.frozen},
        saved["opt_state"],
    )
