"""What a model is imported from: directories or files of an LLM, a tower, a projector.

`release_import` has the checkpoints of the authors' release.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from wings_jax.model import hf_config, presets
from wings_jax.model.vision import PROJECTORS
from wings_jax.weights import gguf_file, hf, imports, peft, release, rules, store
from wings_jax.weights.imports import ImportPart, ImportSpec
from wings_jax.weights.tensors import LazyTensor, WeightsError, check_not_quantized

# What a base LLM and its tower do not hold: training initializes it.
FRESH = (r"projector/.*", r"decoder/layers/(visual|textual|router)/.*")
FRESH_WITHOUT_TOWER = (r"vision/.*", *FRESH)
# The tower that an LLM alone is given, until a training config names another.
DEFAULT_TOWER = presets.VISION["siglip_so400m_384"]
# For tracing a tower by itself: the decoder does not change its shapes.
ANY_DECODER = presets.DECODERS["smollm2_135m"]


def load_model(
    llm: str | os.PathLike | None = None,
    vision: str | os.PathLike | None = None,
    *,
    arch: presets.WingsArch | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
) -> dict[str, np.ndarray | jax.Array]:
    """Returns the flat parameters of Hugging Face directories: an LLM, a tower, or both.

    Tensors are read one at a time. With a mesh each parameter is placed on its devices as soon
    as it is complete; without, it stays on the host.

    Args:
      arch: of the whole model; parts of it that no directory holds are not in the result. None
        for what the directories' config files describe (the LLM is needed then).
      dtype: of all parameters, or a function path -> dtype; None keeps each as it is stored.

    Raises:
      WeightsError, UserError: a source is missing, of another family, or does not fit `arch`.
    """
    if arch is not None:
        decoder, tower = arch.decoder, arch.vision
    elif llm is not None:
        decoder = hf.read_decoder_arch(llm)
        tower = DEFAULT_TOWER if vision is None else hf.read_vision_arch(vision)
    else:
        raise WeightsError("give the directory of an LLM, or an architecture")

    # Each directory fills its own half of the model.
    parts = []
    if llm is not None:
        parts.append(llm_part(llm, decoder))
    if vision is not None:
        parts.append(vision_part(vision, tower))

    # Nothing has to be complete here: the caller checks what was loaded.
    whole = arch or presets.WingsArch(decoder, tower)
    spec = ImportSpec(whole, tuple(parts), fresh=(".*",), hf_config={})
    steps, _ = imports.plan_parts(spec, dtype=dtype, mesh=mesh)
    return imports.load_parts(steps)


def from_llm(
    llm: str | os.PathLike,
    vision: str | os.PathLike | None = None,
    *,
    projector: str | os.PathLike | None = None,
    projector_kind: str = "mlp2x_gelu",
    lora: str | os.PathLike | None = None,
) -> ImportSpec:
    """Returns the import of an LLM's directory, and if given a tower's and a `mm_projector.bin`.

    Args:
      lora: a PEFT directory, whose LoRA is added to the LLM's weights.

    Raises:
      WeightsError, UserError: a source is missing, of another family, or broken.
    """
    config = store.read_config(llm)
    decoder = hf.read_decoder_arch(llm)
    notes = tie_notes(config, decoder)
    part = llm_part(llm, decoder)
    # The LoRA is merged into the LLM: the model has none of its own afterwards.
    if lora is not None:
        part, lora_note = _with_lora(part, decoder, lora)
        notes = (*notes, lora_note)

    spec = _base_spec(decoder, part, vision, projector, projector_kind)
    return dataclasses.replace(
        spec,
        hf_config=config,
        tokenizer_directory=pathlib.Path(llm),
        notes=notes,
        merged=() if lora is None else (str(lora),),
    )


def _with_lora(
    part: ImportPart, arch: presets.DecoderArch, directory: str | os.PathLike
) -> tuple[ImportPart, str]:
    """Returns an LLM's part with the LoRA of a PEFT directory added, and what to print about it."""
    lora = peft.open_peft(directory)
    # A tied embedding is used twice, and LoRA of the head would change one use only.
    if arch.tie_embeddings and "lm_head" in lora.matrices:
        raise WeightsError(
            f"{directory}: LoRA of lm_head, which is the embedding of {part.source}: it cannot be "
            "merged into one of them"
        )

    note = f"LoRA of {directory} is added to {len(lora.matrices)} projections of the LLM"
    if (lora.directory / "tokenizer.json").is_file():
        note += f"; the tokenizer is the LLM's (--tokenizer {directory} for the adapter's)"
    return dataclasses.replace(part, tensors=peft.merge(part.tensors, lora)), note


