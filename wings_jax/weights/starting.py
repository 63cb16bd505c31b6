"""What a training config starts from: its architecture, base weights and tokenizer."""

from __future__ import annotations

import importlib.resources
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from wings_jax import checkpoint, serialization
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import presets
from wings_jax.weights import hf, sources
from wings_jax.weights import tokenizer_files as tokenizer_lib

# What may be newly initialized: a run that starts an LLM or a tower from noise is a mistake.
_ADDED = ("visual", "textual", "router", "prefix")
MAY_BE_FRESH = ("projector/", *(f"decoder/layers/{part}/" for part in _ADDED))
LORA = ("/a", "/b")
# Adapters have no other purpose than to be trained.
ADAPTERS = re.compile("decoder/layers/(prefix/.*|(attn|mlp)/.*/[ab])")


# As `config.model.llm` or `.vision`: that of the checkpoint of `config.init_from`.
CHECKPOINT = "checkpoint"


def base_directory(name: str, half: str) -> pathlib.Path | None:
    """Returns the directory that `config.model.llm` or `.vision` names; None where it is none.

    Presets and CHECKPOINT are not directories.

    Args:
      half: 'llm' or 'vision'.

    Raises:
      UserError: `name` is neither a directory nor a preset.
    """
    if name == "tiny":
        return pathlib.Path(str(importlib.resources.files("wings_jax"))) / "assets" / "tiny" / half

    known = presets.DECODERS if half == "llm" else presets.VISION
    if name in known or name == CHECKPOINT:
        return None

    path = pathlib.Path(name)
    if not path.is_dir():
        names = ", ".join(["tiny", CHECKPOINT, *known])
        raise UserError(f"config.model.{half}: {name!r} is neither a directory nor one of {names}")
    return path


def uses_checkpoint(model: config_lib.ModelConfig) -> bool:
    """Returns whether the LLM or the tower is that of the checkpoint of `config.init_from`."""
    return CHECKPOINT in (model.llm, model.vision)


def saved_arch(config: config_lib.Config) -> presets.WingsArch | None:
    """Returns the architecture of the checkpoint of `config.init_from`; None if it is not used."""
    if not (uses_checkpoint(config.model) and config.init_from):
        return None
    step = checkpoint.newest_step(config.init_from)
    return None if step is None else checkpoint.read_meta(step)[1]


def resolve_arch(
    model: config_lib.ModelConfig, saved: presets.WingsArch | None = None
) -> presets.WingsArch:
    """Returns the architecture that a config describes.

    Args:
      saved: of the checkpoint that the run starts from, for `uses_checkpoint`.

    Raises:
      UserError: naming the key or file that is wrong.
    """
    # The checkpoint's half of a model needs a checkpoint.
    if uses_checkpoint(model) and saved is None:
        half = "llm" if model.llm == CHECKPOINT else "vision"
        raise UserError(
            f"config.model.{half}: {CHECKPOINT!r} is that of config.init_from: give "
            "--config.init_from=DIR"
        )

    decoder = _decoder_arch(model.llm, saved)
    tower = _vision_arch(model.vision, saved)

    # The learners divide the LLM's width into heads of its head width.
    layers = model.learner_layers
    if any(layer not in range(decoder.num_layers) for layer in layers):
        raise UserError(f"config.model.learner_layers: {layers} on {decoder.num_layers} layers")
    if model.learners and decoder.hidden_size % decoder.head_dim:
        raise UserError(
            f"config.model.learners: learners need a width that is a multiple of the head width, "
            f"the LLM has width {decoder.hidden_size} and head width {decoder.head_dim}"
        )

    # The two ways of computing learners (docs/fidelity.md).
    semantics = presets.PAPER
    if model.semantics == "release":
        semantics = presets.release_semantics(model.prompt_length)

    return presets.WingsArch(
        decoder=decoder,
        vision=tower,
        projector=model.projector,
        learners=model.learners,
        router=model.router,
        rank=model.rank,
        learner_layers=layers or None,
        gain=model.gain,
        semantics=semantics,
        router_positions=model.router_positions,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
        lora_targets=model.lora_targets,
        prefix_length=model.prefix_length,
    )


