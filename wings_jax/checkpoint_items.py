"""The items of a checkpoint that are JSON: `meta` and the tokenizer's files.

`meta` holds the config, the architecture, the step number, the checksums of the arrays and digests
of itself and of the tokenizer's files, so that one changed bit of either is an error. Checkpoints
of version 0.1.0 have neither checksums nor digests.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from wings_jax import checksums, serialization
from wings_jax import config as config_lib
from wings_jax.checkpoint_steps import DamagedCheckpointError, ReadErrors
from wings_jax.model import presets


@contextlib.contextmanager
def open_reader(handler: Any) -> Iterator[ocp.Checkpointer]:
    """Opens one item by itself; orbax would warn that a manager's metadata is a level up.

    No process of a job waits for another one after reading, as that may have failed.
    """
    options = ocp.options.MultiprocessingOptions(None, {jax.process_index()})
    # orbax logs through absl.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=options) as reader:
            yield reader
    finally:
        logger.setLevel(level)


def sign_meta(meta: Mapping[str, Any], tokenizer_files: Mapping[str, str]) -> dict[str, Any]:
    """Returns `meta` with digests of itself and of the tokenizer's files, which readers compare."""
    digests = {"meta": meta, "tokenizer": tokenizer_files}
    return {**meta, "digests": {item: checksums.digest_json(x) for item, x in digests.items()}}


def _read_json(step: pathlib.Path, item: str) -> dict[str, Any]:
    with ReadErrors(step), open_reader(ocp.JsonCheckpointHandler()) as reader:
        content = reader.restore(step / item)
    if not isinstance(content, dict):
        raise DamagedCheckpointError(step, f"{item} is not an object")
    return content


def _read_meta_item(step: pathlib.Path) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Returns the meta of a step, and the digests; {} from version 0.1.0."""
    meta = _read_json(step, "meta")
    digests = meta.pop("digests", {})
    _check_digest(step, "meta", digests, meta)
    return meta, digests


def _check_digest(step: pathlib.Path, item: str, digests: Any, content: Any) -> None:
    """Raises DamagedCheckpointError if there are digests, and that of the item is another one."""
    if digests == {}:
        return
    if not isinstance(digests, dict) or digests.get(item) != checksums.digest_json(content):
        raise DamagedCheckpointError(step, f"{item} differs from its checksum")


@functools.cache
def read_meta(step: pathlib.Path) -> tuple[config_lib.Config, presets.WingsArch, int]:
    """Returns config, architecture and step number of one step's directory."""
    meta, _ = _read_meta_item(step)
    config = serialization.from_dict(config_lib.Config, meta["config"], f"{step}: config")
    arch = serialization.from_dict(presets.WingsArch, meta["arch"], f"{step}: arch")
    return config, arch, meta["step"]


def read_checksums(step: pathlib.Path) -> dict[str, dict[str, checksums.Checksums]]:
    """Returns item -> path of an array -> its checksums; {} for a checkpoint of version 0.1.0."""
    return _read_meta_item(step)[0].get("checksums", {})


def read_hf_config(step: pathlib.Path) -> dict[str, Any]:
    """Returns the `config.json` that imported weights came with; {} where there was none."""
    return _read_meta_item(step)[0].get("hf_config", {})


def read_sources(step: pathlib.Path) -> list[dict[str, Any]]:
    """Returns what an import recorded of each model that it read; [] for other checkpoints."""
    return _read_meta_item(step)[0].get("sources", [])


def read_tokenizer_files(step: pathlib.Path) -> dict[str, str]:
    """Returns file name -> content."""
    content = _read_json(step, "tokenizer")
    _check_digest(step, "tokenizer", _read_meta_item(step)[1], content)
    return content
