"""Writes the tiny LLM and tower as Hugging Face directories, in bfloat16."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes

from wings_jax import tree
from wings_jax.model import presets
from wings_jax.weights import exports, hf, rules, store, tokenizer_files, transfer


def save_llm(
    params: Mapping[str, Any],
    arch: presets.DecoderArch,
    directory: pathlib.Path,
    tokenizer: pathlib.Path,
) -> None:
    """Writes the subtree of `decoder/`, with the tokenizer files of another directory."""
    tensors = transfer.export_tree(
        hf.decoder_rules(arch), tree.flatten(params), dtype=ml_dtypes.bfloat16
    )
    text_files = tokenizer_files.read_tokenizer_files(tokenizer, flag="the tokenizer")
    exports.write_export(directory, tensors, hf.llm_config(arch), text_files)


def save_vision(
    params: Mapping[str, Any], arch: presets.VisionArch, directory: pathlib.Path
) -> None:
    """Writes the subtree of `vision/`; its features are the directory's *last* hidden state."""
    table = rules.with_prefix(hf.vision_rules(arch), hf_key="vision_model.")
    tensors = transfer.export_tree(table, tree.flatten(params), dtype=ml_dtypes.bfloat16)
    processor = {hf.PROCESSOR_FILE: store.dump_json(hf.processor_config(arch))}
    exports.write_export(directory, tensors, hf.vision_config(arch), processor)
