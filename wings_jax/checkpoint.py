"""Checkpoints that describe themselves: DIR/checkpoints/STEP/{params,opt_state,meta,tokenizer}.

`meta` holds config, architecture and step; `tokenizer` the tokenizer's files as text. A tool that
is given a workdir takes its newest step. Orbax writes them in the background under a passing
name, so a directory that can be seen is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
import transformers

from wings_jax import config as config_lib
from wings_jax import tree
from wings_jax.errors import UserError
from wings_jax.model import layers, parameters, presets

FOLDER = "checkpoints"
ITEMS = ("params", "opt_state", "meta", "tokenizer")
FOREIGN = (".safetensors", ".bin", ".pth", ".gguf")  # weights that have to be imported first


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a tool reads from a checkpoint.

    params      nested dicts of arrays, in the dtypes they were saved in unless asked otherwise
    tokenizer   a transformers tokenizer
    directory   DIR/checkpoints/STEP, and `step`
    """

    config: config_lib.Config
    arch: presets.WingsArch
    params: dict[str, Any]
    tokenizer: Any
    directory: pathlib.Path
    step: int


class CheckpointWriter:
    """Saves a run's states into its workdir, in the background, and keeps the last few."""

    def __init__(
        self,
        workdir: str | pathlib.Path,
        config: config_lib.Config,
        arch: presets.WingsArch,
        tokenizer_files: Mapping[str, str],
    ):
        self._meta = {"config": config_lib.to_dict(config), "arch": config_lib.to_dict(arch)}
        self._tokenizer = dict(tokenizer_files)
        self._manager = ocp.CheckpointManager(
            pathlib.Path(workdir).absolute() / FOLDER,
            options=ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=True),
            item_names=ITEMS,
        )

    def save(self, step: int, params: Mapping[str, jax.Array], opt_state: Any) -> None:
        """Starts to save flat parameters and an optimizer state; returns once they are copied.

        Raises:
          UserError: this save, or the one before it, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        arguments = ocp.args.Composite(
            params=ocp.args.PyTreeSave(tree.nest(params)),
            opt_state=ocp.args.PyTreeSave(opt_state),
            meta=ocp.args.JsonSave({**self._meta, "step": step}),
            tokenizer=ocp.args.JsonSave(self._tokenizer),
        )
        with self._writing():
            self._manager.save(step, args=arguments)

    def restore(
        self, step: int, params: Mapping[str, jax.Array], opt_state: Any
    ) -> tuple[dict[str, jax.Array], Any]:
        """Returns the flat parameters and optimizer state saved at `step`.

        They get the shapes, dtypes and shardings of the given ones, on any mesh.
        """
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=_restore_args(tree.nest(params)), opt_state=_restore_args(opt_state)
            ),
        )
        return tree.flatten(found["params"]), found["opt_state"]

    def close(self) -> None:
        """Waits until everything is written. Raises UserError if something cannot be."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes. If an error is on its way, that one is told, not what cannot be written."""
        try:
            self.close()
        except UserError:
            if kind is None or not issubclass(kind, Exception):  # a stop is no error
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes a UserError of a full disk and the like; orbax has several names for it."""
        try:
            yield
        except (OSError, ValueError) as error:
            (reason, *_) = str(error).splitlines() or [type(error).__name__]
            raise UserError(
                f"--workdir: {self._manager.directory}: cannot be written: {reason[:300]}"
            ) from error


def _restore_args(target: Any, *, partial: bool = False) -> ocp.args.PyTreeRestore:
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
    )
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=partial)


@contextlib.contextmanager
def _reader(handler: Any) -> Iterator[ocp.Checkpointer]:
    """Opens one item by itself, which orbax warns of: a manager keeps its metadata a level up."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ocp.Checkpointer(handler) as reader:
            yield reader
    finally:
        logger.setLevel(level)


def newest_step(directory: str | pathlib.Path) -> pathlib.Path | None:
    """Returns the newest whole step below a workdir, or `directory` itself if it is a step."""
    path = pathlib.Path(directory).absolute()
    if (path / "params").is_dir() and (path / "meta").is_dir():
        return path
    steps = [p for p in (path / FOLDER).glob("*") if p.name.isdigit() and (p / "meta").is_dir()]
    return max(steps, key=lambda p: int(p.name), default=None)


def find_step(directory: str | pathlib.Path, *, flag: str) -> pathlib.Path:
    """Returns `newest(directory)`. Raises UserError naming `flag` when there is none."""
    found = newest_step(directory)
    if found is None:
        path = pathlib.Path(directory)
        files = [path] if path.is_file() else list(path.glob("*")) if path.is_dir() else []
        is_foreign = any(file.suffix in FOREIGN for file in files)
        hint = " of ours; import it first: python -m wings_jax.convert" if is_foreign else ""
        raise UserError(f"{flag}: {directory} holds no checkpoint{hint}")
    return found


