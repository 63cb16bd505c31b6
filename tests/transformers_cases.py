"""The exported torch model beside the JAX model, for the tests: one set of random parameters."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import sys
import types

import numpy as np
import tiny_model
import torch

import wings_jax
from wings_jax import tree
from wings_jax.model import layout, presets
from wings_jax.model.wings import Wings
from wings_jax.weights import transfer, transformers_format

CODE = pathlib.Path(wings_jax.__file__).parent / "weights" / "transformers_code"
IMAGE_TOKEN = 64  # outside of the tiny vocabulary

RELEASE = presets.release_semantics(prompt_length=2)
VARIANTS = {
    **tiny_model.VARIANTS,
    "release": tiny_model.arch(learners=tiny_model.BOTH, router=True, gain=2.0, semantics=RELEASE),
    "release_stage1": tiny_model.arch(learners=("visual",), semantics=RELEASE),
    "llama3_scaling": dataclasses.replace(
        tiny_model.arch(learners=tiny_model.BOTH, router=True),
        decoder=dataclasses.replace(
            tiny_model.DECODER,
            qkv_bias=False,
            rope_scaling=presets.RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
        ),
    ),
    "tied": dataclasses.replace(
        tiny_model.arch(learners=tiny_model.BOTH, router=True),
        decoder=dataclasses.replace(tiny_model.DECODER, tie_embeddings=True),
    ),
    "clip": tiny_model.arch(learners=tiny_model.BOTH, router=True, vision=tiny_model.CLIP),
}
# Rows drawn as tiny_model does: t text, i an image; the paddings differ. An image, text alone, two
# images, an image at the start. The slots for an answer follow.
ROWS = ["ttitttt", "tttttttttttt", "tittitt", "itttt"]
ANSWER = 6
LENGTH = 13 + ANSWER


@functools.cache
def load_code() -> types.ModuleType:
    """Returns the module `modeling_wings`, imported as a part of a package of its own."""
    sys.path.insert(0, str(CODE.parent))
    try:
        return importlib.import_module("transformers_code.modeling_wings")
    finally:
        sys.path.remove(str(CODE.parent))


def torch_model(arch: presets.WingsArch, *, attention: str = "sdpa"):
    """Returns the JAX model, its parameters, and the torch model with the same parameters."""
    code, model = load_code(), Wings(arch)
    params = tiny_model.init(model)
    entries = transformers_format.wings_config(arch, image_token_id=IMAGE_TOKEN)
    entries = {k: v for k, v in entries.items() if k not in ("architectures", "auto_map")}
    config = code.WingsConfig(**entries)
    config._attn_implementation = attention
    other = code.WingsForConditionalGeneration(config).eval()
    table = transformers_format.wings_rules(arch)
    tensors = transfer.export_tree(table, tree.flatten(params))
    state = {key: torch.from_numpy(np.array(tensor)) for key, tensor in tensors.items()}
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"} if arch.decoder.tie_embeddings else not missing
    other.tie_weights()
    return model, params, other


def torch_inputs(arch: presets.WingsArch, batch: layout.Batch, *, left: bool = False) -> dict:
    """Returns what the torch model reads of a batch of rows with one conversation each.

    `labels` are the batch's targets, at their own slots.
    """
    rows = batch.layout
    ids = np.where(rows.modality == layout.IMAGE, IMAGE_TOKEN, rows.tokens)
    used = rows.modality != layout.PADDING
    labels = np.full_like(batch.targets, layout.IGNORE)
    labels[:, 1:] = batch.targets[:, :-1]
    if left:
        shift = (~used).sum(1)
        ids, used, labels = (
            np.stack([np.roll(x, n) for x, n in zip(part, shift, strict=True)])
            for part in (ids, used, labels)
        )
    inputs = {
        "input_ids": torch.from_numpy(ids.astype(np.int64)),
        "attention_mask": torch.from_numpy(used.astype(np.int64)),
        "labels": torch.from_numpy(labels.astype(np.int64)),
    }
    pixels = pixel_values(arch, batch)
    return inputs if pixels is None else {**inputs, "pixel_values": pixels}


def pixel_values(arch: presets.WingsArch, batch: layout.Batch) -> torch.Tensor | None:
    """Returns f32[n,3,h,w], the images of all rows in their order."""
    mean, std = np.array(arch.vision.mean), np.array(arch.vision.std)
    counts = (batch.layout.modality == layout.IMAGE).sum(1) // arch.vision.num_patches
    images = [batch.images[row, i] for row, n in enumerate(counts) for i in range(n)]
    if not images:
        return None
    pixels = (np.stack(images).astype(np.float32) / 255 - mean) / std
    pixels = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels))


def batch_of(arch: presets.WingsArch, rows: list[str], length: int = LENGTH) -> layout.Batch:
    """Returns a batch with the layout of the model's semantics."""
    return with_semantics(arch, tiny_model.batch(rows, length, images=2))


def with_semantics(arch: presets.WingsArch, batch: layout.Batch) -> layout.Batch:
    """Returns the batch with `visible_from` of the model's semantics."""
    rows = layout.make_layout(
        batch.layout.tokens,
        batch.layout.modality,
        batch.layout.segments,
        prompt_length=arch.semantics.prompt_length,
    )
    return dataclasses.replace(batch, layout=rows)


def generate_inputs(arch: presets.WingsArch, rows: list[str]) -> dict:
    """Returns the inputs of `generate`: no labels, no column that is padding in every row."""
    inputs = torch_inputs(arch, batch_of(arch, rows), left=True)
    del inputs["labels"]
    first = int(inputs["attention_mask"].any(0).nonzero()[0])
    for key in ("input_ids", "attention_mask"):
        inputs[key] = inputs[key][:, first:]
    return inputs


def generate(other, inputs: dict, **options) -> list[list[int]]:
    """Returns the new ids of each row, greedy unless `options` has another choice."""
    defaults = {"max_new_tokens": ANSWER, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        ids = other.generate(**inputs, **{**defaults, "pad_token_id": 0, **options})
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def greedy_ids(model: Wings, params, rows: list[str]) -> list[list[int]]:
    """Returns the JAX model's greedy ids of each row; every token by a full forward pass."""
    batch = batch_of(model.arch, rows)
    tokens, modality = np.array(batch.layout.tokens), np.array(batch.layout.modality)
    ends = (modality != layout.PADDING).sum(1)
    index = np.arange(len(rows))
    ids = []
    for _ in range(ANSWER):
        slots = layout.make_layout(
            tokens, modality, prompt_length=model.arch.semantics.prompt_length
        )
        logits = tiny_model.logits(model, params, dataclasses.replace(batch, layout=slots))
        ids.append(logits[index, ends - 1].argmax(-1))
        tokens[index, ends], modality[index, ends] = ids[-1], layout.TEXT
        ends = ends + 1
    return np.stack(ids, axis=1).tolist()
