"""Checkpoints that describe themselves: WORKDIR/checkpoints/STEP/{params,opt_state,meta,tokenizer}.

    params      flat parameters, nested: 4 bytes per trained, 2 per frozen one on an accelerator
    opt_state   what resuming needs besides: counters and AdamW's two moments, 8 bytes per trained one
    meta        JSON: config, architecture, step, and the `config.json` of imported weights
    tokenizer   JSON: name -> text of the tokenizer's files

A 7B stage-2 checkpoint is therefore 16 bytes a parameter and a frozen one 2. An import writes no
`opt_state`. Orbax writes a step in the background under a temporary name and renames it when it is
complete. Wherever a checkpoint is asked for, a workdir means its newest step.
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

from wings_jax import config as config_lib
from wings_jax import tree
from wings_jax.errors import UserError
from wings_jax.model import layers, parameters, presets

SUBDIRECTORY = "checkpoints"
ITEMS = ("params", "opt_state", "meta", "tokenizer")
# Files that hold weights in other formats, which have to be imported first.
OTHER_FORMATS = (".safetensors", ".bin", ".pth", ".gguf")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a tool reads from a checkpoint."""

    config: config_lib.Config
    """The config of the run that wrote it."""
    arch: presets.WingsArch
    """The architecture of `params`."""
    params: dict[str, Any]
    """Nested dicts of arrays, in the dtypes they were saved in unless another is asked for."""
    tokenizer: Any
    """A transformers tokenizer."""
    directory: pathlib.Path
    """WORKDIR/checkpoints/STEP."""
    step: int
    """Optimizer steps done; 0 for an import."""


class CheckpointWriter:
    """Saves a run's states into its workdir, in the background, and deletes the oldest ones."""

    def __init__(
        self,
        workdir: str | pathlib.Path,
        config: config_lib.Config,
        arch: presets.WingsArch,
        tokenizer_files: Mapping[str, str],
        *,
        max_checkpoints: int,
    ):
        self._meta = {"config": config_lib.to_dict(config), "arch": config_lib.to_dict(arch)}
        self._tokenizer = dict(tokenizer_files)
        options = ocp.CheckpointManagerOptions(max_to_keep=max_checkpoints, create=True)
        self._manager = ocp.CheckpointManager(
            pathlib.Path(workdir).absolute() / SUBDIRECTORY, options=options, item_names=ITEMS
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
        items = ocp.args.Composite(
            params=_restore_args(tree.nest(params)), opt_state=_restore_args(opt_state)
        )
        restored = self._manager.restore(step, args=items)
        return tree.flatten(restored["params"]), restored["opt_state"]

    def close(self) -> None:
        """Waits until everything is written. Raises UserError if something cannot be."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes. An error of the block is raised rather than one of writing.

        After a stop (SystemExit, KeyboardInterrupt) an error of writing is raised: the caller
        relies on the saved state.
        """
        try:
            self.close()
        except UserError:
            if kind is None or not issubclass(kind, Exception):
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a full disk and the like into a UserError; orbax raises several types for it."""
        try:
            yield
        except (OSError, ValueError) as error:
            (reason, *_) = str(error).splitlines() or [type(error).__name__]
            raise UserError(
                f"--workdir: {self._manager.directory}: cannot be written: {reason[:300]}"
            ) from error


def _restore_args(target: Any) -> ocp.args.PyTreeRestore:
    """Returns what makes orbax restore a tree with the shapes and shardings of `target`."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
    )
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=arguments)


