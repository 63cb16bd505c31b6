"""llava-hf directories: imported with the same numbers, exported for transformers."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shutil

import jax
import llava_cases as cases
import numpy as np
import pytest
import transformers
import weights_cases
from PIL import Image
from weights_cases import run

import wings_jax
from wings_jax import checkpoint, tree
from wings_jax.data import chat_template, conversation, images
from wings_jax.errors import UserError
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model import hf_config, layout, parameters, presets, wings
from wings_jax.weights import hf, imports, llava, llava_export, transfer
from wings_jax.weights.tensors import WeightsError

torch = pytest.importorskip("torch")

IMAGES = np.random.default_rng(2).integers(0, 256, (2, 28, 28, 3), np.uint8)
# transformers 5 in memory, and 4 with the tower's own prefix.
LAYOUTS = {
    "5": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "4": {"vision_tower.": "vision_tower.vision_model."},
}


def load(spec: imports.ImportSpec) -> dict:
    steps, _ = imports.plan_parts(spec)
    return imports.load_parts(steps)


@pytest.fixture
def copied(tmp_path) -> pathlib.Path:
    """A copy of a small LLaVA, to be changed."""
    return shutil.copytree(cases.saved("llama_clip"), tmp_path / "llava")


@pytest.mark.parametrize("case", cases.CASES)
def test_logits_equal_those_of_transformers(case: str):
    """80 and more slots: text, an image, text, an image, text; 1e-4."""
    directory = cases.saved(case)
    spec = llava.from_llava(directory)
    patches = spec.arch.vision.num_patches
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, n) for n in (9, 30, 41)]
    image = np.full(patches, cases.IMAGE_TOKEN_ID)
    tokens = np.concatenate([parts[0], image, parts[1], image, parts[2]])[None]
    with torch.no_grad():
        expected = cases.open_torch(directory)(
            input_ids=torch.tensor(tokens),
            pixel_values=cases.pixel_values(IMAGES, spec.arch.vision),
        ).logits.numpy()

    params = tree.nest(load(spec))
    is_image = tokens == cases.IMAGE_TOKEN_ID
    rows = layout.make_layout(
        np.where(is_image, 0, tokens), np.where(is_image, layout.IMAGE, layout.TEXT)
    )
    batch = layout.Batch(rows, tokens, IMAGES[None])
    model = wings.Wings(spec.arch)

    @jax.jit
    def run_model(params):
        hidden = model.apply({"params": params}, batch)
        return model.apply({"params": params}, hidden, method=wings.Wings.logits)

    np.testing.assert_allclose(run_model(params), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", [*LAYOUTS, "torch file"])
def test_every_layout_of_keys_is_read(name: str, copied):
    expected = load(llava.from_llava(cases.saved("llama_clip")))
    if name == "torch file":
        weights_cases.rewrite(copied, weights_cases.read_arrays(copied))
        arrays = weights_cases.read_arrays(copied)
        (copied / "model.safetensors").unlink()
        state = {key: torch.from_numpy(array) for key, array in arrays.items()}
        torch.save(state, copied / "pytorch_model.bin")
    else:
        cases.rename_keys(copied, LAYOUTS[name])
    found = load(llava.from_llava(copied))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)


@pytest.mark.parametrize("case", ["llama_clip", "qwen2_tied_siglip"])
def test_an_export_runs_in_transformers_as_here(case: str, tmp_path):
    """Same ids, same pixels (of an image that is not a square), same greedy answer."""
    base, exported = tmp_path / "base", tmp_path / "hf"
    run("import", "--llava", cases.saved(case), "--out", base)
    run("export", "--checkpoint", base, "--format", "llava", "--out", exported)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 47, 3), np.uint8))
    image.save(tmp_path / "image.png")

    model = wings_jax.load(base)
    turns = [{"from": "human", "value": "<image>\nWhat is red?"}]
    settings = SamplingParams(max_new_tokens=10)
    request = Request(turns, (tmp_path / "image.png",), settings)
    answer = list(model.generate(request).tokens)

    processor = transformers.AutoProcessor.from_pretrained(exported)
    parts = [{"type": "image", "path": str(tmp_path / "image.png")}]
    parts.append({"type": "text", "text": "What is red?"})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    # The prompt: each image is P times its token; the pixels are those of the tower's input.
    opened = checkpoint.load(base)
    template = chat_template.template_from_settings(opened.config.data, opened.tokenizer)
    encoded = conversation.encode(turns, opened.tokenizer, template, open_answer=True)
    slots = conversation.expand(encoded, opened.arch.vision.num_patches)
    wanted = np.where(slots.modality == layout.IMAGE, cases.IMAGE_TOKEN_ID, slots.tokens)
    assert inputs["input_ids"][0].tolist() == wanted.tolist()
    tower = opened.arch.vision
    pixels = images.prepare_image(images.load_image(image), tower.image_size, tower.mean)
    wanted_pixels = cases.pixel_values(pixels[None], tower)
    np.testing.assert_allclose(inputs["pixel_values"], wanted_pixels, atol=1e-6)

    other = cases.open_torch(exported)
    with torch.no_grad():
        output = other.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert output[0, inputs["input_ids"].shape[1] :].tolist()[: len(answer)] == answer


@pytest.mark.parametrize("case", cases.CASES)
def test_a_round_trip_is_exact(case: str, tmp_path):
    """Left out are the tower's layers behind its features."""
    source = cases.saved(case)
    first, second = tmp_path / "first", tmp_path / "second"
    run("import", "--llava", source, "--out", first)
    run("export", "--checkpoint", first, "--format", "llava", "--out", tmp_path / "hf")
    arrays = weights_cases.read_arrays(tmp_path / "hf")
    arrays = {
        k.replace("vision_tower.vision_model.", "vision_tower."): a for k, a in arrays.items()
    }
    original = weights_cases.read_arrays(source)
    assert arrays.keys() <= original.keys()
    left_out = original.keys() - arrays.keys()
    unused = ("vision_tower.encoder.layers.", "vision_tower.head.")
    assert all(key.startswith(unused) for key in left_out)
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, original[key])

    run("import", "--llava", tmp_path / "hf", "--out", second)
    before, after = checkpoint.load(first), checkpoint.load(second)
    assert after.arch == before.arch
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    family = cases.CASES[case][0]
    assert cases.config_of(tmp_path / "hf")["text_config"]["model_type"] == family