@functools.cache
def read_meta(step: pathlib.Path) -> tuple[config_lib.Config, presets.WingsArch, int]:
    """Returns config, architecture and step number of one step's directory."""
    with _reader(ocp.JsonCheckpointHandler()) as reader:
        meta = reader.restore(step / "meta")
    config = config_lib.from_dict(config_lib.Config, meta["config"], f"{step}: config")
    arch = config_lib.from_dict(presets.WingsArch, meta["arch"], f"{step}: arch")
    return config, arch, meta["step"]


def read_tokenizer_files(step: pathlib.Path) -> dict[str, str]:
    """Returns file name -> content."""
    with _reader(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(step / "tokenizer")


def read_shapes(step: pathlib.Path) -> dict[str, Any]:
    """Returns the flat tree of saved arrays' metadata (shape, dtype), nothing loaded."""
    with _reader(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.metadata(step / "params")
    return tree.flatten(found.item_metadata.tree)


def read_params(
    step: pathlib.Path, targets: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> dict[str, jax.Array]:
    """Returns flat parameters of one step.

    `targets` (flat: shape, dtype, sharding) selects and places; without, all of them come onto
    the first device in the dtype they were saved in.
    """
    if targets is None:
        targets = {
            path: jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=_first_device())
            for path, meta in read_shapes(step).items()
        }
    nested = tree.nest(targets)
    arguments = ocp.checkpoint_utils.construct_restore_args(nested)
    restore = ocp.args.PyTreeRestore(nested, restore_args=arguments, partial_restore=True)
    with _reader(ocp.PyTreeCheckpointHandler()) as reader:
        return tree.flatten(reader.restore(step / "params", args=restore))


def open_tokenizer(files: Mapping[str, str]) -> Any:
    """Returns the transformers tokenizer that these files (name -> content) describe."""
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            (pathlib.Path(directory) / name).write_text(content, encoding="utf-8")
        return transformers.AutoTokenizer.from_pretrained(directory)


def load(
    directory: str | pathlib.Path,
    *,
    flag: str = "--checkpoint",
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Checkpoint:
    """Returns a checkpoint ready for use on the first device; matrices in `dtype` if given.

    With a mesh every parameter is read straight to where training would keep it.

    Raises:
      UserError: there is no checkpoint at `directory`; the message names `flag`.
      MeshError: the mesh does not divide the model.
    """
    step = find_step(directory, flag=flag)
    config, arch, number = read_meta(step)
    flat = read_params(step, _targets(step, arch, dtype, mesh))
    tokenizer = open_tokenizer(read_tokenizer_files(step))
    return Checkpoint(config, arch, tree.nest(flat), tokenizer, step, number)


def _targets(
    step: pathlib.Path, arch: presets.WingsArch, dtype: Any, mesh: jax.sharding.Mesh | None
) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = read_shapes(step)
    if mesh is None:
        shardings = dict.fromkeys(shapes, _first_device())
    else:
        parameters.check_mesh(arch, mesh, flag="--mesh")
        abstract = parameters.abstract_params(arch, mesh=mesh)
        shardings = {path: leaf.sharding for path, leaf in abstract.items()}
    return {
        path: jax.ShapeDtypeStruct(
            meta.shape,
            dtype if dtype and layers.is_matrix(path) else meta.dtype,
            sharding=shardings[path],
        )
        for path, meta in shapes.items()
    }


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def write_checkpoint(
    workdir: str | pathlib.Path,
    params: Mapping[str, Any],
    config: config_lib.Config,
    arch: presets.WingsArch,
    tokenizer_files: Mapping[str, str],
    *,
    hf_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes flat parameters alone as step 0 of a workdir, as an import makes them.

    jax arrays are written as they are; of numpy arrays orbax makes a copy first.

    `hf_config` is the `config.json` that the weights came with; an export gives it back.
    """
    meta = {
        "config": config_lib.to_dict(config),
        "arch": config_lib.to_dict(arch),
        "step": 0,
        "hf_config": dict(hf_config or {}),
    }
    # Few arrays at a time, and none copied first: the peak stays near the parameters themselves.
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(save_concurrent_gb=1),
        "meta": ocp.JsonCheckpointHandler(),
        "tokenizer": ocp.JsonCheckpointHandler(),
    }
    path = pathlib.Path(workdir).absolute() / FOLDER
    with ocp.CheckpointManager(path, options=options, item_handlers=handlers) as saver:
        saver.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(tree.nest(params)),
                meta=ocp.args.JsonSave(meta),
                tokenizer=ocp.args.JsonSave(dict(tokenizer_files)),
            ),
        )


def read_hf_config(step: pathlib.Path) -> dict[str, Any]:
    """Returns the `config.json` that imported weights came with, {} where they did not."""
    with _reader(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(step / "meta").get("hf_config", {})