@contextlib.contextmanager
def _open_reader(handler: Any) -> Iterator[ocp.Checkpointer]:
    """Opens one item by itself; orbax would warn that a manager's metadata is a level up."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ocp.Checkpointer(handler) as reader:
            yield reader
    finally:
        logger.setLevel(level)


def newest_step(directory: str | pathlib.Path) -> pathlib.Path | None:
    """Returns the newest complete step of a workdir, or `directory` itself if it is a step."""
    path = pathlib.Path(directory).absolute()
    if (path / "params").is_dir() and (path / "meta").is_dir():
        return path
    entries = (path / SUBDIRECTORY).glob("*")
    steps = [entry for entry in entries if entry.name.isdigit() and (entry / "meta").is_dir()]
    return max(steps, key=lambda entry: int(entry.name), default=None)


def find_step(directory: str | pathlib.Path, *, flag: str) -> pathlib.Path:
    """Returns `newest_step(directory)`. Raises UserError naming `flag` when there is none."""
    step = newest_step(directory)
    if step is not None:
        return step

    path = pathlib.Path(directory)
    files = [path] if path.is_file() else list(path.glob("*")) if path.is_dir() else []
    hint = ""
    if any(file.suffix in OTHER_FORMATS for file in files):
        hint = " of wings_jax; import it first: python -m wings_jax.convert import"
    raise UserError(f"{flag}: {directory} does not hold a checkpoint{hint}")


def _read_json_item(directory: pathlib.Path) -> dict[str, Any]:
    with _open_reader(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(directory)


@functools.cache
def read_meta(step: pathlib.Path) -> tuple[config_lib.Config, presets.WingsArch, int]:
    """Returns config, architecture and step number of one step's directory."""
    meta = _read_json_item(step / "meta")
    config = config_lib.from_dict(config_lib.Config, meta["config"], f"{step}: config")
    arch = config_lib.from_dict(presets.WingsArch, meta["arch"], f"{step}: arch")
    return config, arch, meta["step"]


def read_hf_config(step: pathlib.Path) -> dict[str, Any]:
    """Returns the `config.json` that imported weights came with; {} where there was none."""
    return _read_json_item(step / "meta").get("hf_config", {})


def read_tokenizer_files(step: pathlib.Path) -> dict[str, str]:
    """Returns file name -> content."""
    return _read_json_item(step / "tokenizer")


def read_shapes(step: pathlib.Path) -> dict[str, Any]:
    """Returns the flat tree of saved arrays' metadata (shape, dtype); nothing is loaded."""
    with _open_reader(ocp.PyTreeCheckpointHandler()) as reader:
        metadata = reader.metadata(step / "params")
    return tree.flatten(metadata.item_metadata.tree)


def read_params(
    step: pathlib.Path, targets: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> dict[str, jax.Array]:
    """Returns flat parameters of one step.

    `targets` (flat: shape, dtype, sharding) selects and places them; without, all of them are
    loaded to the first device in the dtype they were saved in.
    """
    if targets is None:
        targets = {
            path: jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=_first_device())
            for path, meta in read_shapes(step).items()
        }

    nested = tree.nest(targets)
    arguments = ocp.checkpoint_utils.construct_restore_args(nested)
    restore = ocp.args.PyTreeRestore(nested, restore_args=arguments, partial_restore=True)
    with _open_reader(ocp.PyTreeCheckpointHandler()) as reader:
        return tree.flatten(reader.restore(step / "params", args=restore))


def open_tokenizer(files: Mapping[str, str]) -> Any:
    """Returns the transformers tokenizer of these files (name -> content)."""
    import transformers  # takes 2 seconds, so only where it is needed

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

    With a mesh every parameter is read directly to its sharding on it.

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
    """Returns shape, dtype and sharding of every saved parameter."""
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
    """Writes flat parameters alone as step 0 of a workdir, as an import does.

    jax arrays are written as they are; of numpy arrays orbax makes a copy first.

    Args:
      hf_config: the `config.json` that the weights came with; an export writes it again.
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
    arguments = ocp.args.Composite(
        params=ocp.args.PyTreeSave(tree.nest(params)),
        meta=ocp.args.JsonSave(meta),
        tokenizer=ocp.args.JsonSave(dict(tokenizer_files)),
    )
    path = pathlib.Path(workdir).absolute() / SUBDIRECTORY
    with ocp.CheckpointManager(path, options=options, item_handlers=handlers) as manager:
        manager.save(0, args=arguments)
