"""Setting up a run: data, tokenizer, the claim on a workdir, and where every parameter starts."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from wings_jax import axes, checkpoint, files, formatting, tree
from wings_jax import config as config_lib
from wings_jax.data import examples, pipeline, tokenization
from wings_jax.errors import UserError
from wings_jax.model import parameters
from wings_jax.model.presets import WingsArch
from wings_jax.model.wings import Wings
from wings_jax.scenes import dataset
from wings_jax.training import optim, state, step
from wings_jax.weights import starting


@dataclasses.dataclass
class TrainingRun:
    """One run, ready to start or to go on.

    steps    optimizer steps in all; `state.step` of them are done
    update   jitted (state, batch) -> (state, metrics)
    rates    group -> learning rate by step
    """

    config: config_lib.Config
    workdir: pathlib.Path
    arch: WingsArch
    tokenizer: Any
    mesh: Mesh
    loader: pipeline.Loader
    steps: int
    state: step.TrainState
    update: Callable
    rates: Mapping[str, Callable]
    writer: checkpoint.CheckpointWriter


def set_up(config: config_lib.Config, workdir: pathlib.Path) -> TrainingRun:
    """Returns the run of a config in its workdir, resumed if it had begun.

    Raises:
      UserError: whatever does not fit, by name; the workdir is not touched before that is known.
    """
    arch = starting.resolve_arch(config.model)
    mesh = axes.make_mesh(dataclasses.asdict(config.mesh))
    parameters.check_mesh(
        arch, mesh, config.batch_size // config.optimizer.accumulation, flag="config.mesh"
    )
    axes.check_hosts(mesh, config.batch_size)
    model = Wings(arch, dtypes(config)[0], config.attention, config.remat)
    abstract = parameters.abstract_params(arch, mesh=mesh)
    labels = optim.label_groups(abstract, config.optimizer)
    source = find_start(config, workdir)
    files = starting.tokenizer_files(config, source)
    check_claim(workdir, config)
    tokenizer = checkpoint.open_tokenizer(files)
    loader = open_data(config, arch, tokenizer, workdir)
    steps = config.steps
    if steps < 0:
        steps = max(1, round(config.epochs * loader.steps_per_epoch))
    trained, frozen = start_params(config, arch, abstract, labels, source)
    optimizer = optim.make_optimizer(trained, labels, config.optimizer, steps)
    first = state.make_state(trained, frozen, optimizer, mesh)
    claim(workdir, config)
    writer = checkpoint.CheckpointWriter(workdir, config, arch, files)
    resumed = resume(writer, first, workdir)
    update = step.make_train_step(
        model,
        optimizer,
        loss_chunk=config.loss_chunk,
        accumulation=config.optimizer.accumulation,
    )
    shardings = jax.tree.map(lambda x: x.sharding, resumed)
    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
    rates = optim.schedules(config.optimizer, steps)
    return TrainingRun(
        config, workdir, arch, tokenizer, mesh, loader, steps, resumed, update, rates, writer
    )


def dtypes(config: config_lib.Config) -> tuple[jnp.dtype, jnp.dtype]:
    """Returns the dtype of the matmuls and that of frozen parameters."""
    usual = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(config.compute_dtype or usual), jnp.dtype(config.frozen_dtype or usual)


def find_start(config: config_lib.Config, workdir: pathlib.Path) -> pathlib.Path | None:
    """Returns the checkpoint to start or to go on from, None for the folders of `config.model`."""
    begun = checkpoint.newest_step(workdir)
    if begun is not None or not config.init_from:
        return begun
    found = checkpoint.newest_step(config.init_from)
    if found is None:
        raise UserError(
            f"config.init_from: {config.init_from} holds no checkpoint; run the stage before "
            "(configs/stage1.py makes runs/stage1, and so on), or say --config.init_from=DIR"
        )
    return found


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


def start_params(
    config: config_lib.Config,
    arch: WingsArch,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    labels: Mapping[str, str],
    source: pathlib.Path | None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns trained (float32) and frozen parameters, flat, where they belong; tells of them."""
    chosen = {path for path in abstract if optim.is_trained(labels, config.optimizer, path)}
    kept = dtypes(config)[1]
    if source is None:
        loaded, start = starting.load_base(arch, config.model), "config.model"
        starting.check_sources(abstract, loaded, start)
    else:
        start = str(source)
        saved = checkpoint.read_shapes(source)
        starting.check_sources(abstract, saved, start)
        check_start(arch, abstract, checkpoint.read_meta(source)[1], saved, start)
        wanted = saved.keys() & abstract.keys()
        targets = {
            path: jax.ShapeDtypeStruct(
                abstract[path].shape,
                jnp.float32 if path in chosen else kept,
                sharding=abstract[path].sharding,
            )
            for path in wanted
        }
        loaded = checkpoint.read_params(source, targets)
    missing = [path for path in abstract if path not in loaded]
    idle = [path for path in missing if starting.is_adapter(path) and path not in chosen]
    if idle:
        raise UserError(
            f"config.optimizer.learning_rates.{labels[idle[0]]}: {idle[0]} begins anew and would "
            "stay so, as its group is frozen"
        )
    flat = {**loaded, **parameters.initialize_params(arch, missing, abstract, config.seed)}
    rates = config.optimizer.learning_rates
    columns = {
        "group": labels,
        "learning rate": {
            path: f"{rates[group]:g}" if rates[group] else "frozen"
            for path, group in labels.items()
        },
        "starts from": {path: "fresh" if path in missing else start for path in abstract},
    }
    print(tree.describe(abstract, columns), flush=True)
    trained, frozen = tree.split({path: flat[path] for path in abstract}, chosen.__contains__)
    return (
        parameters.place_params(trained, abstract, jnp.float32),
        parameters.place_params(frozen, abstract, kept),
    )


