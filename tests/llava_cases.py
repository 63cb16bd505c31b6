"""Small random LLaVA models of transformers, as directories in every layout of their keys."""

from __future__ import annotations

import atexit
import functools
import json
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
import tokenizers
import transformers
import weights_cases

from wings_jax.weights import store

torch = pytest.importorskip("torch")

TEXT = {
    **weights_cases.LLM,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
VISION = {**weights_cases.VISION, "num_hidden_layers": 3}
IMAGE_TOKEN_ID = 259
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
CASES = {
    # family, its options, tower, hidden layer, strategy
    "llama_clip": ("llama", {}, CLIP, -2, "default"),
    "llama_clip_full": ("llama", {"num_key_value_heads": 1}, CLIP, -1, "full"),
    "qwen2_tied_siglip": ("qwen2", {"tie_word_embeddings": True}, SIGLIP, -1, "full"),
    "mistral_siglip_default": ("mistral", {"sliding_window": None}, SIGLIP, 1, "default"),
    "qwen3_clip": ("qwen3", {"head_dim": 16}, CLIP, -2, "default"),
}


def save_llava(directory: pathlib.Path, case: str, *, dtype=torch.float32) -> None:
    """Writes a random model as transformers does, with a tokenizer and a processor."""
    family, options, tower, layer, strategy = CASES[case]
    config = transformers.LlavaConfig(
        text_config=transformers.AutoConfig.for_model(family, **{**TEXT, **options}),
        vision_config=transformers.AutoConfig.for_model(tower, **VISION),
        image_token_index=IMAGE_TOKEN_ID,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    torch.manual_seed(3)
    for name, value in model.named_parameters():
        torch.nn.init.normal_(value, 1.0 if "norm" in name else 0.0, 0.15)
    model.to(dtype).save_pretrained(directory)

    # The tokenizer of the small LLM, with the token that stands for a slot of an image.
    weights_cases.save_tokenizer(directory)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert backend.add_special_tokens(["<image>"]) == 1
    assert backend.token_to_id("<image>") == IMAGE_TOKEN_ID
    backend.save(str(directory / "tokenizer.json"))
    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    processor = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "crop_size": size}
    processor |= {"size": {"shortest_edge": VISION["image_size"]}}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))


@functools.cache
def root() -> pathlib.Path:
    """Returns the directory of the test session's models."""
    directory = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    return directory


def saved(case: str) -> pathlib.Path:
    """Returns the directory of a case, written once."""
    directory = root() / case
    if not directory.exists():
        save_llava(directory, case)
    return directory


def open_torch(directory: pathlib.Path):
    """Returns the model of transformers in float32."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32
    )
    return model.eval()


def pixel_values(images: np.ndarray, vision) -> torch.Tensor:
    """Returns f32[n,3,h,w] of images u8[n,h,w,3], normalized as the tower's processor does."""
    pixels = (images.astype(np.float64) / 255 - np.array(vision.mean)) / np.array(vision.std)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32))


def rename_keys(directory: pathlib.Path, prefixes: dict[str, str]) -> None:
    """Renames the tensors of a directory: the first prefix that matches is replaced."""
    renamed = {}
    for key, array in weights_cases.read_arrays(directory).items():
        prefix = next((each for each in prefixes if key.startswith(each)), "")
        renamed[prefixes.get(prefix, "") + key.removeprefix(prefix)] = array
    weights_cases.rewrite(directory, renamed)


def config_of(directory: pathlib.Path) -> dict:
    return store.read_config(directory)
