"""Every preset at full size, without memory: our parameters are Hugging Face's, one to one."""

from __future__ import annotations

import math

import pytest
import transformers

from wings_jax.model import parameters, presets
from wings_jax.weights import hf, release, transfer

torch = pytest.importorskip("torch")

# Parameters of the LLMs as their makers count them.
TOTALS = {
    "qwen1_5_0_5b": 463_987_712,
    "qwen1_5_1_8b": 1_836_828_672,
    "qwen1_5_7b": 7_721_324_544,
    "vicuna_7b": 6_738_415_616,
    "llama3_1_8b": 8_030_261_248,
    "smollm2_135m": 134_515_008,
}
TINY_TOWER = presets.VISION["siglip_base_224"]


def on_meta(config) -> dict:
    """Returns the state dict's keys and shapes of a full-size HF model without any memory."""
    maker = {
        "siglip_vision_model": transformers.SiglipVisionModel,
        "clip_vision_model": transformers.CLIPVisionModel,
        "qwen2": transformers.Qwen2ForCausalLM,
        "llama": transformers.LlamaForCausalLM,
    }[config.model_type]
    with torch.device("meta"):
        return dict(maker(config).named_parameters())


def size(tensors) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


@pytest.mark.parametrize("name", presets.DECODERS)
def test_decoders(name: str):
    arch = presets.DECODERS[name]
    entries = hf.llm_config(arch)
    theirs = on_meta(transformers.AutoConfig.for_model(**entries))
    assert presets.decoder_from_hf(entries) == arch
    model = parameters.abstract_params(presets.WingsArch(arch, TINY_TOWER))
    ours = {k.removeprefix("decoder/"): s for k, s in model.items() if k.startswith("decoder/")}
    plan = transfer.plan_import(hf.decoder_rules(arch), theirs, ours)
    assert not plan.unfilled_paths
    assert not plan.unused_keys
    assert size(ours.values()) == size(theirs.values()) == TOTALS[name]


@pytest.mark.parametrize("name", presets.VISION)
def test_towers(name: str):
    arch = presets.VISION[name]
    entries = hf.vision_config(arch) | {"num_hidden_layers": arch.num_layers}
    entries.pop("vision_use_head", None)
    config = transformers.AutoConfig.for_model(**entries)
    theirs = hf.vision_tensors(on_meta(config), name)
    model = parameters.abstract_params(presets.WingsArch(presets.DECODERS["smollm2_135m"], arch))
    ours = {k.removeprefix("vision/"): s for k, s in model.items() if k.startswith("vision/")}
    plan = transfer.plan_import(
        hf.vision_rules(arch), theirs, ours, ignorable=hf.vision_ignorable(arch)
    )
    assert not plan.unfilled_paths
    left = size(theirs[key] for key in plan.unused_keys)
    assert size(ours.values()) == size(theirs.values()) - left
    head = {key for key in plan.unused_keys if not key.startswith("encoder.layers.")}
    assert all(key.startswith("head.") for key in head)
    last = {key.split(".")[2] for key in set(plan.unused_keys) - head}
    assert last == {str(arch.num_layers - 1)}


def test_the_release_checkpoint():
    """Wings-Qwen1.5-7B, stage 2: 1388 tensors, 8.275 B parameters, each with one place."""
    arch = presets.WingsArch(
        presets.DECODERS["qwen1_5_7b"],
        presets.VISION["siglip_so400m_384"],
        learners=("visual", "textual"),
        router=True,
        rank=64,
    )
    ours = parameters.abstract_params(arch)
    table = release.release_rules(arch)
    keys = [key for rule in table for key in rule.hf_keys(ours[rule.path].shape)]
    assert len(keys) == len(set(keys)) == 1388
    assert {rule.path for rule in table} == set(ours)
    assert round(size(ours.values()) / 1e9, 3) == 8.275
    groups = {
        "decoder/layers/visual": 67.1,
        "decoder/layers/textual": 67.1,
        "decoder/layers/router": 0.26,
        "vision": 397.8,
        "projector": 21.5,
    }
    for group, millions in groups.items():
        got = size(s for path, s in ours.items() if path.startswith(group + "/")) / 1e6
        assert got == pytest.approx(millions, abs=0.06), group
