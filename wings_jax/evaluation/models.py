"""Which models are asked: checkpoints by name, and what they were before their first stage."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from wings_jax import axes, checkpoint, tree
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import parameters
from wings_jax.weights import starting


@dataclasses.dataclass(frozen=True)
class LazyModel:
    """A model that has not been loaded yet.

    origin  where it comes from, for people
    step    optimizer steps of its stage, None for a base
    scenes  where its config keeps the embedded data set
    open    returns it as `checkpoint.load` does
    """

    name: str
    origin: str
    step: int | None
    config: config_lib.Config
    open: Callable[[], Any]

    @property
    def scenes(self) -> str:
        """Returns where its config keeps the embedded data set, "" for nowhere."""
        return self.config.data.scenes


def parse_names(text: str, *, flag: str = "--checkpoint") -> LazyModel:
    """Returns the model of `[NAME=]DIR`; without a name it is the workdir's.

    Raises:
      UserError: there is no checkpoint, or the name cannot be part of a file's name.
    """
    name, _, directory = text.rpartition("=")
    path = checkpoint.find_step(directory, flag=flag)
    config, _, step = checkpoint.read_meta(path)
    name = name or _workdir(path).name
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UserError(f"{flag}: {name!r} is no name; take letters, digits and -_.")
    return LazyModel(name, directory, step, config, lambda: checkpoint.load(directory))


def find_models(
    checkpoints: Sequence[str], *, with_base: bool, base: str | None = None
) -> list[LazyModel]:
    """Returns the models of `[NAME=]DIR`s in their order, with a base in front if asked.

    The base is that of the first model, or `base`, a `[NAME=]DIR` of its own.

    Raises:
      UserError: as `parse`, or two have the same name.
    """
    found = [parse_names(text) for text in checkpoints]
    if with_base:
        found.insert(0, parse_names(base, flag="--base") if base else base_of(found[0]))
    names = [named.name for named in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--checkpoint: two are called {twice[0]!r}; name them as NAME=DIR")
    return found


def _workdir(step: pathlib.Path) -> pathlib.Path:
    is_inside = step.parent.name == checkpoint.SUBDIRECTORY
    return step.parent.parent if is_inside else step


def base_of(named: LazyModel) -> LazyModel:
    """Returns the LLM and tower that a checkpoint's config started from, as one model.

    It has no wings, and a fresh projector: it has never seen the two together.
    """
    added = {"learners": (), "router": False, "lora_rank": 0, "prefix_length": 0}
    model = dataclasses.replace(named.config.model, **added)
    origin = f"{model.llm} + {model.vision}, before any training"
    config = dataclasses.replace(named.config, model=model)
    return LazyModel("base", origin, None, config, lambda: _open_base(config))


def _open_base(config: config_lib.Config) -> checkpoint.Checkpoint:
    """Returns the parts that `config.model` names, put together.

    Raises:
      UserError: they are not folders, or lack something.
    """
    arch = starting.resolve_arch(config.model)
    abstract = parameters.abstract_params(arch, mesh=axes.make_mesh({"data": -1}))
    loaded = starting.load_base(arch, config.model)
    missing = starting.check_sources(abstract, loaded, "--base: config.model")
    flat = {**loaded, **parameters.initialize_params(arch, missing, abstract, config.seed)}
    files = starting.tokenizer_files(config, None)
    return checkpoint.Checkpoint(
        config=config,
        arch=arch,
        params=tree.nest({path: flat[path] for path in abstract}),
        tokenizer=checkpoint.open_tokenizer(files),
        directory=pathlib.Path(config.model.llm),
        step=0,
    )