def from_gguf(
    file: str | os.PathLike,
    vision: str | os.PathLike | None = None,
    *,
    projector: str | os.PathLike | None = None,
    projector_kind: str = "mlp2x_gelu",
    with_tokenizer: bool = True,
) -> ImportSpec:
    """Returns the import of an LLM in a GGUF file, dequantized; else as `from_llm`.

    Args:
      with_tokenizer: False leaves out the file's tokenizer, which may be of an unsupported kind.
    """
    model = gguf_file.read_gguf(file, with_tokenizer=with_tokenizer)
    decoder = hf_config.decoder_from_hf(model.config, file=str(file))
    part = _decoder_part(decoder, model.tensors, str(file))

    spec = _base_spec(decoder, part, vision, projector, projector_kind)
    return dataclasses.replace(spec, hf_config=model.config, tokenizer_files=model.tokenizer_files)


def _base_spec(
    decoder: presets.DecoderArch,
    part: ImportPart,
    vision: str | os.PathLike | None,
    projector: str | os.PathLike | None,
    projector_kind: str,
) -> ImportSpec:
    """Returns the import of an LLM with the tower and the projector that are given."""
    check_projector_kind(projector_kind, "--projector-kind")
    parts = [part]
    # Without a tower, the sizes of a default one, until a training config names another.
    tower = DEFAULT_TOWER
    if vision is not None:
        tower = hf.read_vision_arch(vision)
        parts.append(vision_part(vision, tower))

    arch = presets.WingsArch(decoder, tower, projector=projector_kind)
    if projector is not None:
        parts.append(_projector_part(arch, projector))

    fresh = FRESH_WITHOUT_TOWER if vision is None else FRESH
    return ImportSpec(arch, tuple(parts), fresh, hf_config={})


def check_projector_kind(kind: str, name: str) -> None:
    """Raises WeightsError naming the flag or file if there is no such projector."""
    if kind not in PROJECTORS:
        raise WeightsError(f"{name}: {kind!r} is not one of {', '.join(PROJECTORS)}")


def tie_notes(config: Mapping[str, Any], decoder: presets.DecoderArch) -> tuple[str, ...]:
    """Returns a line where the weights contradict the config's tied head."""
    if not config.get("tie_word_embeddings") or decoder.tie_embeddings:
        return ()
    return (
        "config.json has tie_word_embeddings true, but lm_head.weight differs from the "
        "embedding: the head is kept, untied",
    )


def llm_part(directory: str | os.PathLike, arch: presets.DecoderArch) -> ImportPart:
    """Returns the part of a directory with a Qwen2 or Llama."""
    tensors = hf.decoder_tensors(store.open_tensors(directory))
    check_not_quantized(tensors, str(directory))
    return _decoder_part(arch, tensors, str(directory))


def _decoder_part(
    arch: presets.DecoderArch, tensors: Mapping[str, LazyTensor], source: str
) -> ImportPart:
    table = rules.with_prefix(hf.decoder_rules(arch), path="decoder/")
    return ImportPart("LLM", source, table, tensors, hf.decoder_ignorable(arch))


def vision_part(directory: str | os.PathLike, arch: presets.VisionArch) -> ImportPart:
    """Returns the part of a directory with a SigLIP or CLIP tower."""
    tensors = hf.vision_tensors(store.open_tensors(directory), str(directory))
    check_not_quantized(tensors, str(directory))
    table = rules.with_prefix(hf.vision_rules(arch), path="vision/")
    return ImportPart("tower", str(directory), table, tensors, hf.vision_ignorable(arch))


def _projector_part(arch: presets.WingsArch, source: str | os.PathLike) -> ImportPart:
    """Returns the part of LLaVA's `mm_projector.bin`, whose keys may begin with `model.`."""
    tensors = {
        re.sub(r"^(.*\.)?mm_projector\.", "", hf_key): tensor
        for hf_key, tensor in store.open_tensors(source).items()
    }

    check_not_quantized(tensors, str(source))
    table = rules.with_prefix(release.projector_rules(arch.projector), path="projector/")

    # [D, E]: a projector of another tower is the usual mistake, so it gets its own message.
    first = tensors.get(table[0].hf_key) if table else None
    width = arch.vision.hidden_size
    if first is not None and len(first.shape) == 2 and first.shape[1] != width:
        raise WeightsError(
            f"the projector in {source} takes features of width {first.shape[1]}, "
            f"the vision tower has width {width}"
        )
    return ImportPart("projector", str(source), table, tensors)
