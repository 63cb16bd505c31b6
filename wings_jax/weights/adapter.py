"""Adapters: what training added to a frozen LLM and tower, in one safetensors file.

The file holds projector, learners, router, prefix and LoRA under the keys of the transformers
format. Its metadata has the config, the architecture, and the digests of every tensor of the LLM
and the tower that it was trained with: on others its numbers mean nothing, so they are refused.

    base = wings_jax.load("base_7b")                  # the LLM and the tower, once
    charts = base.with_adapter("charts.safetensors")  # shares their arrays
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from wings_jax import axes, checkpoint, serialization, tree
from wings_jax import config as config_lib
from wings_jax.data import chat_template, tokenization
from wings_jax.errors import UserError
from wings_jax.model import layers, parameters, presets
from wings_jax.weights import (
    digests,
    rules,
    safetensors_file,
    starting,
    transfer,
    transformers_format,
)
from wings_jax.weights.digests import TensorDigest
from wings_jax.weights.tensors import LazyTensor, WeightsError

METADATA = "wings_adapter"  # the entry of the file's metadata
VERSION = 1
_PART = re.compile(
    r"projector/.*|decoder/layers/((visual|textual|router|prefix)/.*|(attn|mlp)/.*/[ab])"
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened adapter; its tensors are not read yet."""

    file: pathlib.Path
    """The safetensors file."""
    config: config_lib.Config
    """The config of the run that trained it."""
    arch: presets.WingsArch
    """The architecture of the whole model: the base with the adapter."""
    step: int
    """Optimizer steps of its last stage."""
    base: Mapping[str, TensorDigest]
    """Name -> digest of every tensor of the LLM and the tower."""
    tokenizer: str
    """Digest of the tokenizer (`digest_tokenizer`)."""
    tensors: Mapping[str, LazyTensor]
    """Key of the transformers format -> tensor."""


def is_part(path: str) -> bool:
    """Returns whether a parameter is an adapter's; the others are the LLM's and the tower's.

    >>> is_part("projector/linear_0/bias"), is_part("decoder/layers/attn/q/a")
    (True, True)
    >>> is_part("decoder/layers/attn/q/kernel"), is_part("vision/position")
    (False, False)
    """
    return _PART.fullmatch(path) is not None


def is_base(path: str) -> bool:
    """Returns whether a parameter is the LLM's or the tower's: the opposite of `is_part`."""
    return not is_part(path)


def adapter_rules(arch: presets.WingsArch) -> tuple[rules.Rule, ...]:
    """Returns the table of an adapter: those rows of a whole model whose paths are its parts."""
    return tuple(rule for rule in transformers_format.wings_rules(arch) if is_part(rule.path))


def digest_tokenizer(tokenizer: tokenization.HFTokenizer, template: str) -> str:
    """Returns the SHA-256 of a tokenizer's vocabulary, and of its chat template if that is used."""
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    content: list[Any] = sorted(vocabulary.items())
    if template == chat_template.TOKENIZER:
        content.append(tokenizer.chat_template)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def make_metadata(
    config: config_lib.Config,
    arch: presets.WingsArch,
    step: int,
    base: Mapping[str, TensorDigest],
    tokenizer: tokenization.HFTokenizer,
) -> dict[str, str]:
    """Returns the metadata of an adapter's file."""
    content = {
        "version": VERSION,
        "config": serialization.to_dict(config),
        "arch": serialization.to_dict(arch),
        "step": step,
        "base": {name: serialization.to_dict(digest) for name, digest in base.items()},
        "tokenizer": digest_tokenizer(tokenizer, config.data.template),
    }
    return {METADATA: json.dumps(content, separators=(",", ":"))}


def is_adapter_file(file: pathlib.Path) -> bool:
    """Returns whether a file is a safetensors file with the metadata of an adapter."""
    return file.suffix == ".safetensors" and METADATA in safetensors_file.read_metadata(file)