def test_an_embedding_without_a_row_for_the_image_token_grows(tmp_path):
    """The new rows are never generated: their logits would be 0."""
    directory = shutil.copytree(cases.saved("llama_clip"), tmp_path / "llava")
    arrays = weights_cases.read_arrays(directory)
    for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        arrays[key] = arrays[key][:259]
    weights_cases.rewrite(directory, arrays)
    text_config = {**cases.config_of(directory)["text_config"], "vocab_size": 259}
    weights_cases.edit_config(directory, text_config=text_config)
    weights_cases.save_tokenizer(directory)  # without <image>

    run("import", "--llava", directory, "--out", tmp_path / "base")
    run("export", "--checkpoint", tmp_path / "base", "--format", "llava", "--out", tmp_path / "hf")
    model = cases.open_torch(tmp_path / "hf")
    assert model.lm_head.weight.shape == (320, 32)
    assert model.config.image_token_index == 259
    assert model.generation_config.suppress_tokens == list(range(259, 320))


# The full size


LLAVA_1_5 = {
    "image_token_index": 32000,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def test_llava_1_5_7b_has_the_parameters_of_the_model():
    """Its `config.json` leaves out all sizes that are the defaults of transformers."""
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(**{k: v for k, v in LLAVA_1_5.items() if k != "model_type"})
        )
    tensors = dict(model.named_parameters())
    text_config = llava.read_text_config(LLAVA_1_5, "config.json", has_head=True)
    arch = presets.WingsArch(
        hf_config.decoder_from_hf(text_config), hf_config.vision_from_hf(LLAVA_1_5)
    )
    assert arch.decoder == dataclasses.replace(presets.DECODERS["vicuna_7b"], vocab_size=32064)
    assert arch.vision == presets.VISION["clip_large_336"]

    llm, projector, tower = llava.split_tensors(tensors)
    assert len(llm) + len(projector) + len(tower) == len(tensors)
    params = parameters.abstract_params(arch)
    tower = hf.vision_tensors(tower, "llava")
    parts = {
        "decoder/": (hf.decoder_rules(arch.decoder), llm, ()),
        "projector/": (llava.PROJECTOR_RULES, projector, ()),
        "vision/": (hf.vision_rules(arch.vision), tower, hf.vision_ignorable(arch.vision)),
    }
    for prefix, (table, found, ignorable) in parts.items():
        part = {k.removeprefix(prefix): s for k, s in params.items() if k.startswith(prefix)}
        plan = transfer.plan_import(table, found, part, ignorable=ignorable)
        assert not plan.unfilled_paths


# Mistakes


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "llava_next"}, "splits an image into several tiles"),
        ({"model_type": "idefics"}, "model_type 'idefics' is not 'llava'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu' is not supported"),
        ({"vision_feature_layer": [-2, -5]}, r"\[-2, -5\] joins several hidden states"),
        ({"vision_feature_select_strategy": "cls"}, "strategy 'cls' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized with 'awq'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(copied, entries, message, tmp_path, capsys):
    weights_cases.edit_config(copied, **entries)
    with pytest.raises(SystemExit) as caught:
        run("import", "--llava", copied, "--out", tmp_path / "out")
    assert caught.value.code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "config.json" in line
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


def test_a_text_config_without_a_window_has_that_of_transformers(tmp_path):
    """Older files leave out what is the default of transformers, for Mistral a window of 4096."""
    text_config = {"model_type": "mistral", "max_position_embeddings": 32768}
    config = {"model_type": "llava", "text_config": {**text_config, "sliding_window": None}}
    whole = llava.read_text_config(config, "config.json", has_head=True)
    assert hf_config.decoder_from_hf(whole).max_positions == 32768

    config["text_config"] = text_config
    whole = llava.read_text_config(config, "config.json", has_head=True)
    with pytest.raises(UserError, match="sliding_window 4096 is not supported"):
        hf_config.decoder_from_hf(whole)


def test_a_llava_given_as_an_llm_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("import", "--llm", cases.saved("llama_clip"), "--out", tmp_path / "out")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "model_type 'llava' is a multimodal model, not an LLM" in line
    assert "--llava" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learners": ("visual",)}, "no place for learners .visual.: --format transformers or"),
        ({"projector": "linear"}, "this one is linear: --format transformers can hold it"),
        ({"prefix_length": 2}, "other formats cannot hold decoder/layers/prefix"),
    ],
)
def test_models_that_llava_cannot_hold_are_refused(changes, message):
    spec = llava.from_llava(cases.saved("llama_clip"))
    arch = dataclasses.replace(spec.arch, **changes)
    with pytest.raises(WeightsError, match=message):
        llava_export.as_llava(parameters.abstract_params(arch), arch)
