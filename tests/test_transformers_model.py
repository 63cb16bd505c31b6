"""The torch code of `export --format transformers` computes what the JAX model computes."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import sys

import numpy as np
import pytest
import tiny_model

import wings_jax
from wings_jax import tree
from wings_jax.model import layout, presets
from wings_jax.model.wings import Wings
from wings_jax.weights import transfer, transformers_format

torch = pytest.importorskip("torch")

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
# Rows drawn as tiny_model does: t text, i an image; the paddings differ.
ROWS = ["ttitttt", "tttttttttttt", "tittitt", "itttt"]


@pytest.fixture(scope="module")
def code():
    """The module `modeling_wings`, imported as a package of its own."""
    sys.path.insert(0, str(CODE.parent))
    try:
        yield importlib.import_module("transformers_code.modeling_wings")
    finally:
        sys.path.remove(str(CODE.parent))


def torch_model(code, arch, *, attention="sdpa"):
    """Returns the JAX model, its parameters, and the torch model with the same parameters."""
    model = Wings(arch)
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


def torch_inputs(arch, batch: layout.Batch, *, left: bool = False) -> dict:
    """Returns what the torch model reads of a batch of rows with one conversation each."""
    rows = batch.layout
    ids = np.where(rows.modality == layout.IMAGE, IMAGE_TOKEN, rows.tokens)
    used = rows.modality != layout.PADDING
    if left:
        shift = (~used).sum(1)
        ids, used = (
            np.stack([np.roll(x, n) for x, n in zip(part, shift, strict=True)])
            for part in (ids, used)
        )
    mean, std = np.array(arch.vision.mean), np.array(arch.vision.std)
    patches = arch.vision.num_patches
    counts = (rows.modality == layout.IMAGE).sum(1) // patches
    images = [batch.images[row, i] for row, n in enumerate(counts) for i in range(n)]
    inputs = {
        "input_ids": torch.from_numpy(ids.astype(np.int64)),
        "attention_mask": torch.from_numpy(used.astype(np.int64)),
    }
    if images:
        pixels = (np.stack(images).astype(np.float32) / 255 - mean) / std
        pixels = pixels.transpose(0, 3, 1, 2).astype(np.float32)
        inputs["pixel_values"] = torch.from_numpy(np.ascontiguousarray(pixels))
    return inputs


def batch_of(arch, rows: list[str]) -> layout.Batch:
    """Returns a batch with the layout of the model's semantics."""
    batch = tiny_model.batch(rows)
    rows = layout.make_layout(
        batch.layout.tokens,
        batch.layout.modality,
        batch.layout.segments,
        prompt_length=arch.semantics.prompt_length,
    )
    return dataclasses.replace(batch, layout=rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_jax_models(code, name, attention):
    arch = VARIANTS[name]
    model, params, other = torch_model(code, arch, attention=attention)
    batch = batch_of(arch, ROWS)
    wanted = tiny_model.logits(model, params, batch)
    used = batch.layout.modality != layout.PADDING
    with torch.no_grad():
        found = other(**torch_inputs(arch, batch)).logits.numpy()
        left = other(**torch_inputs(arch, batch, left=True)).logits.numpy()
    np.testing.assert_allclose(found[used], wanted[used], atol=1e-4)
    for row, count in enumerate(used.sum(1)):
        np.testing.assert_allclose(left[row, -count:], wanted[row, :count], atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_is_total(name):
    arch = VARIANTS[name]
    flat = tree.flatten(tiny_model.init(Wings(arch)))
    table = transformers_format.wings_rules(arch)
    assert sorted(rule.path for rule in table) == sorted(flat)


@pytest.mark.parametrize("name", [n for n in VARIANTS if not n.startswith("release")])
def test_cached_equals_uncached(code, name):
    arch = VARIANTS[name]
    _, _, other = torch_model(code, arch)
    inputs = torch_inputs(arch, batch_of(arch, ROWS), left=True)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        cached = other.generate(**inputs, **options, use_cache=True)
        uncached = other.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached, uncached)
