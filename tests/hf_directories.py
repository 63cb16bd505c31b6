"""Hugging Face directories of an LLM or a tower: loaded as subtrees, and written, for tests."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from wings_jax import tree
from wings_jax.model import layout, presets
from wings_jax.model import wings as model_lib
from wings_jax.weights import exports, hf, rules, sources, store, tokenizer_files, transfer


def load_llm(directory: pathlib.Path, arch: presets.DecoderArch) -> dict[str, Any]:
    """Returns the subtree of `decoder/` in float32."""
    whole = presets.WingsArch(arch, sources.DEFAULT_TOWER)
    flat = sources.load_model(directory, arch=whole, dtype=np.float32)
    return tree.nest(flat)["decoder"]


def load_vision(directory: pathlib.Path, arch: presets.VisionArch) -> dict[str, Any]:
    """Returns the subtree of `vision/` in float32."""
    whole = presets.WingsArch(sources.ANY_DECODER, arch)
    flat = sources.load_model(vision=directory, arch=whole, dtype=np.float32)
    return tree.nest(flat)["vision"]


def save_llm(
    params: Mapping[str, Any],
    arch: presets.DecoderArch,
    directory: pathlib.Path,
    *,
    tokenizer: pathlib.Path | None = None,
) -> None:
    """Writes the subtree of `decoder/` as transformers does, with another directory's tokenizer."""
    tensors = transfer.export_tree(hf.decoder_rules(arch), tree.flatten(params))
    text_files = {}
    if tokenizer is not None:
        text_files = tokenizer_files.read_tokenizer_files(tokenizer, flag="tokenizer")
    exports.write_export(directory, tensors, hf.llm_config(arch), text_files)


def save_vision(
    params: Mapping[str, Any], arch: presets.VisionArch, directory: pathlib.Path
) -> None:
    """Writes the subtree of `vision/`; its features are the directory's *last* hidden state."""
    table = rules.with_prefix(hf.vision_rules(arch), hf_key="vision_model.")
    tensors = transfer.export_tree(table, tree.flatten(params))
    processor = {hf.PROCESSOR_FILE: store.dump_json(hf.processor_config(arch))}
    exports.write_export(directory, tensors, hf.vision_config(arch), processor)


def text_logits(
    arch: presets.WingsArch, params: Mapping[str, Any], tokens: np.ndarray
) -> np.ndarray:
    """Returns f32[B,T,V] of text rows i32[B,T], all in float32."""
    rows = layout.make_layout(tokens, np.full_like(tokens, layout.TEXT))
    side = arch.vision.image_size
    batch = layout.Batch(rows, tokens, np.zeros((len(tokens), 0, side, side, 3), np.uint8))
    model = model_lib.Wings(arch)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    hidden = model.apply({"params": wide}, batch)
    return np.asarray(model.apply({"params": wide}, hidden, method=model_lib.Wings.logits))