def check_start(
    arch: WingsArch,
    abstract: Mapping[str, Any],
    theirs: WingsArch,
    saved: Mapping[str, Any],
    start: str,
) -> None:
    """Tells what of a checkpoint is not gone on with.

    Raises:
      UserError: it is of another LLM or tower, in a value that no shape shows, or what it learned
        lies in adapters that the config does not have.
    """
    mine = arch
    for part in ("decoder", "vision"):
        values = (config_lib.to_dict(getattr(arch, part)) for arch in (theirs, mine))
        old, new = (dict(config_lib.flatten(value)) for value in values)
        for key in sorted((old.keys() | new.keys()) - {"max_positions"}):
            if not _same(old.get(key), new.get(key)):
                name = "llm" if part == "decoder" else "vision"
                raise UserError(
                    f"{start}: its {part} has {key} {old.get(key)}, that of config.model.{name} "
                    f"{new.get(key)}"
                )
    left = sorted(saved.keys() - abstract.keys())
    adapters = [path for path in left if starting.is_adapter(path)]
    if adapters:
        raise UserError(
            f"{start}: {adapters[0]} is not in the config's model and would be lost: go on with "
            "the same LoRA or prefix, or merge LoRA with python -m wings_jax.convert"
        )
    if left:
        print(f"not gone on with, of {start}: {formatting.format_names(left)}", flush=True)
    compared = ("semantics",) * bool(theirs.learners and mine.learners)
    compared += ("gain",) * bool(theirs.router and mine.router)
    for name in compared:
        if getattr(theirs, name) != getattr(mine, name):
            print(f"config.model.{name} is another than that of {start}", flush=True)


def _same(old: Any, new: Any) -> bool:
    is_number = isinstance(old, float) and isinstance(new, float)
    return math.isclose(old, new, rel_tol=1e-6) if is_number else old == new


def check_claim(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Raises UserError if the workdir holds a run of another config, or cannot be written.

    A run that never came to its first checkpoint leaves nothing worth keeping.
    """
    note = workdir / "config.json"
    place = workdir
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--workdir: cannot write to {place}")
    kept = workdir / checkpoint.FOLDER
    if kept.exists() and not (kept.is_dir() and os.access(kept, os.W_OK)):
        raise UserError(f"--workdir: {kept} is no folder that can be written to")
    try:
        text = note.read_text(encoding="utf-8") if note.exists() else None
    except OSError as error:
        raise UserError(f"--workdir: cannot read {note}: {error.strerror}") from error
    if text is not None and checkpoint.newest_step(workdir) is not None:
        old = config_lib.from_dict(config_lib.Config, json.loads(text), str(note))
        changed = config_lib.differences(old, config)
        if changed:
            raise UserError(
                f"--workdir: {workdir} was made with another config ({'; '.join(changed[:4])}): "
                "give another --workdir, or remove it"
            )


def claim(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Makes the workdir and notes the config in it."""
    if jax.process_index():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(workdir / "config.json", config_lib.to_dict(config))
    except OSError as error:
        raise UserError(f"--workdir: cannot write to {workdir}: {error.strerror}") from error


def resume(
    writer: checkpoint.CheckpointWriter, first: step.TrainState, workdir: pathlib.Path
) -> step.TrainState:
    """Returns the newest state in the workdir; `first` if there is none."""
    found = checkpoint.newest_step(workdir)
    if found is None:
        return first
    resumed = state.from_checkpoint(
        first, *writer.restore(int(found.name), *state.to_checkpoint(first))
    )
    logging.info("resumed %s", found)
    print(f"going on after step {found.name} of {workdir}", flush=True)
    return resumed
