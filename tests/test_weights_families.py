"""Families of LLMs: imported and exported again as what they were, and what is refused by name."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import test_parity_decoder as parity
import transformers
import weights_cases
from weights_cases import run

from wings_jax.config import ModelConfig
from wings_jax.errors import UserError
from wings_jax.model import families, hf_config, presets
from wings_jax.weights import hf, sources, starting, store

torch = pytest.importorskip("torch")

CASES = ("mistral_gqa", "qwen3_gqa_tied", "smollm3_gqa_tied")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


def save(case: str, directory: pathlib.Path):
    """Writes a random model with a tokenizer, and returns it."""
    model = parity.make_torch(case)
    model.resize_token_embeddings(320)
    model.save_pretrained(directory)
    weights_cases.save_tokenizer(directory)
    return model


@pytest.mark.parametrize("case", CASES)
def test_an_llm_comes_back_as_what_it_was(case: str, tmp_path):
    """Every tensor bit for bit, the same class of transformers, the same logits."""
    model = save(case, tmp_path / "hf")
    run("import", "--llm", tmp_path / "hf", "--out", tmp_path / "base")
    flags = ("--checkpoint", tmp_path / "base", "--format", "llm", "--out", tmp_path / "back")
    run("export", *flags)
    arrays = weights_cases.read_arrays(tmp_path / "back")
    expected = weights_cases.read_arrays(tmp_path / "hf")
    assert arrays.keys() == expected.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, expected[key])

    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(other) is type(model)
    tokens = torch.arange(70)[None] % 60
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_a_config_of_each_family_survives(model_type: str):
    """`decoder_from_hf` and `llm_config` are inverse, and transformers reads the result."""
    arch = hf_config.decoder_from_hf({**SIZES, "model_type": model_type})
    entries = hf.llm_config(arch, model_type=model_type)
    assert entries["model_type"] == model_type
    assert hf_config.decoder_from_hf(entries) == arch
    config = transformers.AutoConfig.for_model(**entries)
    assert hf_config.decoder_from_hf(config.to_dict()) == arch


def test_layers_without_rope_are_read_as_a_list_or_an_interval():
    entries = {**SIZES, "model_type": "smollm3"}
    assert hf_config.decoder_from_hf(entries).no_rope_layers == (3,)
    entries["no_rope_layer_interval"] = 2
    assert hf_config.decoder_from_hf(entries).no_rope_layers == (1, 3)
    entries["no_rope_layers"] = [1, 1, 0, 1]
    assert hf_config.decoder_from_hf(entries).no_rope_layers == (2,)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not one of qwen2, llama, mistral, qwen3"),
        ({"model_type": "qwen2_vl", "vision_config": {}}, "give the directory of its LLM alone"),
        ({"model_type": "llava_next"}, r"several tiles \(anyres\) are not supported"),
        (
            {"model_type": "mistral", "sliding_window": 64, "max_position_embeddings": 512},
            "sliding_window 64 is not supported.*set max_position_embeddings to 64",
        ),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window True is not"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias True is not supported"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "is not a list of 4 numbers"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2, 1, 1]}, "each 0 or 1"),
    ],
)
def test_what_a_family_does_not_compute_is_refused(entries: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        hf_config.decoder_from_hf({**SIZES, **entries})
    assert "\n" not in str(caught.value)


def test_a_window_of_the_whole_context_changes_nothing():
    entries = {**SIZES, "model_type": "mistral", "max_position_embeddings": 512}
    arch = hf_config.decoder_from_hf(entries)
    assert hf_config.decoder_from_hf({**entries, "sliding_window": 512}) == arch


def test_learners_need_a_width_of_whole_heads(tmp_path):
    config = transformers.Qwen3Config(**SIZES, head_dim=24)
    config.save_pretrained(tmp_path)
    model = ModelConfig(llm=str(tmp_path), learners=("visual",))
    with pytest.raises(UserError, match=r"config\.model\.learners: .* width 32 and head width 24"):
        starting.resolve_arch(model)


def test_siglip2_of_fixed_resolution_is_a_siglip_that_resizes_bilinearly(tmp_path):
    """A full SigLIP2 model, as the hub has it; NaFlex is refused by name."""
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.SiglipConfig(
        text_config={**text, "num_attention_heads": 2}, vision_config=weights_cases.VISION
    )
    weights_cases.save_random(transformers.SiglipModel(config), tmp_path)
    processor = {"image_processor_type": "SiglipImageProcessor", "resample": 2}
    (tmp_path / hf.PROCESSOR_FILE).write_text(store.dump_json(processor))
    arch = hf.read_vision_arch(tmp_path)
    assert arch.resample == "bilinear"
    assert sources.vision_part(tmp_path, arch).tensors
    assert hf.processor_config(arch)["resample"] == 2
    assert presets.VISION["siglip2_base_224"].resample == "bilinear"

    weights_cases.edit_config(tmp_path, vision_config={"model_type": "siglip2_vision_model"})
    with pytest.raises(UserError, match=r"images of any shape \(NaFlex\)"):
        hf.read_vision_arch(tmp_path)
