"""Checkpoints that describe themselves: WORKDIR/checkpoints/STEP/{params,opt_state,meta,tokenizer}.

    params      flat parameters, nested: 4 bytes per trained, 2 per frozen one on an accelerator
    opt_state   for resuming: counters and AdamW's two moments, 8 bytes per trained parameter
    meta        JSON: config, architecture, step, checksums, the `config.json` of imported weights
    tokenizer   JSON: name -> text of the tokenizer's files

A 7B stage-2 checkpoint is therefore 16 bytes a parameter and a frozen one 2. An import writes no
`opt_state`. Orbax writes a step in the background under a temporary name and renames it when it is
complete. Steps are found by `checkpoint_steps.py`; `checkpoint_items.py` reads the JSON of one.
What is loaded is compared with the checksums (`checksums.py`), so that a damaged file is an error.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from wings_jax import checkpoint_items, checksums, files, serialization, tree
from wings_jax import config as config_lib
from wings_jax.checkpoint_items import read_hf_config as read_hf_config
from wings_jax.checkpoint_items import read_meta as read_meta
from wings_jax.checkpoint_items import read_sources as read_sources
from wings_jax.checkpoint_items import read_tokenizer_files as read_tokenizer_files
from wings_jax.checkpoint_steps import SUBDIRECTORY as SUBDIRECTORY
from wings_jax.checkpoint_steps import DamagedCheckpointError as DamagedCheckpointError
from wings_jax.checkpoint_steps import ReadErrors as ReadErrors
from wings_jax.checkpoint_steps import check_complete as check_complete
from wings_jax.checkpoint_steps import find_step as find_step
from wings_jax.checkpoint_steps import list_steps as list_steps
from wings_jax.checkpoint_steps import newest_step as newest_step
from wings_jax.errors import UserError
from wings_jax.model import layers, parameters, presets

ITEMS = ("params", "opt_state", "meta", "tokenizer")
MIN_BYTES_IN_FLIGHT = 250_000_000  # that `write_checkpoint` lets orbax write at a time


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
    eos_ids: tuple[int, ...] = ()
    """The end-of-text ids of `generation_config.json`, beside the tokenizer's own."""


def verify_arrays(step: pathlib.Path, item: str, arrays: Mapping[str, Any]) -> None:
    """Raises DamagedCheckpointError where arrays differ from the checksums of a step.

    Checkpoints of version 0.1.0 have none.
    """
    saved = checkpoint_items.read_checksums(step).get(item, {})
    damaged = checksums.find_damaged(arrays, saved)
    if damaged:
        raise DamagedCheckpointError(step, f"{damaged[0]} differs from its checksum")


def verify_step(step: pathlib.Path) -> int:
    """Reads all that a step holds and compares it with the checksums.

    Returns:
      How many arrays have a checksum; 0 for a checkpoint of version 0.1.0.

    Raises:
      DamagedCheckpointError: something cannot be read, or differs.
    """
    check_complete(step)
    read_tokenizer_files(step)
    params = read_params(step)

    # An import has no opt_state, and version 0.1.0 wrote no checksums.
    saved = checkpoint_items.read_checksums(step)
    if not (step / "opt_state").is_dir():
        return len(saved.get("params", {}))

    # As host arrays: this machine may not have the devices that it was written from.
    del params
    with ReadErrors(step), checkpoint_items.open_reader(ocp.PyTreeCheckpointHandler()) as reader:
        saved_tree = _read_structure(reader, step, "opt_state")
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved_tree)
        restore = ocp.args.PyTreeRestore(restore_args=on_host)
        opt_state = reader.restore(step / "opt_state", args=restore)
    verify_arrays(step, "opt_state", flatten_state(opt_state))
    return len(saved.get("params", {})) + len(saved.get("opt_state", {}))


def flatten_state(opt_state: Any) -> dict[str, jax.Array]:
    """Returns the arrays of an optimizer state by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def read_shapes(step: pathlib.Path) -> dict[str, Any]:
    """Returns the flat tree of saved arrays' metadata (shape, dtype); nothing is loaded."""
    with ReadErrors(step), checkpoint_items.open_reader(ocp.PyTreeCheckpointHandler()) as reader:
        return tree.flatten(_read_structure(reader, step, "params"))


def _read_structure(reader: ocp.Checkpointer, step: pathlib.Path, item: str) -> Any:
    """Returns the tree of an item's metadata. Raises DamagedCheckpointError without one."""
    # Of most damages orbax logs a warning only.
    metadata = reader.metadata(step / item)
    if metadata is None or metadata.item_metadata is None:
        raise DamagedCheckpointError(step, f"{item}: the names of its arrays cannot be read")
    return metadata.item_metadata.tree


