"""Setting up a run: everything that a config describes, ready for the loop."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from wings_jax import checkpoint
from wings_jax import config as config_lib
from wings_jax.data import examples, pipeline, tokenization
from wings_jax.errors import UserError
from wings_jax.model import parameters
from wings_jax.model.kernels import choice
from wings_jax.model.presets import WingsArch
from wings_jax.scenes import dataset
from wings_jax.training import initial_params, meshes, optim, program, state, step, workdirs
from wings_jax.training.writer import CheckpointWriter
from wings_jax.weights import starting


@dataclasses.dataclass
class TrainingRun:
    """One run, ready to start or to resume."""

    config: config_lib.Config
    """The validated config."""
    workdir: pathlib.Path
    """Directory of checkpoints and metrics."""
    arch: WingsArch
    """Architecture of the parameters."""
    tokenizer: Any
    """Transformers tokenizer of the LLM."""
    mesh: Mesh
    """Devices over which state and batches are sharded."""
    loader: pipeline.Loader
    """Batches by step, this host's rows."""
    steps: int
    """Optimizer steps in all; `state.step` of them are done."""
    state: step.TrainState
    """Parameters, optimizer state and step; restored if the run is resumed."""
    update: Callable[..., tuple[step.TrainState, step.Metrics]]
    """Jitted (state, batch) -> (state, metrics); donates the state."""
    rates: Mapping[str, Callable[[int], Any]]
    """Group -> learning rate by step."""
    writer: CheckpointWriter
    """Saves states in the background."""


def set_up(config: config_lib.Config, workdir: pathlib.Path) -> TrainingRun:
    """Returns the run of a config in its workdir, resumed if it has a checkpoint there.

    A newest step that is damaged is renamed, and the one before is resumed from.

    Raises:
      UserError: what does not fit, by key; nothing was written to the workdir before.
    """
    damaged: list[pathlib.Path] = []
    while True:
        try:
            return _set_up(config, workdir, damaged)
        except checkpoint.DamagedCheckpointError as error:
            # Only a damaged step of this workdir has a step before it to fall back to.
            is_own = error.step in checkpoint.list_steps(workdir)
            if not is_own or not workdirs.list_steps(workdir, [*damaged, error.step]):
                raise

            print(f"{error.step} is damaged ({error.reason}): trying the step before", flush=True)
            damaged.append(error.step)


def _set_up(
    config: config_lib.Config, workdir: pathlib.Path, damaged: Sequence[pathlib.Path]
) -> TrainingRun:
    """Returns the run, resumed from the newest step that is not in `damaged`."""
    # The checkpoint to start from.
    own_steps = workdirs.list_steps(workdir, damaged)
    source = own_steps[-1] if own_steps else find_source(config)
    saved = None
    if source is not None and starting.uses_checkpoint(config.model):
        saved = checkpoint.read_meta(source)[1]

    # What the config describes, as shapes and names only.
    arch = starting.resolve_arch(config.model, saved)
    choice.check_kernel(
        config.attention, jnp.dtype(config.compute_dtype or parameters.default_dtype())
    )
    mesh = meshes.make_run_mesh(config, arch)
    abstract = parameters.abstract_params(arch, mesh=mesh)
    labels = optim.label_groups(abstract, config.optimizer)

    # Whether the workdir may be used.
    workdirs.check_workdir(workdir, config)

    # Tokenizer and batches.
    tokenizer_files = starting.tokenizer_files(config, source)
    tokenizer = checkpoint.open_tokenizer(tokenizer_files)
    check_tokenizer(tokenizer, arch)
    loader = open_data(config, arch, tokenizer, workdir)
    # A negative number of steps stands for `epochs`.
    steps = config.steps
    if steps < 0:
        steps = max(1, round(config.epochs * loader.steps_per_epoch))

    # Parameters and optimizer, on the devices.
    trained, frozen = initial_params.load_params(config, arch, abstract, labels, source)
    optimizer = optim.make_optimizer(trained, labels, config.optimizer, steps)
    initial = state.make_state(trained, frozen, optimizer, mesh)

    # From here on the workdir is written to.
    workdirs.set_aside(damaged)
    workdirs.claim_workdir(workdir, config)
    writer = CheckpointWriter(
        workdir,
        config,
        arch,
        tokenizer_files,
        max_checkpoints=config.max_checkpoints,
        keep_every_hours=config.keep_every_hours,
    )
    current = resume(writer, initial, own_steps, verify=config.verify_checkpoints)

    return TrainingRun(
        config=config,
        workdir=workdir,
        arch=arch,
        tokenizer=tokenizer,
        mesh=mesh,
        loader=loader,
        steps=steps,
        state=current,
        update=program.jit_update(config, arch, optimizer, current),
        rates=optim.schedules(config.optimizer, steps),
        writer=writer,
    )


def find_source(config: config_lib.Config) -> pathlib.Path | None:
    """Returns the checkpoint of `config.init_from`; None for the directories of `config.model`.

    Raises:
      UserError: `config.init_from` holds no checkpoint.
    """
    if not config.init_from:
        return None
    source = checkpoint.newest_step(config.init_from)
    if source is None:
        raise UserError(
            f"config.init_from: {config.init_from} holds no checkpoint; run the stage "
            "before (configs/stage1.py writes runs/stage1, ...), or give --config.init_from=DIR"
        )
    return source


def check_tokenizer(tokenizer: Any, arch: WingsArch) -> None:
    """Raises UserError if the tokenizer has ids without a row in the LLM's embedding."""
    ids, rows = max(tokenizer.get_vocab().values()) + 1, arch.decoder.vocab_size
    if ids > rows:
        raise UserError(
            f"config.data.tokenizer: the tokenizer has {ids} tokens, the LLM's embedding {rows} "
            "rows: give the tokenizer that belongs to the LLM"
        )


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
    # One host writes them, and the others wait until they are complete.
    if data.scenes and jax.process_index() == 0:
        dataset.write_scenes(data.scenes)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("scenes")

    if not data.sources:
        raise UserError("config.data.sources is empty: give at least one data file")
    for name, source in data.sources.items():
        if not source.path:
            raise UserError(
                f"config.data.sources.{name}.path is empty: give a data file or a "
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
    writer: CheckpointWriter,
    initial: step.TrainState,
    own_steps: Sequence[pathlib.Path],
    *,
    verify: bool,
) -> step.TrainState:
    """Returns the state of the newest of the workdir's steps; `initial` if there is none.

    The parameters of `initial` are those of that step already: only the rest is read here.

    Raises:
      DamagedCheckpointError: the step cannot be read, or with `verify` its checksums differ.
    """
    if not own_steps:
        return initial

    newest = int(own_steps[-1].name)
    params, extra = state.to_checkpoint(initial)
    try:
        restored = writer.restore_opt_state(newest, extra, verify=verify)
    except checkpoint.DamagedCheckpointError:
        writer.close()
        raise
    print(f"resuming from step {newest}, {own_steps[-1]}", flush=True)
    return state.from_checkpoint(initial, params, restored)
