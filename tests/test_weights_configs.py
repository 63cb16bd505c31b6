"""Config files as people have them: missing and wrong entries, processors, LLaVA's entries."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest
import transformers
import weights_cases
from weights_cases import edit_config

from wings_jax.errors import UserError
from wings_jax.model import hf_config
from wings_jax.weights import hf, release_import, release_settings, sources, store

VISION = {**weights_cases.VISION, "model_type": "siglip_vision_model"}
CLIP = {**weights_cases.VISION, "model_type": "clip_vision_model"}


@pytest.fixture
def llm(tmp_path) -> pathlib.Path:
    """A copy of the small LLM, to be changed."""
    return shutil.copytree(weights_cases.sources() / "llm", tmp_path / "llm")


@pytest.fixture
def tower(tmp_path) -> pathlib.Path:
    """A copy of the small SigLIP, to be changed."""
    return shutil.copytree(weights_cases.sources() / "tower", tmp_path / "tower")


@pytest.fixture
def llava(tmp_path) -> pathlib.Path:
    """A copy of the small LLaVA in the release's layout, to be changed."""
    return shutil.copytree(weights_cases.sources() / "llava", tmp_path / "llava")


def test_deep_configs_are_refused(llm):
    edit_config(llm, num_hidden_layers=10**9)
    with pytest.raises(UserError, match="num_hidden_layers 1000000000 is not a whole number from"):
        sources.from_llm(llm)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size '32' is not a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 is not a whole number"),
        ({"num_attention_heads": 5, "head_dim": None}, "not a multiple of the 5 heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of 3"),
        ({"vocab_size": True}, "vocab_size True is not a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps '1e-6' is not a number"),
        ({"rope_scaling": ["linear"], "rope_parameters": None}, "is not a JSON object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn' is not one of"),
        ({"layer_types": ["sliding_attention"]}, "layer_types 'sliding_attention'"),
        ({"use_sliding_window": True}, "use_sliding_window True is not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes' is not true or false"),
    ],
)
def test_entries_of_config_json_are_named(llm, entries: dict, message: str):
    edit_config(llm, **entries)
    with pytest.raises(UserError, match=message) as caught:
        sources.from_llm(llm)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_null_entries_are_defaults(llm):
    edit_config(llm, head_dim=None, num_key_value_heads=None, max_position_embeddings=None)
    arch = hf_config.decoder_from_hf(store.read_config(llm))
    assert (arch.head_dim, arch.num_kv_heads, arch.max_positions) == (8, 4, 2048)


# Towers and processors


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hidden_size": 17}, "hidden_size 17 is not a multiple of the 2 heads"),
        ({"image_size": "28"}, "image_size '28' is not a whole number"),
        ({"patch_size": 29}, "patch_size 29 is not a whole number from 1 to 28"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"num_channels": 1}, "num_channels 1 is not supported"),
        ({"vision_feature_layer": 7}, "vision_feature_layer 7 of 3 layers"),
        ({"vision_feature_layer": [1, 2]}, r"vision_feature_layer \[1, 2\] is not a whole number"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy 'cls'"),
        ({"quantization_config": {"quant_method": "bnb"}}, "quantized with 'bnb'"),
        ({"vision_config": 3}, "3 is not a JSON object"),
    ],
)
def test_entries_of_a_tower_are_named(entries: dict, message: str):
    with pytest.raises(UserError, match=message):
        hf_config.vision_from_hf({**VISION, **entries})


def test_the_layer_of_a_multimodal_config_is_used():
    """llava-hf has it beside `vision_config`."""
    arch = hf_config.vision_from_hf({"vision_config": CLIP, "vision_feature_layer": -1})
    assert arch.feature_layer == -1
    assert hf_config.vision_from_hf({"vision_config": CLIP}).feature_layer == -2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    ],
)
def test_processors_give_the_same_pixels_as_in_transformers(changes: dict):
    size = {"height": 28, "width": 28}
    processor = transformers.SiglipImageProcessor(size=size, **changes)
    arch = hf_config.vision_from_hf(VISION, processor.to_dict())
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    expected = processor(pixels, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    normalized = (pixels / 255 - np.array(arch.mean)) / np.array(arch.std)
    np.testing.assert_allclose(normalized, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"do_resize": False}, "do_resize False is not supported"),
        ({"resample": 1}, "resample 1 is not supported, only 3 or 2"),
        ({"size": {"height": 56, "width": 56}}, "size .* is not the tower's image_size, 28"),
        ({"size": {"shortest_edge": 30}}, "size .* is not the tower's image_size, 28"),
        ({"crop_size": 14}, "crop_size 14 is not the tower's image_size, 28"),
        ({"image_mean": [0.5]}, r"image_mean \[0.5\] is not a list of 3 numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std .* is not a list of 3 numbers above 0"),
        ({"do_normalize": "no"}, "do_normalize 'no' is not true or false"),
        ([1], "is not a JSON object"),
    ],
)
def test_processors_that_do_something_else_are_refused(entries, message: str):
    with pytest.raises(UserError, match=f"preprocessor_config.json: .*{message}"):
        hf_config.vision_from_hf(VISION, entries)


def test_the_nested_processor_of_transformers_5_precedes(tower):
    (tower / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.1, 0.1]}))
    assert hf.read_vision_arch(tower).mean == (0.1, 0.1, 0.1)
    nested = {"processor_class": "X", "image_processor": {"image_mean": [0.2, 0.2, 0.2]}}
    (tower / "processor_config.json").write_text(json.dumps(nested))
    assert hf.read_vision_arch(tower).mean == (0.2, 0.2, 0.2)
    (tower / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    assert hf.read_vision_arch(tower).mean == (0.1, 0.1, 0.1)


# The entries of LLaVA and of the release


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer -1 is not supported for SigLIP"),
        ({"mm_vision_select_layer": "x"}, "mm_vision_select_layer 'x' is not a whole number"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres' is not supported"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio 'square' is not supported"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True is not supported"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type 'spatial_unpad'"),
    ],
)
def test_entries_of_llava_are_refused_by_name(llava, entries: dict, message: str):
    edit_config(llava, **entries)
    with pytest.raises(UserError, match=f"config.json: {message}"):
        release_import.from_release(llava, weights_cases.sources() / "tower")


@pytest.mark.parametrize(("layer", "built"), [(-1, 3), (-2, 2), (1, 1)])
def test_the_layer_of_a_clip_tower_is_used(layer: int, built: int):
    tower = hf_config.vision_from_hf(CLIP)
    arch = release_settings.check_llava_entries({"mm_vision_select_layer": layer}, tower, "c")
    assert (arch.feature_layer, arch.built_layers) == (layer, built)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": ["llava"]}, r"model_type \['llava'\] is not one of"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"mm_projector_type": "resampler"}, "mm_projector_type: 'resampler' is not one of"),
        ({"wings_jax": 3}, "wings_jax: 3 is not a JSON object"),
        ({"wings_jax": {"gain": "2"}}, "wings_jax.gain: '2' is not of type float"),
        ({"wings_jax": {"vision": {"x": 1}}}, "wings_jax.vision.x: no such key"),
    ],
)
def test_wrong_entries_of_a_release_config_are_named(llava, entries: dict, message: str):
    edit_config(llava, **entries)
    if "mm_projector_type" in entries:
        arrays = weights_cases.read_arrays(llava)
        others = {key: array for key, array in arrays.items() if "mm_projector" not in key}
        weights_cases.rewrite(llava, others)
    with pytest.raises(UserError, match=message) as caught:
        release_import.from_release(llava, weights_cases.sources() / "tower")
    assert "\n" not in str(caught.value)