def read_params(
    step: pathlib.Path,
    targets: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    *,
    verify: bool = True,
) -> dict[str, jax.Array]:
    """Returns flat parameters of one step.

    Args:
      targets: flat shapes, dtypes and shardings of the parameters to load; without, all of them
        are loaded to the first device in the dtype they were saved in.
      verify: whether to compare them with the checksums of the step.

    Raises:
      DamagedCheckpointError: they cannot be read, or differ from their checksums.
    """
    if targets is None:
        targets = {
            path: jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=_first_device())
            for path, meta in read_shapes(step).items()
        }

    # Arrays of the step that are not among the targets are not read.
    nested = tree.nest(targets)
    arguments = ocp.checkpoint_utils.construct_restore_args(nested)
    restore = ocp.args.PyTreeRestore(nested, restore_args=arguments, partial_restore=True)
    with ReadErrors(step), checkpoint_items.open_reader(ocp.PyTreeCheckpointHandler()) as reader:
        flat = tree.flatten(reader.restore(step / "params", args=restore))

    if verify:
        verify_arrays(step, "params", flat)
    return flat


def read_eos_ids(files: Mapping[str, str], where: str) -> tuple[int, ...]:
    """Returns the end-of-text ids of `generation_config.json`, () without it.

    >>> read_eos_ids({"generation_config.json": '{"eos_token_id": [151645, 151643]}'}, "DIR")
    (151645, 151643)

    Raises:
      UserError: the file is malformed; the message begins with `where`.
    """
    where = f"{where}: generation_config.json"
    try:
        content = json.loads(files.get("generation_config.json", "{}"))
    except ValueError as error:
        raise UserError(f"{where}: malformed JSON: {error}") from error

    if not isinstance(content, dict):
        raise UserError(f"{where}: is not an object")

    # It is one id or a list of them; some models have no such entry.
    ids = content.get("eos_token_id")
    if ids is None:
        return ()

    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(number) is int for number in ids):
        raise UserError(f"{where}: eos_token_id is {ids!r}, not an id or a list of ids")
    return tuple(ids)


def open_tokenizer(files: Mapping[str, str]) -> Any:
    """Returns the transformers tokenizer of these files (name -> content)."""
    import transformers  # takes 2 seconds, so only where it is needed

    # transformers opens a directory of files, not their texts.
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
    verify: bool = True,
    is_read: Callable[[str], bool] = lambda path: True,
) -> Checkpoint:
    """Returns a checkpoint ready for use on the first device; matrices in `dtype` if given.

    With a mesh every parameter is read directly to its sharding on it. Without `verify`, checksums
    are not computed. Parameters for whose path `is_read` is false are left out.

    Raises:
      UserError: there is no checkpoint at `directory`; the message names `flag`.
      DamagedCheckpointError: it cannot be read, or differs from its checksums.
      MeshError: the mesh does not divide the model.
    """
    step = find_step(directory, flag=flag)
    config, arch, number = read_meta(step)
    targets = _targets(step, arch, dtype, mesh)
    chosen = {path: struct for path, struct in targets.items() if is_read(path)}
    flat = read_params(step, chosen, verify=verify)

    tokenizer_files = read_tokenizer_files(step)
    tokenizer = open_tokenizer(tokenizer_files)
    eos_ids = read_eos_ids(tokenizer_files, str(step))
    return Checkpoint(config, arch, tree.nest(flat), tokenizer, step, number, eos_ids)


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

    # Norm scales, biases and routers keep the dtype they were saved in.
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
    sources: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes flat parameters alone as step 0 of a workdir, as an import does.

    jax arrays are written as they are; of numpy arrays orbax makes a copy first.

    Args:
      hf_config: the `config.json` that the weights came with; an export writes it again.
      sources: name and license of each model that they came from, for model cards.
    """
    meta = {
        "config": serialization.to_dict(config),
        "arch": serialization.to_dict(arch),
        "step": 0,
        "checksums": {"params": checksums.checksum_arrays(params)},
        "hf_config": dict(hf_config or {}),
        "sources": list(sources),
    }

    # Few arrays at a time, and none copied first: the peak stays near the parameters themselves.
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(save_concurrent_gb=_bytes_in_flight(params) / 1e9),
        "meta": ocp.JsonCheckpointHandler(),
        "tokenizer": ocp.JsonCheckpointHandler(),
    }
    arguments = ocp.args.Composite(
        params=ocp.args.PyTreeSave(tree.nest(params)),
        meta=ocp.args.JsonSave(checkpoint_items.sign_meta(meta, tokenizer_files)),
        tokenizer=ocp.args.JsonSave(dict(tokenizer_files)),
    )

    path = files.absolute_path(workdir) / SUBDIRECTORY
    with ocp.CheckpointManager(path, options=options, item_handlers=handlers) as manager:
        manager.save(0, args=arguments)


def _bytes_in_flight(params: Mapping[str, Any]) -> int:
    """Returns how many bytes of arrays orbax may write at a time.

    Its copies of them are most of what a write needs beside the arrays. Orbax refuses an array that
    is not smaller than the limit.
    """
    return max([MIN_BYTES_IN_FLIGHT, *(array.nbytes + 1024 for array in params.values())])
