"""llava-hf checkpoints (`LlavaForConditionalGeneration`), in and out.

A directory holds an LLM, a vision tower and a projector under three prefixes, which differ by the
version of transformers that wrote it. As a model here it is one without learners.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from wings_jax.errors import UserError
from wings_jax.model import families, hf_checks, hf_config, presets
from wings_jax.model.config_fields import ConfigFields
from wings_jax.weights import (
    hf,
    release_settings,
    rules,
    sources,
    store,
    text_files,
    tokenizer_files,
)
from wings_jax.weights.imports import ImportPart, ImportSpec
from wings_jax.weights.tensors import LazyTensor, WeightsError, check_not_quantized

# Prefixes of the LLM's keys in the layouts of transformers -> what a causal LM has instead.
LLM_PREFIXES = {
    "language_model.model.": "model.",  # 4, and what 5 writes
    "model.language_model.": "model.",  # 5 in memory
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
PROJECTOR_PREFIXES = ("multi_modal_projector.", "model.multi_modal_projector.")
TOWER_PREFIXES = ("vision_tower.", "model.vision_tower.")
# The layout that an export writes: all versions from 4 on read it.
LANGUAGE_MODEL, TOWER = "language_model.", "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."
KIND = "mlp2x_gelu"
CHAT_TEMPLATE_FILE = "chat_template.json"  # of older processors

PROJECTOR_RULES = rules.table("""
linear_1.weight    linear_0/kernel    D E <-> E D
linear_1.bias      linear_0/bias      D <-> D
linear_2.weight    linear_1/kernel    O D <-> D O
linear_2.bias      linear_1/bias      D <-> D
""")


def from_llava(directory: str | os.PathLike) -> ImportSpec:
    """Returns the import of a llava-hf directory.

    Raises:
      WeightsError, UserError: it is of another kind, broken, or has a feature that is not
        supported; LLaVA-NeXT is named.
    """
    directory = pathlib.Path(directory)
    source, file = str(directory), str(directory / "config.json")
    config = store.read_config(directory)
    _check_config(config, file)

    # Three models under three prefixes.
    tensors = store.open_tensors(directory)
    check_not_quantized(tensors, source)
    text_config = read_text_config(config, file, has_head=_has_head(tensors))
    llm_tensors, projector_tensors, tower_tensors = split_tensors(tensors)
    decoder = hf_config.decoder_from_hf(text_config, file=f"{file}: text_config")
    decoder = hf.untie(decoder, llm_tensors)

    # An export of wings_jax records what the tower was.
    recorded = release_settings.read_settings(config, file).get("vision")
    tower = recorded or hf.read_vision_arch(directory)
    arch = presets.WingsArch(decoder, tower, projector=KIND)

    # A projector without biases is one with biases of 0.
    if config.get("multimodal_projector_bias") is False:
        projector_tensors = _with_zero_biases(projector_tensors)

    # Each table reads its own part, under that part's place in the parameters.
    llm_rules = rules.with_prefix(hf.decoder_rules(decoder), path="decoder/")
    tower_rules = rules.with_prefix(hf.vision_rules(tower), path="vision/")
    projector_rules = rules.with_prefix(PROJECTOR_RULES, path="projector/")
    parts = (
        ImportPart("LLM", source, llm_rules, llm_tensors, hf.decoder_ignorable(decoder)),
        ImportPart("projector", source, projector_rules, projector_tensors),
        ImportPart(
            "tower",
            source,
            tower_rules,
            hf.vision_tensors(tower_tensors, source),
            hf.vision_ignorable(tower),
        ),
    )
    return ImportSpec(
        arch,
        parts,
        fresh=(),
        hf_config=text_config,
        tokenizer_files=read_tokenizer_files(directory),
        notes=(*sources.tie_notes(text_config, decoder), *_image_notes(directory)),
    )


def _check_config(config: Mapping[str, Any], file: str) -> None:
    """Raises UserError if a `config.json` is of another model, or has what is not implemented."""
    family = config.get("model_type")
    if family in ("llava_next", "llava_onevision", "llava_next_video"):
        raise UserError(
            f"{file}: model_type {family!r} splits an image into several tiles (anyres), which is "
            "not supported; import a LLaVA 1.5 (model_type 'llava')"
        )
    if family != "llava":
        raise WeightsError(f"{file}: model_type {family!r} is not 'llava'")
    hf_checks.check_not_quantized(config, file)

    # Options that would change what is computed.
    fields = ConfigFields(config, file)
    fields.refuse("projector_hidden_act", ["gelu"])
    layers = config.get("vision_feature_layer")
    if isinstance(layers, list):
        raise UserError(
            f"{file}: vision_feature_layer {layers} joins several hidden states, which is not "
            "supported, only one"
        )


def read_text_config(config: Mapping[str, Any], file: str, *, has_head: bool) -> dict[str, Any]:
    """Returns `text_config` with what transformers assumes where older files leave it out.

    Args:
      has_head: whether the checkpoint has an output head; without, the embedding is the head.
    """
    fields = ConfigFields(config, file).object("text_config")
    text_config = dict(config.get("text_config") or {})
    # As transformers: a file without a family is a Llama, with the sizes of that family.
    text_config.setdefault("model_type", "llama")
    family = families.FAMILIES.get(str(text_config["model_type"]))
    text_config = {**(family.nested if family else {}), **text_config}

    # Without a head in the checkpoint, an entry beside `text_config` may tie it too.
    is_tied = fields.flag("tie_word_embeddings")
    is_tied |= not has_head and bool(config.get("tie_word_embeddings"))
    return {**text_config, "tie_word_embeddings": is_tied}


def _has_head(tensors: Mapping[str, Any]) -> bool:
    return any(key in tensors for key in ("lm_head.weight", "language_model.lm_head.weight"))


def split_tensors(
    tensors: Mapping[str, LazyTensor],
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Returns the tensors of the LLM (as a causal LM's), of the projector and of the tower.

    A key of none of them stays with the LLM's, whose table then refuses it by name.
    """
    llm, projector, tower = {}, {}, {}
    for key, tensor in tensors.items():
        if key.startswith(TOWER_PREFIXES):
            tower[key] = tensor
            continue

        # Projector keys lose their prefix, the LLM's get that of a causal LM.
        prefix = next((each for each in PROJECTOR_PREFIXES if key.startswith(each)), "")
        if prefix:
            projector[key.removeprefix(prefix)] = tensor
            continue

        prefix = next((each for each in LLM_PREFIXES if key.startswith(each)), "")
        llm[LLM_PREFIXES.get(prefix, "") + key.removeprefix(prefix)] = tensor

    return llm, projector, tower