def open_adapter(file: str | os.PathLike, *, flag: str = "--adapter") -> Adapter:
    """Returns the adapter of a file.

    Raises:
      UserError: naming `flag`: there is no file, or it is not an adapter.
    """
    # The usual mistakes have messages of their own.
    path = pathlib.Path(file)
    if path.is_dir():
        raise UserError(
            f"{flag}: {path} is a directory, an adapter of wings_jax is a file (a PEFT directory "
            "is merged into its LLM: python -m wings_jax.convert import --peft)"
        )
    if not path.is_file():
        raise UserError(f"{flag}: {path} is not a file")

    # Only the header is read here; tensors are read on use.
    try:
        tensors = safetensors_file.open_safetensors(path)
        text = safetensors_file.read_metadata(path).get(METADATA)
    except WeightsError as error:
        raise UserError(f"{flag}: {error}") from error
    if text is None:
        raise UserError(
            f"{flag}: {path} is not an adapter of wings_jax (python -m wings_jax.convert export "
            "--format adapter writes one)"
        )

    # Metadata that is damaged, or of a newer version, is an error that names the file.
    try:
        content = json.loads(text)
        if content["version"] > VERSION:
            raise UserError(f"{flag}: {path} was written by a newer version of wings_jax")
        base = {
            name: serialization.from_dict(TensorDigest, entry, f"{flag}: {path}: base.{name}")
            for name, entry in content["base"].items()
        }
        return Adapter(
            path,
            serialization.from_dict(config_lib.Config, content["config"], f"{path}: config"),
            serialization.from_dict(presets.WingsArch, content["arch"], f"{path}: arch"),
            content["step"],
            base,
            content["tokenizer"],
            tensors,
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{flag}: {path}: damaged metadata ({error})") from error


def check_base(
    adapter: Adapter,
    base: Mapping[str, TensorDigest],
    arch: presets.WingsArch,
    tokenizer: tokenization.HFTokenizer,
    *,
    origin: str,
    flag: str = "--adapter",
) -> None:
    """Checks that an adapter was trained with this LLM and this tower.

    Args:
      base: name -> digest of the tensors of LLM and tower (`digests.digest_tensors`).
      arch: the architecture that they are computed with.
      origin: the base, for messages.

    Raises:
      UserError: naming `flag` and the first tensor, field or tokenizer that differs.
    """
    start = f"{flag}: {adapter.file} belongs to another base than {origin}"

    # Every tensor that the adapter was trained with is in the base, with the same values.
    for name, digest in adapter.base.items():
        found = base.get(name)
        if found is None:
            hint = ": import it with --vision" if name.startswith("vision/") else ""
            raise UserError(f"{start}, which has no {name}{hint}")
        if found.shape != digest.shape:
            shapes = f"shape {list(digest.shape)} -> {list(found.shape)}"
            raise UserError(f"{start}: {name} differs ({shapes})")
        if not found.is_same(digest):
            raise UserError(f"{start}: {name} differs (SHA-256 of its values)")

    # What is in the base only, and what no tensor shows.
    extra = next((name for name in base if name not in adapter.base), None)
    if extra:
        raise UserError(f"{start}: it was trained without {extra}")

    for part, name, trained, found_value in starting.arch_differences(adapter.arch, arch):
        raise UserError(f"{start}: {part} {name} differs ({trained} -> {found_value})")
    if digest_tokenizer(tokenizer, adapter.config.data.template) != adapter.tokenizer:
        raise UserError(f"{start}: the tokenizer's vocabulary or chat template differs")


def read_params(
    adapter: Adapter, *, dtype: Any = None, mesh: jax.sharding.Mesh | None = None
) -> dict[str, np.ndarray | jax.Array]:
    """Returns the flat parameters of an adapter on the mesh, or on the first device.

    Args:
      dtype: of matrices; None keeps each parameter as it is stored.

    Raises:
      WeightsError: the file is incomplete or does not fit its own architecture.
    """
    mesh = mesh or axes.make_mesh({"data": 1}, jax.local_devices()[:1])
    table = adapter_rules(adapter.arch)
    stored = {}
    for path, struct in parameters.abstract_params(adapter.arch, mesh=mesh).items():
        if not is_part(path):
            continue

        # All layers of a parameter have one dtype.
        rule = next(rule for rule in table if rule.path == path)
        tensor = adapter.tensors.get(rule.hf_keys(struct.shape)[0])
        own = np.float32 if tensor is None else tensor.dtype
        is_cast = dtype is not None and layers.is_matrix(path)
        stored[path] = jax.ShapeDtypeStruct(
            struct.shape, dtype if is_cast else own, sharding=struct.sharding
        )

    return transfer.import_tree(table, adapter.tensors, stored, source=str(adapter.file))


def load_adapted(
    directory: str | os.PathLike,
    file: str | os.PathLike,
    *,
    flag: str = "--checkpoint",
    adapter_flag: str = "--adapter",
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
) -> checkpoint.Checkpoint:
    """Returns the LLM and the tower of a checkpoint with an adapter on them.

    The checkpoint's own projector, learners, router, prefix and LoRA are not read. `dtype` and
    `mesh` are as for `checkpoint.load`.

    Raises:
      UserError: there is no checkpoint, no adapter, or they do not belong together.
    """
    adapter = open_adapter(file, flag=adapter_flag)
    base = checkpoint.load(os.fspath(directory), flag=flag, dtype=dtype, mesh=mesh, is_read=is_base)

    # The digests of the base's values, before any tensor of the adapter is read.
    flat = tree.flatten(base.params)
    found = digests.digest_tensors(digests.split_tensors(flat))
    check_base(
        adapter, found, base.arch, base.tokenizer, origin=os.fspath(directory), flag=adapter_flag
    )

    # The run is the adapter's; the base gives its parameters and its tokenizer.
    params = tree.nest({**flat, **read_params(adapter, dtype=dtype, mesh=mesh)})
    return dataclasses.replace(
        base, config=adapter.config, arch=adapter.arch, params=params, step=adapter.step
    )
