"""The models of an evaluation: checkpoints by name, and their bases before any training."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from wings_jax import axes, checkpoint, tree
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import parameters
from wings_jax.weights import starting


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

    @property
    def scenes(self) -> str:
        """Returns the directory of the embedded data set in its config, "" for none."""
        return self.config.data.scenes


def parse_model(text: str, *, flag: str = "--checkpoint") -> LazyModel:
    """Returns the model of `[NAME=]DIR`; the default name is the workdir's.

    Raises:
      UserError: there is no checkpoint, or the name cannot be part of a file's name.
    """
    name, _, directory = text.rpartition("=")
    step_directory = checkpoint.find_step(directory, flag=flag)
    config, _, step = checkpoint.read_meta(step_directory)

    # A step directory is named by a number: take the name of its workdir.
    name = name or _workdir(step_directory).name
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UserError(f"{flag}: the name {name!r} has other characters than letters, digits, -_.")
    return LazyModel(name, directory, step, config, lambda: checkpoint.load(directory))


def find_models(
    checkpoints: Sequence[str], *, with_base: bool, base: str | None = None
) -> list[LazyModel]:
    """Returns the models of `[NAME=]DIR`s in their order; `with_base` puts a base in front.

    The base is that of the first model, or the `[NAME=]DIR` in `base`.

    Raises:
      UserError: as `parse_model`, or two have the same name.
    """
    models = [parse_model(text) for text in checkpoints]
    if with_base:
        models.insert(0, parse_model(base, flag="--base") if base else base_model(models[0]))

    names = [model.name for model in models]
    # Names are headings of columns and parts of file names.
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"--checkpoint: two models have the name {repeated[0]!r}; add NAME=DIR")
    return models


def _workdir(step_directory: pathlib.Path) -> pathlib.Path:
    is_inside = step_directory.parent.name == checkpoint.SUBDIRECTORY
    return step_directory.parent.parent if is_inside else step_directory


def base_model(model: LazyModel) -> LazyModel:
    """Returns the LLM and the tower that a checkpoint's config started from, as one model.

    It has no learners, and a newly initialized projector: image and text were never trained
    together.
    """
    # The base is the bare LLM: no adapters of any kind.
    no_wings = {"learners": (), "router": False, "lora_rank": 0, "prefix_length": 0}
    parts = dataclasses.replace(model.config.model, **no_wings)
    origin = f"{parts.llm} + {parts.vision}, before any training"
    config = dataclasses.replace(model.config, model=parts)
    return LazyModel("base", origin, None, config, lambda: _open_base(config))


def _open_base(config: config_lib.Config) -> checkpoint.Checkpoint:
    """Returns the LLM and the tower that `config.model` names, in one checkpoint.

    Raises:
      UserError: they are not directories of models, or are incomplete.
    """
    arch = starting.resolve_arch(config.model)
    mesh = axes.make_mesh({"data": -1})
    abstract = parameters.abstract_params(arch, mesh=mesh)
    dtype = parameters.default_dtype()
    loaded = starting.load_base(arch, config.model, mesh=mesh, dtype=dtype)

    # The projector is in neither: it is newly initialized.
    missing = starting.check_sources(abstract, loaded, "--base: config.model")
    initialized = parameters.initialize_params(arch, missing, abstract, config.seed)
    flat_params = {**loaded, **initialized}

    tokenizer_files = starting.tokenizer_files(config, None)
    return checkpoint.Checkpoint(
        config=config,
        arch=arch,
        params=tree.nest({path: flat_params[path] for path in abstract}),
        tokenizer=checkpoint.open_tokenizer(tokenizer_files),
        directory=pathlib.Path(config.model.llm),
        step=0,
    )
