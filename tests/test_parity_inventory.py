"""Inventory: presets at full size have exactly the parameters of the Hugging Face models."""

from __future__ import annotations

import math

import pytest
import transformers

from wings_jax.model import families, hf_config, parameters, presets
from wings_jax.weights import hf, release, transfer

torch = pytest.importorskip("torch")

# Published numbers of parameters.
TOTALS = {
    "qwen1_5_0_5b": 463_987_712,
    "qwen1_5_1_8b": 1_836_828_672,
    "qwen1_5_7b": 7_721_324_544,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "vicuna_7b": 6_738_415_616,
    "vicuna_13b": 13_015_864_320,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b": 7_248_023_552,
    "tinyllama_1_1b": 1_100_048_384,
    "smollm2_135m": 134_515_008,
    "smollm3_3b": 3_075_098_624,
}
TINY_TOWER = presets.VISION["siglip_base_224"]


def on_meta(config) -> dict:
    """Returns the parameters of a full-size HF model on the meta device, without allocating."""
    towers = {
        "siglip_vision_model": transformers.SiglipVisionModel,
        "clip_vision_model": transformers.CLIPVisionModel,
    }
    maker = towers.get(config.model_type)
    if maker is None:
        maker = getattr(transformers, families.FAMILIES[config.model_type].class_name)
    with torch.device("meta"):
        return dict(maker(config).named_parameters())


def size(tensors) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


@pytest.mark.parametrize("name", presets.DECODERS)
def test_every_decoder_has_the_parameters_of_hugging_face(name: str):
    arch = presets.DECODERS[name]
    entries = hf.llm_config(arch)
    hf_tensors = on_meta(transformers.AutoConfig.for_model(**entries))
    assert hf_config.decoder_from_hf(entries) == arch

    model = parameters.abstract_params(presets.WingsArch(arch, TINY_TOWER))
    params = {k.removeprefix("decoder/"): s for k, s in model.items() if k.startswith("decoder/")}
    plan = transfer.plan_import(hf.decoder_rules(arch), hf_tensors, params)
    assert not plan.unfilled_paths
    assert not plan.unused_keys
    assert size(params.values()) == size(hf_tensors.values()) == TOTALS[name]


@pytest.mark.parametrize("name", presets.VISION)
def test_every_tower_has_the_parameters_of_hugging_face(name: str):
    arch = presets.VISION[name]
    entries = hf.vision_config(arch) | {"num_hidden_layers": arch.num_layers}
    entries.pop("vision_use_head", None)
    config = transformers.AutoConfig.for_model(**entries)
    hf_tensors = hf.vision_tensors(on_meta(config), name)

    model = parameters.abstract_params(presets.WingsArch(presets.DECODERS["smollm2_135m"], arch))
    params = {k.removeprefix("vision/"): s for k, s in model.items() if k.startswith("vision/")}
    plan = transfer.plan_import(
        hf.vision_rules(arch), hf_tensors, params, ignorable=hf.vision_ignorable(arch)
    )
    assert not plan.unfilled_paths

    # Ignored are the pooling head, and the layer after the one that is read.
    ignored_size = size(hf_tensors[key] for key in plan.unused_keys)
    assert size(params.values()) == size(hf_tensors.values()) - ignored_size
    head = {key for key in plan.unused_keys if not key.startswith("encoder.layers.")}
    assert all(key.startswith("head.") for key in head)
    last_layers = {key.split(".")[2] for key in set(plan.unused_keys) - head}
    assert last_layers == {str(arch.num_layers - 1)}


def test_the_release_checkpoint_has_the_parameters_of_the_model():
    """Wings-Qwen1.5-7B, stage 2: 1388 tensors, 8.275 B parameters, each imported once."""
    arch = presets.WingsArch(
        presets.DECODERS["qwen1_5_7b"],
        presets.VISION["siglip_so400m_384"],
        learners=("visual", "textual"),
        router=True,
        rank=64,
    )

    params = parameters.abstract_params(arch)
    keys = [
        key for rule in release.release_rules(arch) for key in rule.hf_keys(params[rule.path].shape)
    ]
    assert len(keys) == len(set(keys)) == 1388
    assert {rule.path for rule in release.release_rules(arch)} == set(params)
    assert round(size(params.values()) / 1e9, 3) == 8.275

    groups = {
        "decoder/layers/visual": 67.1,
        "decoder/layers/textual": 67.1,
        "decoder/layers/router": 0.26,
        "vision": 397.8,
        "projector": 21.5,
    }
    for group, millions in groups.items():
        millions_found = size(s for path, s in params.items() if path.startswith(group + "/")) / 1e6
        assert millions_found == pytest.approx(millions, abs=0.06), group
