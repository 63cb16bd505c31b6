"""Setting up a run: everything that a config describes, ready for the loop."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from wings_jax import axes, checkpoint
from wings_jax import config as config_lib
from wings_jax.data import examples, pipeline, tokenization
from wings_jax.errors import UserError
from wings_jax.model import parameters
from wings_jax.model.presets import WingsArch
from wings_jax.model.wings import Wings
from wings_jax.scenes import dataset
from wings_jax.training import initial_params, optim, state, step, workdirs
from wings_jax.weights import starting


@dataclasses.dataclass
class TrainingRun:
    """One run, ready to start or to resume."""

    config: config_lib.Config
    workdir: pathlib.Path
    arch: WingsArch
    tokenizer: Any
    mesh: Mesh
    loader: pipeline.Loader
    steps: int
    """Optimizer steps in all; `state.step` of them are done."""
    state: step.TrainState
    update: Callable[..., tuple[step.TrainState, step.Metrics]]
    """Jitted (state, batch) -> (state, metrics); donates the state."""
    rates: Mapping[str, Callable[[int], Any]]
    """Group -> learning rate by step."""
    writer: checkpoint.CheckpointWriter


def set_up(config: config_lib.Config, workdir: pathlib.Path) -> TrainingRun:
    """Returns the run of a config in its workdir, resumed if it has a checkpoint there.

    Raises:
      UserError: what does not fit, by key; nothing was written to the workdir before.
    """
    # What the config describes, as shapes and names only.
    arch = starting.resolve_arch(config.model)
    mesh = _make_mesh(config, arch)
    abstract = parameters.abstract_params(arch, mesh=mesh)
    labels = optim.label_groups(abstract, config.optimizer)

    # The checkpoint to start from, and whether the workdir may be used.
    source = find_source(config, workdir)
    workdirs.check_workdir(workdir, config)

    # Tokenizer and batches.
    tokenizer_files = starting.tokenizer_files(config, source)
    tokenizer = checkpoint.open_tokenizer(tokenizer_files)
    loader = open_data(config, arch, tokenizer, workdir)
    steps = config.steps
    if steps < 0:
        steps = max(1, round(config.epochs * loader.steps_per_epoch))

    # Parameters and optimizer, on the devices.
    trained, frozen = initial_params.load_params(config, arch, abstract, labels, source)
    optimizer = optim.make_optimizer(trained, labels, config.optimizer, steps)
    initial = state.make_state(trained, frozen, optimizer, mesh)

    # From here on the workdir is written to.
    workdirs.claim_workdir(workdir, config)
    writer = checkpoint.CheckpointWriter(
        workdir, config, arch, tokenizer_files, max_checkpoints=config.max_checkpoints
    )
    current = resume(writer, initial, workdir)

    return TrainingRun(
        config=config,
        workdir=workdir,
        arch=arch,
        tokenizer=tokenizer,
        mesh=mesh,
        loader=loader,
        steps=steps,
        state=current,
        update=_jit_update(config, arch, optimizer, current),
        rates=optim.schedules(config.optimizer, steps),
        writer=writer,
    )


def _make_mesh(config: config_lib.Config, arch: WingsArch) -> Mesh:
    """Returns the mesh of all devices. Raises MeshError where model, batch or hosts do not fit."""
    mesh = axes.make_mesh(dataclasses.asdict(config.mesh))
    micro_batch = config.batch_size // config.optimizer.accumulation
    parameters.check_mesh(arch, mesh, micro_batch, flag="config.mesh")
    axes.check_hosts(mesh, config.batch_size)
    return mesh


def find_source(config: config_lib.Config, workdir: pathlib.Path) -> pathlib.Path | None:
    """Returns the checkpoint to resume or to start from; None for the directories of `model`.

    Raises:
      UserError: `config.init_from` does not hold a checkpoint.
    """
    own_step = checkpoint.newest_step(workdir)
    if own_step is not None or not config.init_from:
        return own_step

    source = checkpoint.newest_step(config.init_from)
    if source is None:
        raise UserError(
            f"config.init_from: {config.init_from} does not hold a checkpoint; run the stage before "
            "(configs/stage1.py writes runs/stage1, and so on), or give --config.init_from=DIR"
        )
    return source


def open_data(
    config: config_lib.Config,
    arch: WingsArch,
    tokenizer: tokenization.HFTokenizer,
    workdir: pathlib.Path,
) -> pipeline.Loader:
    """Returns the batches of a config, this host's part; writes the scenes if they do not exist.

    Sample sizes that packing measures are stored in `workdir` unless the config names a directory.

    Raises:
      UserError: a source has no path, or its data cannot be used.
    """
    data = config.data
    if data.scenes and jax.process_index() == 0:
        dataset.write_scenes(data.scenes)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("scenes")

    if not data.sources:
        raise UserError("config.data.sources is empty: give at least one data file")
    for name, source in data.sources.items():
        if not source.path:
            raise UserError(
                f"config.data.sources.{name}.path is empty: give a LLaVA JSON or JSONL file or a "
                f"TFDS directory, --config.data.sources.{name}.path=FILE"
            )

    recipe = examples.make_recipe(
        data, tokenizer, arch.vision, prompt_length=arch.semantics.prompt_length
    )
    cache = None if data.cache == "none" else data.cache or workdir / "data_cache"
    return pipeline.Loader(
        data,
        recipe,
        rows=config.batch_size,
        seed=config.seed,
        cache=cache,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def resume(
    writer: checkpoint.CheckpointWriter, initial: step.TrainState, workdir: pathlib.Path
) -> step.TrainState:
    """Returns the newest state in the workdir; `initial` if there is none."""
    newest = checkpoint.newest_step(workdir)
    if newest is None:
        return initial

    params, extra = state.to_checkpoint(initial)
    restored = state.from_checkpoint(initial, *writer.restore(int(newest.name), params, extra))
    print(f"resuming from step {newest.name} of {workdir}", flush=True)
    return restored


def _jit_update(
    config: config_lib.Config,
    arch: WingsArch,
    optimizer: optax.GradientTransformation,
    current: step.TrainState,
) -> Callable[..., tuple[step.TrainState, step.Metrics]]:
    """Returns the compiled training step; the new state has the shardings of `current`."""
    dtype = jnp.dtype(config.compute_dtype or parameters.default_dtype())
    model = Wings(arch, dtype, config.attention, config.remat)
    update = step.make_train_step(
        model,
        optimizer,
        loss_chunk=config.loss_chunk,
        accumulation=config.optimizer.accumulation,
    )
    shardings = jax.tree.map(lambda x: x.sharding, current)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
