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
import transformers
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from wings_jax import axes, tree
from wings_jax import config as config_lib
from wings_jax.data import pipeline, scenes
from wings_jax.errors import UserError
from wings_jax.model.presets import WingsArch
from wings_jax.model.wings import Wings
from wings_jax.training import checkpoint, optim, state, step
from wings_jax.weights import hf


@dataclasses.dataclass
class Run:
    """One run, ready to start or to go on.

    steps    optimizer steps in all; `state.step` of them are done
    update   jitted (state, batch) -> (state, metrics)
    rates    group -> learning rate by step
    """

    config: config_lib.Config
    workdir: pathlib.Path
    mesh: Mesh
    loader: pipeline.Loader
    steps: int
    state: step.TrainState
    update: Callable
    rates: Mapping[str, Callable]
    writer: checkpoint.Writer


def set_up(config: config_lib.Config, workdir: pathlib.Path) -> Run:
    """Returns the run of a config in its workdir, resumed if it had begun.

    Raises:
      UserError: whatever does not fit, by name; the workdir is not touched before that is known.
    """
    arch = state.resolve_arch(config.model)
    mesh = axes.make_mesh(dataclasses.asdict(config.mesh))
    state.check_mesh(arch, mesh, config.batch_size // config.optimizer.accumulation)
    axes.check_hosts(mesh, config.batch_size)
    model = Wings(arch, dtypes(config)[0], config.attention, config.remat)
    plan = state.plan(model, mesh)
    labels = optim.label_groups(plan.shapes, config.optimizer)
    source = find_start(config, workdir)
    files = tokenizer_files(config, source)
    check_claim(workdir, config)
    loader = open_data(config, arch, checkpoint.open_tokenizer(files))
    steps = config.steps
    if steps < 0:
        steps = max(1, round(config.epochs * loader.steps_per_epoch))
    trained, frozen = start_params(config, plan, labels, source)
    optimizer = optim.make(trained, labels, config.optimizer, steps)
    first = state.make_state(trained, frozen, optimizer, mesh)
    claim(workdir, config)
    writer = checkpoint.Writer(workdir, config, arch, files)
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
    return Run(config, workdir, mesh, loader, steps, resumed, update, rates, writer)


def dtypes(config: config_lib.Config) -> tuple[jnp.dtype, jnp.dtype]:
    """Returns the dtype of the matmuls and that of frozen parameters."""
    usual = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(config.compute_dtype or usual), jnp.dtype(config.frozen_dtype or usual)


def find_start(config: config_lib.Config, workdir: pathlib.Path) -> pathlib.Path | None:
    """Returns the checkpoint to start or to go on from, None for the folders of `config.model`."""
    begun = checkpoint.newest(workdir)
    if begun is not None or not config.init_from:
        return begun
    found = checkpoint.newest(config.init_from)
    if found is None:
        raise UserError(
            f"config.init_from: {config.init_from} holds no checkpoint; run the stage before "
            "(configs/stage1.py makes runs/stage1, and so on), or say --config.init_from=DIR"
        )
    return found


def tokenizer_files(config: config_lib.Config, source: pathlib.Path | None) -> dict[str, str]:
    """Returns the tokenizer's files, name -> content: the config's, the LLM's or the checkpoint's.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    named = config.data.tokenizer or state.folder(config.model.llm, "llm")
    if named is None and source is not None:
        return checkpoint.read_tokenizer_files(source)
    if named is None:
        raise UserError(
            "config.data.tokenizer: name a folder or hub id, or start from a checkpoint"
        )
    if not pathlib.Path(named).is_dir():
        named = _fetch_tokenizer(str(named))
    found = {
        name: (pathlib.Path(named) / name).read_text(encoding="utf-8")
        for name in hf.TOKENIZER_FILES
        if (pathlib.Path(named) / name).is_file() and name != "tokenizer.model"
    }
    if "tokenizer.json" not in found:
        raise UserError(f"config.data.tokenizer: {named} has no tokenizer.json")
    return found


def _fetch_tokenizer(name: str) -> pathlib.Path:
    """Returns the folder with the files of a hub tokenizer."""
    try:
        path = transformers.utils.cached_file(name, "tokenizer.json")
        transformers.utils.cached_file(name, "tokenizer_config.json")
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"config.data.tokenizer: {name}: {reason}") from error
    return pathlib.Path(path).parent


def open_data(config: config_lib.Config, arch: WingsArch, tokenizer: Any) -> pipeline.Loader:
    """Returns the batches of a config, this host's part; writes the scenes first if they lack."""
    data, vision = config.data, arch.vision
    if data.scenes and jax.process_index() == 0:
        scenes.write(data.scenes)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("scenes")
    if not data.sources:
        raise UserError("config.data.sources: there is none")
    for name, source in data.sources.items():
        if not source.path:
            raise UserError(
                f"config.data.sources.{name}.path is empty: give a LLaVA JSON or JSONL file or a "
                f"TFDS folder, --config.data.sources.{name}.path=FILE"
            )
    spec = pipeline.DataSpec(
        sources=tuple(
            pipeline.SourceSpec(s.path, s.images or None, s.weight or None, s.split)
            for s in data.sources.values()
        ),
        sequence_length=data.sequence_length,
        rows=config.batch_size,
        images_per_row=data.images_per_row,
        image_size=vision.image_size,
        image_mean=vision.mean,
        image_slots=vision.num_patches,
        template=data.template,
        prompt_length=arch.semantics.prompt_length,
        packing=data.packing,
        seed=config.seed,
        max_bad_share=data.max_bad_share,
        threads=data.threads,
        workers=data.workers,
    )
    return pipeline.Loader(spec, tokenizer, host=jax.process_index(), hosts=jax.process_count())


def start_params(
    config: config_lib.Config,
    plan: state.Plan,
    labels: Mapping[str, str],
    source: pathlib.Path | None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns trained (float32) and frozen parameters, flat, where they belong; tells of them."""
    chosen = {path for path in plan.shapes if optim.is_trained(labels, config.optimizer, path)}
    kept = dtypes(config)[1]
    if source is None:
        loaded, start = state.load_base(plan, config.model), "config.model"
        state.check_sources(plan, loaded, start)
    else:
        start = str(source)
        saved = checkpoint.read_shapes(source)
        state.check_sources(plan, saved, start)
        check_start(plan, checkpoint.read_meta(source)[1], saved, start)
        wanted = saved.keys() & plan.shapes.keys()
        targets = {
            path: jax.ShapeDtypeStruct(
                plan.shapes[path].shape,
                jnp.float32 if path in chosen else kept,
                sharding=plan.shardings[path],
            )
            for path in wanted
        }
        loaded = checkpoint.read_params(source, targets)
    missing = [path for path in plan.shapes if path not in loaded]
    idle = [path for path in missing if state.is_adapter(path) and path not in chosen]
    if idle:
        raise UserError(
            f"config.optimizer.learning_rates.{labels[idle[0]]}: {idle[0]} begins anew and would "
            "stay so, as its group is frozen"
        )
    flat = {**loaded, **state.fresh(plan, missing, config.seed)}
    rates = config.optimizer.learning_rates
    columns = {
        "group": labels,
        "learning rate": {
            path: f"{rates[group]:g}" if rates[group] else "frozen"
            for path, group in labels.items()
        },
        "starts from": {path: "fresh" if path in missing else start for path in plan.shapes},
    }
    print(tree.describe(plan.shapes, columns), flush=True)
    trained, frozen = tree.split({path: flat[path] for path in plan.shapes}, chosen.__contains__)
    return state.place(plan, trained, jnp.float32), state.place(plan, frozen, kept)


def check_start(plan: state.Plan, theirs: WingsArch, saved: Mapping[str, Any], start: str) -> None:
    """Tells what of a checkpoint is not gone on with.

    Raises:
      UserError: it is of another LLM or tower, in a value that no shape shows, or what it learned
        lies in adapters that the config does not have.
    """
    mine = plan.model.arch
    for part in ("decoder", "vision"):
        values = (config_lib.plain(getattr(arch, part)) for arch in (theirs, mine))
        old, new = (dict(config_lib.leaves(value)) for value in values)
        for key in sorted((old.keys() | new.keys()) - {"max_positions"}):
            if not _same(old.get(key), new.get(key)):
                name = "llm" if part == "decoder" else "vision"
                raise UserError(
                    f"{start}: its {part} has {key} {old.get(key)}, that of config.model.{name} "
                    f"{new.get(key)}"
                )
    left = sorted(saved.keys() - plan.shapes.keys())
    adapters = [path for path in left if state.is_adapter(path)]
    if adapters:
        raise UserError(
            f"{start}: {adapters[0]} is not in the config's model and would be lost: go on with "
            "the same LoRA or prefix, or merge LoRA with python -m wings_jax.convert"
        )
    if left:
        print(f"not gone on with, of {start}: {tree.some(left)}", flush=True)
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
    if text is not None and checkpoint.newest(workdir) is not None:
        old = config_lib.build(config_lib.Config, json.loads(text), str(note))
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
        passing = workdir / "config.json.tmp"
        passing.write_text(json.dumps(config_lib.plain(config), indent=2) + "\n")
        passing.replace(workdir / "config.json")
    except OSError as error:
        raise UserError(f"--workdir: cannot write to {workdir}: {error.strerror}") from error


def resume(
    writer: checkpoint.Writer, first: step.TrainState, workdir: pathlib.Path
) -> step.TrainState:
    """Returns the newest state in the workdir; `first` if there is none."""
    found = checkpoint.newest(workdir)
    if found is None:
        return first
    resumed = writer.restore(first, int(found.name))
    logging.info("resumed %s", found)
    print(f"going on after step {found.name} of {workdir}", flush=True)
    return resumed
