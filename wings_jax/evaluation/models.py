"""The models of an evaluation: checkpoints by name, and their bases before any training."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from wings_jax import axes, checkpoint, errors, tree
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.inference.generator import Generator
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model import layers, parameters
from wings_jax.weights import adapter, starting

IMPORT_STAGE = "import"  # of the config that `python -m wings_jax.convert import` writes
MEMORY_ADVICE = "lower --batch-size, use --dtype bfloat16, or share the model with --mesh"


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How the models of a command are loaded."""

    # Dtype of matrices ("float32", "bfloat16"), None for the one they were saved in.
    dtype: str | None = None
    # Devices that share each model, None for the first device alone.
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class LazyModel:
    """A model that is loaded only when `open` is called."""

    # Name in tables and in the names of files.
    name: str
    # Directory or description, for people.
    origin: str
    # Optimizer steps of its last stage, None for a base.
    step: int | None
    # Config of its last stage.
    config: config_lib.Config
    # Loads and returns the model.
    open: Callable[[], checkpoint.Checkpoint]
    # How it is loaded.
    loading: LoadOptions = LoadOptions()

    @property
    def scenes(self) -> str:
        """Returns the directory of the embedded data set in its config, "" for none."""
        return self.config.data.scenes


def open_generator(
    model: LazyModel, *, rows: int, sampling: SamplingParams | None = None
) -> Generator:
    """Returns the generator of a model, on the devices that it is loaded on.

    Raises:
      UserError: the model cannot be loaded, or does not fit the memory.
    """
    loading = model.loading
    with errors.full_memory(MEMORY_ADVICE):
        return Generator.from_checkpoint(
            model.open(),
            rows=rows,
            sampling=sampling,
            dtype=loading.dtype,
            mesh=loading.mesh,
            release=True,
        )


def parse_model(
    text: str, *, flag: str = "--checkpoint", loading: LoadOptions = LoadOptions()
) -> LazyModel:
    """Returns the model of `[NAME=]DIR`; the default name is the workdir's.

    Raises:
      UserError: there is no checkpoint, or the name cannot be part of a file's name.
    """
    name, _, directory = text.rpartition("=")
    return _rename(_read_model(directory, flag, loading), name, flag)


def _rename(model: LazyModel, name: str, flag: str) -> LazyModel:
    """Returns the model under another name, or as it is for ''. Raises UserError naming `flag`."""
    if not name:
        return model
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UserError(f"{flag}: the name {name!r} has other characters than letters, digits, -_.")
    return dataclasses.replace(model, name=name)


def adapted_model(text: str, base: LazyModel, *, flag: str = "--adapter") -> LazyModel:
    """Returns the model of an adapter `[NAME=]FILE` on a base; the default name is the file's.

    Raises:
      UserError: the file is not an adapter. Whether it belongs to the base is known when both are
        loaded.
    """
    name, _, file = text.rpartition("=")
    opened = adapter.open_adapter(file, flag=flag)
    loading = base.loading

    def load() -> checkpoint.Checkpoint:
        return adapter.load_adapted(
            base.origin, file, adapter_flag=flag, dtype=loading.dtype, mesh=loading.mesh
        )

    origin = f"{base.origin} + {file}"
    model = LazyModel(opened.file.stem, origin, opened.step, opened.config, load, loading)
    return _rename(model, name, flag)


def _read_model(directory: str, flag: str, loading: LoadOptions) -> LazyModel:
    """Returns the model of a directory, named after its workdir. Raises UserError."""
    step_directory = checkpoint.find_step(directory, flag=flag)
    config, _, step = checkpoint.read_meta(step_directory)

    # A step directory is named by a number: take the name of its workdir.
    is_inside = step_directory.parent.name == checkpoint.SUBDIRECTORY
    workdir = step_directory.parent.parent if is_inside else step_directory

    def load() -> checkpoint.Checkpoint:
        return checkpoint.load(directory, flag=flag, dtype=loading.dtype, mesh=loading.mesh)

    return LazyModel(workdir.name, directory, step, config, load, loading)


def find_models(
    checkpoints: Sequence[str],
    *,
    with_base: bool,
    base: str | None = None,
    adapters: Sequence[str] = (),
    loading: LoadOptions = LoadOptions(),
) -> list[LazyModel]:
    """Returns the models of `[NAME=]DIR`s in their order; `with_base` puts a base in front.

    The base is that of the first model, or the `[NAME=]DIR` in `base`. With `adapters`, each
    `[NAME=]FILE` on the one checkpoint is a model, and the checkpoint alone is none.

    Raises:
      UserError: as `parse_model` and `base_model`, two have the same name, or there are adapters
        for several checkpoints.
    """
    models = [parse_model(text, loading=loading) for text in checkpoints]
    if adapters and len(models) > 1:
        raise UserError(f"--adapter: goes with one --checkpoint, there are {len(models)}")

    first = models[0]
    # With adapters, the checkpoint is their base and is not evaluated itself.
    if adapters:
        models = [adapted_model(text, first) for text in adapters]

    # The base is the first column of every table.
    if base:
        models.insert(0, parse_model(base, flag="--base", loading=loading))
    elif with_base:
        models.insert(0, base_model(first))

    # Names are headings of columns and parts of file names.
    names = [model.name for model in models]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"--checkpoint: two models have the name {repeated[0]!r}; add NAME=DIR")
    return models


