"""Models without learners as llava-hf directories, which transformers opens with its own code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from wings_jax import serialization
from wings_jax.data.templates import Template
from wings_jax.model import presets
from wings_jax.weights import exports, hf, llava, release_settings, store, transfer
from wings_jax.weights import transformers_files as text_files_lib
from wings_jax.weights.tensors import LazyTensor, WeightsError
from wings_jax.weights.transformers_format import IMAGE_TOKEN

VOCABULARY_MULTIPLE = 64  # an embedding that has to grow gets so many rows, as llava-hf's have
# Keys of the tensors with one row per token.
VOCABULARY_KEYS = (
    f"{llava.LANGUAGE_MODEL}model.embed_tokens.weight",
    f"{llava.LANGUAGE_MODEL}lm_head.weight",
)


def as_llava(
    params: Mapping[str, Any],
    arch: presets.WingsArch,
    *,
    image_token_id: int = 0,
    dtype: Any = None,
) -> dict[str, LazyTensor]:
    """Returns the tensors of a model without learners under the keys of llava-hf.

    The embedding and the head get rows of zeros where they have none for `image_token_id`.

    Raises:
      WeightsError: the model has what LLaVA has not; the message names the formats that hold it.
    """
    if arch.learners:
        raise WeightsError(
            f"the llava format has no place for learners ({', '.join(arch.learners)}): "
            "--format transformers or wings can hold them"
        )
    exports.check_no_adapters(params, arch)
    if arch.projector != llava.KIND:
        raise WeightsError(
            f"the llava format has projectors of two layers ({llava.KIND}), this one is "
            f"{arch.projector}: --format transformers can hold it"
        )

    # Every row of the format's table needs its parameter.
    table = llava.llava_rules(arch)
    exports.check_complete(table, params, "a LLaVA")
    tensors = transfer.export_tree(table, params, dtype=dtype)

    # Rows of zeros up to the token `<image>`, where the LLM's vocabulary ends before it.
    rows = vocabulary_rows(arch.decoder.vocab_size, image_token_id)
    for key in VOCABULARY_KEYS:
        if key in tensors:
            tensors[key] = _with_rows(tensors[key], rows)
    return tensors


def vocabulary_rows(vocab_size: int, image_token_id: int) -> int:
    """Returns the rows of the exported embedding.

    >>> vocabulary_rows(151936, 151646), vocabulary_rows(32000, 32000)
    (151936, 32064)
    """
    if image_token_id < vocab_size:
        return vocab_size
    return -(-(image_token_id + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _with_rows(tensor: LazyTensor, rows: int) -> LazyTensor:
    """Returns a matrix [V,D] with rows of zeros behind its own."""
    missing = rows - tensor.shape[0]
    if not missing:
        return tensor

    def load() -> np.ndarray:
        # [V, D] -> [rows, D]
        return np.pad(np.asarray(tensor), ((0, missing), (0, 0)))

    return LazyTensor((rows, tensor.shape[1]), tensor.dtype, load, tensor.origin)


def export_files(
    arch: presets.WingsArch,
    tokenizer: Mapping[str, str],
    template: Template,
    *,
    model_type: str = "",
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns `config.json` and the text files of an exported directory, name -> content.

    Args:
      model_type: of the LLM's source; kept where it has the same layers.
    """
    # The token `<image>` is added unless the vocabulary has it.
    tokenizer_json, image_token_id = text_files_lib.with_image_token(tokenizer["tokenizer.json"])

    # The template goes into a file of its own; batches are padded on the left for generation.
    tokenizer_config = json.loads(tokenizer.get("tokenizer_config.json", "{}"))
    tokenizer_config.pop("chat_template", None)
    tokenizer_config |= {"padding_side": "left", "processor_class": "LlavaProcessor"}

    # How transformers' processor computes the number of an image's slots.
    vision = arch.vision
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),
        "vision_feature_select_strategy": hf.select_strategy(vision),
    }

    # The ids that end an answer, and those that must not be chosen.
    generation = text_files_lib.generation_config(tokenizer, template)
    rows = vocabulary_rows(arch.decoder.vocab_size, image_token_id)
    if rows > arch.decoder.vocab_size:
        # Rows that were never trained have logits of 0, which must not be the greatest.
        generation["suppress_tokens"] = list(range(arch.decoder.vocab_size, rows))

    # Later entries replace the files of the source's tokenizer.
    text_files = {
        **tokenizer,
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": store.dump_json(tokenizer_config),
        "chat_template.jinja": text_files_lib.chat_template(template),
        "processor_config.json": store.dump_json(processor),
        hf.PROCESSOR_FILE: store.dump_json(image_processor_config(vision)),
        "generation_config.json": store.dump_json(generation),
    }
    return llava_config(arch, image_token_id=image_token_id, model_type=model_type), text_files


def image_processor_config(arch: presets.VisionArch) -> dict[str, Any]:
    """Returns the `preprocessor_config.json`: padding to a square, then a resize."""
    side = arch.image_size
    return {
        **hf.processor_config(arch),
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
    }


def llava_config(
    arch: presets.WingsArch, *, image_token_id: int, model_type: str = ""
) -> dict[str, Any]:
    """Returns the `config.json` of an exported model.

    The tower ends with the layer whose features are used; what it was is in the entry that other
    programs ignore, `release_settings.ENTRY`.
    """
    rows = vocabulary_rows(arch.decoder.vocab_size, image_token_id)
    text_config = {**hf.llm_config(arch.decoder, model_type=model_type), "vocab_size": rows}

    # The exported tower ends with the layer of the features, which is then its last.
    tower = hf.vision_config(arch.vision)
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        tower.pop(name, None)

    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text_config,
        "vision_config": tower,
        "image_token_index": image_token_id,
        "image_seq_length": arch.vision.num_patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": hf.select_strategy(arch.vision),
        "tie_word_embeddings": arch.decoder.tie_embeddings,
        release_settings.ENTRY: {"vision": serialization.to_dict(arch.vision)},
    }
