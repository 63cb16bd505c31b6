"""The program of a training step: its abstract inputs, and the jitted update.

What a run (`start.set_up`), `wings_jax.plan` and the benchmarks share. Nothing here allocates:
the inputs are shapes with dtypes and shardings, from which the step can be lowered and compiled.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from wings_jax import axes, tree
from wings_jax import config as config_lib
from wings_jax.model import layout, parameters
from wings_jax.model.presets import WingsArch
from wings_jax.model.wings import Wings
from wings_jax.training import meshes, optim, state, step

Abstract = dict[str, jax.ShapeDtypeStruct]


def split_params(
    config: config_lib.Config, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[Abstract, Abstract]:
    """Returns the trained (f32) and the frozen (`config.frozen_dtype`) parameters as shapes."""
    frozen_dtype = jnp.dtype(config.frozen_dtype or parameters.default_dtype())
    labels = optim.label_groups(abstract, config.optimizer)

    def is_trained(path: str) -> bool:
        return optim.is_trained(labels, config.optimizer, path)

    def typed(leaves: Mapping[str, jax.ShapeDtypeStruct], dtype: jnp.dtype) -> Abstract:
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
            for path, leaf in leaves.items()
        }

    # Small updates would be rounded away in bfloat16; what is frozen is only read.
    trained, frozen = tree.split(abstract, is_trained)
    return typed(trained, jnp.dtype(jnp.float32)), typed(frozen, frozen_dtype)


def abstract_state(
    config: config_lib.Config, arch: WingsArch, mesh: Mesh, steps: int
) -> tuple[step.TrainState, optax.GradientTransformation]:
    """Returns the training state as shapes with shardings, and its optimizer.

    Raises:
      UserError: the groups do not match the parameters, or nothing trains.
    """
    trained, frozen = split_params(config, parameters.abstract_params(arch, mesh=mesh))
    labels = optim.label_groups({**trained, **frozen}, config.optimizer)
    optimizer = optim.make_optimizer(trained, labels, config.optimizer, steps)

    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=axes.sharding_of(mesh, ()))
    opt_state = state.abstract_opt_state(trained, optimizer, mesh)
    shapes = step.TrainState(counter, counter, trained, frozen, opt_state)  # type: ignore[arg-type]
    return shapes, optimizer


def abstract_batch(config: config_lib.Config, arch: WingsArch, mesh: Mesh) -> layout.Batch:
    """Returns a global batch of the config as shapes, sharded over the mesh."""
    rows = meshes.padded_batch_size(mesh, config.batch_size, config.optimizer.accumulation)
    side = arch.vision.image_size

    # One row on the host: only its shapes and dtypes are used.
    slots = np.zeros((1, config.data.sequence_length), np.int32)
    example = layout.Batch(
        layout.make_layout(slots, slots),
        slots,
        np.zeros((1, config.data.images_per_row, side, side, 3), np.uint8),
    )

    sharding = axes.sharding_of(mesh, ("B",))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding), example
    )


def jit_update(
    config: config_lib.Config,
    arch: WingsArch,
    optimizer: optax.GradientTransformation,
    current: step.TrainState,
) -> jax.stages.Wrapped:
    """Returns the jitted training step (state, batch) -> (state, metrics), which donates the state.

    The new state has the shardings of `current`, whose leaves may be arrays or shapes.
    """
    dtype = jnp.dtype(config.compute_dtype or parameters.default_dtype())
    model = Wings(arch, dtype, config.attention, config.remat, config.scan_layers)

    update = step.make_train_step(
        model,
        optimizer,
        loss_chunk=config.loss_chunk,
        accumulation=config.optimizer.accumulation,
        accumulation_dtype=config.optimizer.accumulation_dtype,
    )

    # Without them the compiler may choose others, and the next step would compile again.
    shardings = jax.tree.map(lambda x: x.sharding, current)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