def _with_zero_biases(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Returns a projector's tensors with biases of 0, for `multimodal_projector_bias` false."""
    biases = {}
    for key, tensor in tensors.items():
        # One bias per output: weights are [out, in].
        shape = tensor.shape[:1]
        load = functools.partial(np.zeros, shape, tensor.dtype)
        biases[key.replace(".weight", ".bias")] = LazyTensor(shape, tensor.dtype, load, key)
    return {**biases, **tensors}


def _image_notes(directory: pathlib.Path) -> tuple[str, ...]:
    """Returns a line where the directory's processor crops images that are not squares."""
    processor = hf.read_processor(directory) or {}
    if processor.get("do_pad") or not processor.get("do_center_crop"):
        return ()
    return (
        "images that are not squares are padded to squares, as LLaVA was trained; the directory's "
        "own processor crops them",
    )


def read_tokenizer_files(directory: pathlib.Path) -> dict[str, str]:
    """Returns the tokenizer's files, with the chat template of an older processor."""
    contents = tokenizer_files.read_tokenizer_files(directory, flag="--tokenizer")
    # Older processors have the template in a JSON file.
    file = directory / CHAT_TEMPLATE_FILE
    if file.is_file() and "chat_template.jinja" not in contents:
        template = text_files.read_json(file).get("chat_template")
        if isinstance(template, str):
            contents["chat_template.jinja"] = template
    return contents


def llava_rules(arch: presets.WingsArch) -> tuple[rules.Rule, ...]:
    """Returns the table of a whole model without learners, in the layout that is exported."""
    llm = rules.with_prefix(hf.decoder_rules(arch.decoder), hf_key=LANGUAGE_MODEL, path="decoder/")
    tower = rules.with_prefix(hf.vision_rules(arch.vision), hf_key=TOWER, path="vision/")
    return (*llm, *tower, *rules.with_prefix(PROJECTOR_RULES, hf_key=PROJECTOR, path="projector/"))