def base_model(model: LazyModel) -> LazyModel:
    """Returns the model before any training.

    It is at the end of the chain of `init_from`: a checkpoint that was imported, or else the LLM
    and the tower that the first config names, without learners. A missing projector is newly
    initialized: image and text were never trained together.

    Raises:
      UserError: the chain ends at a preset, which has no weights.
    """
    first = _follow_chain(model)
    if first.config.stage == IMPORT_STAGE:
        origin = f"{first.origin}, as it was imported"
        return dataclasses.replace(
            first, name="base", origin=origin, step=None, open=lambda: _open_imported(first)
        )

    # No adapters of any kind. The rest, such as the template, is that of the model itself.
    no_wings: dict[str, Any] = {"learners": (), "router": False, "lora_rank": 0, "prefix_length": 0}
    parts = dataclasses.replace(first.config.model, **no_wings)
    _check_parts(model, first, parts)
    config = dataclasses.replace(model.config, model=parts)
    origin = f"{parts.llm} + {parts.vision}, before any training"

    def open_parts() -> checkpoint.Checkpoint:
        return _open_parts(config, model.loading)

    return LazyModel("base", origin, None, config, open_parts, model.loading)


def _follow_chain(model: LazyModel) -> LazyModel:
    """Returns the first stage of a model: the last one of the chain that can be read."""
    # A workdir that was started from itself would be followed forever.
    visited = {model.origin}
    while model.config.stage != IMPORT_STAGE and model.config.init_from:
        before = model.config.init_from
        if before in visited or checkpoint.newest_step(before) is None:
            break
        visited.add(before)
        model = _read_model(before, "--base", model.loading)
    return model


def _check_parts(model: LazyModel, first: LazyModel, parts: config_lib.ModelConfig) -> None:
    """Raises UserError, naming `model`, where the LLM or the tower has no weights."""
    for half, name in (("llm", parts.llm), ("vision", parts.vision)):
        try:
            has_weights = starting.base_directory(name, half) is not None
            reason = f"its model.{half}, {name}, is a preset without weights"
        except UserError as error:
            has_weights, reason = False, str(error)
        if has_weights:
            continue

        if first.config.init_from:
            reason = f"its init_from, {first.config.init_from}, has no checkpoint"
        raise UserError(f"--base: the base of {model.origin}: {reason}; give --base DIR")


def _open_imported(model: LazyModel) -> checkpoint.Checkpoint:
    """Returns an imported checkpoint, with a new projector where it has a tower but none."""
    opened = model.open()
    flat = tree.flatten(opened.params)
    # An LLM alone answers text only; a projector would be of no use.
    if "vision" not in opened.params:
        return opened

    # Only the projector may be missing: its parameters are newly initialized.
    abstract = parameters.abstract_params(opened.arch, mesh=model.loading.mesh or _first_device())
    missing = [path for path in abstract if path.startswith("projector/") and path not in flat]
    new = parameters.initialize_params(opened.arch, missing, abstract, opened.config.seed)
    return dataclasses.replace(opened, params=tree.nest({**flat, **new}))


def _open_parts(config: config_lib.Config, loading: LoadOptions) -> checkpoint.Checkpoint:
    """Returns the LLM and the tower that `config.model` names, in one checkpoint.

    Raises:
      UserError: they are not directories of models, or are incomplete.
    """
    arch = starting.resolve_arch(config.model)
    mesh = loading.mesh or _first_device()
    abstract = parameters.abstract_params(arch, mesh=mesh)

    # Matrices have the dtype of the flag, other parameters float32.
    def dtype_of(path: str) -> str:
        return loading.dtype if loading.dtype and layers.is_matrix(path) else "float32"

    loaded = starting.load_base(arch, config.model, mesh=mesh, dtype=dtype_of)

    # The projector is in neither: it is newly initialized.
    missing = starting.check_sources(abstract, loaded, "--base: config.model")
    new = parameters.initialize_params(arch, missing, abstract, config.seed)
    flat = {**loaded, **{path: leaf.astype(dtype_of(path)) for path, leaf in new.items()}}

    tokenizer_files = starting.tokenizer_files(config, None)
    return checkpoint.Checkpoint(
        config=config,
        arch=arch,
        params=tree.nest({path: flat[path] for path in abstract}),
        tokenizer=checkpoint.open_tokenizer(tokenizer_files),
        directory=pathlib.Path(config.model.llm),
        step=0,
        eos_ids=checkpoint.read_eos_ids(tokenizer_files, config.model.llm),
    )


def _first_device() -> Mesh:
    return axes.make_mesh({"data": 1}, jax.local_devices()[:1])
