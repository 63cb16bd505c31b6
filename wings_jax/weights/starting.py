"""What a run starts from: the architecture that a config names, and the weights of its folders."""

from __future__ import annotations

import importlib.resources
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import transformers

from wings_jax import checkpoint, tree
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import presets
from wings_jax.weights import hf, store


def tokenizer_files(config: config_lib.Config, source: pathlib.Path | None) -> dict[str, str]:
    """Returns the tokenizer's files, name -> content: the config's, the LLM's or the checkpoint's.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    named = config.data.tokenizer or folder(config.model.llm, "llm")
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


# What may be newly initialized: a run that starts an LLM or a tower from noise is a mistake.
_ADDED = ("visual", "textual", "router", "prefix")
MAY_BE_FRESH = ("projector/", *(f"decoder/layers/{part}/" for part in _ADDED))
LORA = ("/a", "/b")
ADAPTERS = re.compile("decoder/layers/(prefix/.*|(attn|mlp)/.*/[ab])")  # there to be trained


def folder(name: str, half: str) -> pathlib.Path | None:
    """Returns the folder that `config.model.llm` or `.vision` names; None for a preset's name."""
    if name == "tiny":
        return pathlib.Path(str(importlib.resources.files("wings_jax"))) / "assets" / "tiny" / half
    known = presets.DECODERS if half == "llm" else presets.VISION
    if name in known:
        return None
    path = pathlib.Path(name)
    if not path.is_dir():
        names = ", ".join(["tiny", *known])
        raise UserError(f"config.model.{half}: {name!r} is neither a folder nor one of {names}")
    return path


def resolve_arch(model: config_lib.ModelConfig) -> presets.WingsArch:
    """Returns the architecture that a config names. Raises UserError naming key or file."""
    llm, vision = folder(model.llm, "llm"), folder(model.vision, "vision")
    if llm is None:
        decoder = presets.DECODERS[model.llm]
    else:
        decoder = presets.decoder_from_hf(store.read_config(llm))
    if vision is None:
        tower = presets.VISION[model.vision]
    else:
        has_processor = (vision / hf.PROCESSOR_FILE).is_file()
        processor = store.read_config(vision, hf.PROCESSOR_FILE) if has_processor else None
        tower = presets.vision_from_hf(store.read_config(vision), processor)
    layers = model.learner_layers
    if any(i not in range(decoder.num_layers) for i in layers):
        raise UserError(f"config.model.learner_layers: {layers} on {decoder.num_layers} layers")
    if model.learners and decoder.num_heads * decoder.head_dim != decoder.hidden_size:
        raise UserError("config.model.learners: heads x head width must equal the model's width")
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


def load_base(arch: presets.WingsArch, model: config_lib.ModelConfig) -> dict[str, np.ndarray]:
    """Returns the flat parameters that the folders named by `config.model` hold."""
    found: dict[str, Any] = {}
    llm, vision = folder(model.llm, "llm"), folder(model.vision, "vision")
    if llm is not None:
        found["decoder"] = hf.load_llm(llm, arch.decoder)
    if vision is not None:
        found["vision"] = hf.load_vision(vision, arch.vision)
    return tree.flatten(found)


def check_sources(abstract: Mapping[str, Any], loaded: Mapping[str, Any], start: str) -> list[str]:
    """Returns the paths that start fresh.

    Raises:
      UserError: parts of the LLM or the tower are missing in `start`, or shapes disagree.
    """
    missing = [path for path in abstract if path not in loaded]
    unborn = [p for p in missing if not p.startswith(MAY_BE_FRESH) and not p.endswith(LORA)]
    if unborn:
        raise UserError(
            f"{start} does not hold {unborn[0]} (and {len(unborn) - 1} more): give "
            "--config.init_from=DIR (see python -m wings_jax.convert) or folders as "
            "config.model.llm and config.model.vision"
        )
    for path, shape in abstract.items():
        if path in loaded and tuple(loaded[path].shape) != tuple(shape.shape):
            found = tuple(loaded[path].shape)
            raise UserError(f"{start}: {path} has shape {found}, the config's {shape.shape}")
    return missing


def is_adapter(path: str) -> bool:
    """Returns whether a parameter is LoRA's or a prefix's."""
    return ADAPTERS.fullmatch(path) is not None
