"""What an export writes: tensors, `config.json` and text files, by format."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from wings_jax import checkpoint
from wings_jax.data import chat_template
from wings_jax.formatting import format_names
from wings_jax.model import presets
from wings_jax.weights import command_output as output_lib
from wings_jax.weights import (
    exports,
    hf,
    llava_export,
    release_settings,
    transformers_files,
    transformers_format,
)
from wings_jax.weights.rules import group_name
from wings_jax.weights.tensors import LazyTensor


def plan_format(
    arguments: argparse.Namespace, step: pathlib.Path, params: Mapping[str, Any]
) -> tuple[Mapping[str, LazyTensor], Mapping[str, Any], Mapping[str, str]]:
    """Returns the tensors, `config.json` and the text files of a format of whole models or LLMs."""
    train_config, arch, _ = checkpoint.read_meta(step)
    hf_config = checkpoint.read_hf_config(step)
    tokenizer = checkpoint.read_tokenizer_files(step)
    model_type = str(hf_config.get("model_type", ""))

    # LoRA that was added to the kernels is no longer a part of the model.
    if arguments.merge_lora:
        params = exports.merge_lora(params, arch)
        arch = dataclasses.replace(arch, lora_rank=0)
    dtype = output_lib.DTYPES[arguments.dtype] if arguments.dtype else exports.common_dtype(params)

    # The tokenizer of the source is exported as it was imported.
    if arguments.format == "llm":
        llm, dropped_paths = exports.as_llm(params, arch, dtype=dtype)
        config = {**hf_config, **hf.llm_config(arch.decoder, model_type=model_type)}
        config.pop(release_settings.ENTRY, None)
        groups = sorted({group_name(path) for path in dropped_paths})
        print(f"left out: {format_names(groups, 6)}" if groups else "nothing is left out")
        return llm, config, tokenizer

    # The release's layout; what its own code cannot compute is noted.
    if arguments.format == "wings":
        tensors = exports.as_release(params, arch, dtype=dtype)
        if arch.learners and arch.semantics == presets.PAPER:
            print(
                "note: trained with the paper's semantics (recorded in config.json); the release's "
                "code computes its own"
            )
        return tensors, exports.release_config(arch, hf_config), tokenizer

    # transformers reads these with a processor, which needs the conversation template.
    template = chat_template.template_from_settings(
        train_config.data, checkpoint.open_tokenizer(tokenizer)
    )
    if arguments.format == "llava":
        config, text_files = llava_export.export_files(
            arch, tokenizer, template, model_type=model_type
        )
        image_token_id = config["image_token_index"]
        tensors = llava_export.as_llava(params, arch, image_token_id=image_token_id, dtype=dtype)
        return tensors, config, text_files

    tensors = transformers_format.as_transformers(params, arch, dtype=dtype)
    name = pathlib.Path(arguments.out or step).name
    return (tensors, *transformers_files.export_files(arch, tokenizer, template, name=name))
