"""Parity: the vision tower equals Hugging Face's SigLIP and CLIP at every hidden layer."""

from __future__ import annotations

import dataclasses

import hf_directories
import jax
import numpy as np
import pytest
import transformers

from wings_jax import tree
from wings_jax.model import hf_config, presets, vision
from wings_jax.weights import store

torch = pytest.importorskip("torch")

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "patch_size": 8,
}
FAMILIES = {"siglip": "Siglip", "clip": "CLIP"}


def make_torch(family: str, image_size: int = 40):
    name = FAMILIES[family]
    config = getattr(transformers, f"{name}VisionConfig")(**SIZES, image_size=image_size)
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}VisionModel")(config)
    for key, value in model.named_parameters():
        torch.nn.init.normal_(value, 1.0 if "norm" in key and "weight" in key else 0.0, 0.15)
    return model.eval()


def reference_features(model, arch: presets.VisionArch, pixels: np.ndarray) -> list[np.ndarray]:
    """Returns all hidden states of normalized pixels, without the class token."""
    wide = (pixels.astype(np.float64) / 255 - arch.mean) / np.array(arch.std)
    wide = torch.tensor(wide.transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        states = model(wide, output_hidden_states=True).hidden_states
    return [state.numpy()[:, arch.class_token :] for state in states]


@pytest.mark.parametrize("layer", [1, -2, -1])
@pytest.mark.parametrize("image_size", [40, 44])
@pytest.mark.parametrize("family", FAMILIES)
def test_feature_layers(family: str, image_size: int, layer: int, tmp_path):
    """44 is not a multiple of the patch size: the rest is cut off, as by a `valid` convolution."""
    reference = make_torch(family, image_size)
    reference.save_pretrained(tmp_path / "hf")
    config = store.read_config(tmp_path / "hf")
    arch = hf_config.vision_from_hf(config, feature_layer=layer)
    params = hf_directories.load_vision(tmp_path / "hf", arch)

    pixels = np.random.default_rng(0).integers(0, 256, (2, image_size, image_size, 3), np.uint8)
    features = jax.jit(vision.VisionTower(arch).apply)({"params": params}, pixels)
    expected = reference_features(reference, arch, pixels)
    if layer == 1:
        np.testing.assert_allclose(features, expected[layer], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features, expected[layer], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_import_of_all_key_styles_and_of_full_models(family: str, tmp_path):
    """Keys with and without `vision_model.`, and the vision half of the full model, load alike."""
    reference = make_torch(family)
    name = FAMILIES[family]
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config={**SIZES, "image_size": 40}
    )
    full = getattr(transformers, f"{name}Model")(config)
    # The full model, with the same vision half
    full.vision_model.load_state_dict(reference.state_dict(), strict=True)
    reference.save_pretrained(tmp_path / "v5")
    full.save_pretrained(tmp_path / "full")

    arch = hf_config.vision_from_hf(store.read_config(tmp_path / "v5"))
    assert hf_config.vision_from_hf(store.read_config(tmp_path / "full")) == arch
    tensors = store.open_tensors(tmp_path / "v5")
    bare = {key.removeprefix("vision_model."): t for key, t in tensors.items()}
    for style, prefix in (("bare", ""), ("prefixed", "vision_model.")):
        (tmp_path / style).mkdir()
        store.write_shards(tmp_path / style, {prefix + key: t for key, t in bare.items()})

    first = tree.flatten(hf_directories.load_vision(tmp_path / "v5", arch))
    for style in ("full", "bare", "prefixed"):
        other = tree.flatten(hf_directories.load_vision(tmp_path / style, arch))
        assert first.keys() == other.keys()
        for path, array in first.items():
            np.testing.assert_array_equal(array, other[path], err_msg=f"{style} {path}")


@pytest.mark.parametrize("family", FAMILIES)
def test_export_loads_in_transformers(family: str, tmp_path):
    reference = make_torch(family)
    reference.save_pretrained(tmp_path / "hf")
    arch = hf_config.vision_from_hf(store.read_config(tmp_path / "hf"))
    params = hf_directories.load_vision(tmp_path / "hf", arch)
    hf_directories.save_vision(params, arch, tmp_path / "export")

    again = type(reference).from_pretrained(tmp_path / "export").eval()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    features = reference_features(reference, arch, pixels)[-2]
    np.testing.assert_array_equal(reference_features(again, arch, pixels)[-1], features)

    short = hf_config.vision_from_hf(store.read_config(tmp_path / "export"), feature_layer=-1)
    assert short == dataclasses.replace(arch, num_layers=3, feature_layer=-1)
    back = tree.flatten(hf_directories.load_vision(tmp_path / "export", short))
    for path, array in tree.flatten(params).items():
        np.testing.assert_array_equal(array, back[path])