def _decoder_arch(name: str, saved: presets.WingsArch | None) -> presets.DecoderArch:
    # The checkpoint of `config.init_from` has already been read.
    if name == CHECKPOINT and saved is not None:
        return saved.decoder
    directory = base_directory(name, "llm")
    return presets.DECODERS[name] if directory is None else hf.read_decoder_arch(directory)


def _vision_arch(name: str, saved: presets.WingsArch | None) -> presets.VisionArch:
    if name == CHECKPOINT and saved is not None:
        return saved.vision
    directory = base_directory(name, "vision")
    return presets.VISION[name] if directory is None else hf.read_vision_arch(directory)


def load_base(
    arch: presets.WingsArch,
    model: config_lib.ModelConfig,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = np.float32,
) -> dict[str, np.ndarray | jax.Array]:
    """Returns the flat parameters that the directories named by `config.model` hold.

    `mesh` and `dtype` (one, or a function path -> dtype) are as for `sources.load_model`.
    """
    llm, vision = base_directory(model.llm, "llm"), base_directory(model.vision, "vision")
    return sources.load_model(llm, vision, arch=arch, mesh=mesh, dtype=dtype)


def tokenizer_files(config: config_lib.Config, source: pathlib.Path | None) -> dict[str, str]:
    """Returns the tokenizer's files, name -> content.

    They are the config's own, or the LLM's, or those of the checkpoint `source`.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    # The config's tokenizer has precedence, then the LLM's, then the checkpoint's.
    name = config.data.tokenizer or base_directory(config.model.llm, "llm")
    if not name and source is not None:
        return checkpoint.read_tokenizer_files(source)
    if not name:
        raise UserError(
            "config.data.tokenizer: give a directory or hub id, or start from a checkpoint"
        )

    # A directory, or the id of a hub repository.
    flag = "config.data.tokenizer"
    directory = pathlib.Path(name)
    if not directory.is_dir():
        directory = tokenizer_lib.download_tokenizer(str(name), flag=flag)
    return tokenizer_lib.read_tokenizer_files(directory, flag=f"--{flag}")


def check_sources(abstract: Mapping[str, Any], loaded: Mapping[str, Any], start: str) -> list[str]:
    """Returns the paths that are newly initialized.

    Raises:
      UserError: parts of the LLM or the tower are missing in `start`, or shapes differ.
    """
    # Projector, learners, router and adapters may be new; the LLM and the tower may not.
    missing = [path for path in abstract if path not in loaded]
    required = [p for p in missing if not p.startswith(MAY_BE_FRESH) and not p.endswith(LORA)]
    if required:
        raise UserError(
            f"{start} does not hold {required[0]} (and {len(required) - 1} more): give "
            "--config.init_from=DIR (see python -m wings_jax.convert) or directories as "
            "config.model.llm and config.model.vision"
        )

    # What was loaded has to fit the config's model.
    for path, struct in abstract.items():
        if path in loaded and tuple(loaded[path].shape) != tuple(struct.shape):
            shape = tuple(loaded[path].shape)
            raise UserError(f"{start}: {path} has shape {shape}, the config's {struct.shape}")
    return missing


def is_adapter(path: str) -> bool:
    """Returns whether a parameter is LoRA's or a prefix's.

    >>> is_adapter("decoder/layers/attn/q/a"), is_adapter("decoder/layers/attn/q/kernel")
    (True, False)
    """
    return ADAPTERS.fullmatch(path) is not None


def arch_differences(
    one: presets.WingsArch, other: presets.WingsArch
) -> Iterator[tuple[str, str, Any, Any]]:
    """Yields what the LLM and the tower compute differently, also where no shape shows it.

    Each is (`decoder` or `vision`, field, its value in `one`, in `other`). How long a context may
    be (`max_positions`) changes no number.
    """
    # Fields of nested dataclasses are compared one by one, under joined names.
    for part in ("decoder", "vision"):
        first, second = (
            serialization.flatten(serialization.to_dict(getattr(arch, part)))
            for arch in (one, other)
        )
        for name in sorted((first.keys() | second.keys()) - {"max_positions"}):
            if not _is_equal(first.get(name), second.get(name)):
                yield part, name, first.get(name), second.get(name)


def _is_equal(one: Any, other: Any) -> bool:
    # Values that were written in float32 differ in their last digits.
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other
