"""The tiny base model that ships: small, readable by transformers, and good at its tasks."""

from __future__ import annotations

import importlib.resources
import os
import pathlib
import random
import subprocess
import sys

import hf_directories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from wings_jax.data import conversation
from wings_jax.model import hf_config, layout, presets, vision, wings
from wings_jax.scenes import drawings, questions, skills
from wings_jax.weights import store

BASE = pathlib.Path(str(importlib.resources.files("wings_jax"))) / "assets" / "tiny"
CHATML = conversation.TEMPLATES["chatml"]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(BASE / "llm")


@pytest.fixture(scope="module")
def llm():
    arch = hf_config.decoder_from_hf(store.read_config(BASE / "llm"))
    return arch, hf_directories.load_llm(BASE / "llm", arch)


@pytest.fixture(scope="module")
def tower():
    arch = hf_config.vision_from_hf(store.read_config(BASE / "vision"))
    return arch, hf_directories.load_vision(BASE / "vision", arch)


def logits(llm, tokens):
    """Returns f32[B,T,V] of text rows i32[B,T], 0 for padding at the right."""
    arch, params = llm
    rows = layout.make_layout(tokens, np.where(tokens > 0, layout.TEXT, layout.PADDING))
    images = np.zeros((len(tokens), 0, 8, 8, 3), np.uint8)
    model = wings.Wings(presets.WingsArch(arch, None))
    variables = {"params": {"decoder": params}}
    hidden = model.apply(variables, layout.Batch(rows, tokens, images))
    return np.asarray(model.apply(variables, hidden, method=wings.Wings.logits))


def test_it_is_at_most_two_megabytes():
    assert sum(f.stat().st_size for f in BASE.rglob("*") if f.is_file()) <= 2_000_000


def test_the_tokenizer_encodes_any_text_and_answers_in_few_tokens(tokenizer):
    for text in ("Ünïcode 你好 🙂\n\ttabs", "7 + 12 = ?", "<image>\nWhat is red?"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for word in (*drawings.DIGITS, *drawings.THINGS, *drawings.COLORS, "yes", "no"):
        assert len(tokenizer(word).input_ids) == 1, word
        assert len(tokenizer(f" {word}").input_ids) <= 2, word
    for place in drawings.PLACES:
        assert len(tokenizer(place).input_ids) == 2
    assert tokenizer.eos_token == "<|im_end|>"
    assert conversation.get_template_for(tokenizer) == "chatml"


def test_its_chat_template_equals_the_training_template(tokenizer):
    turns = [{"from": "human", "value": "What is 3 plus 4?"}]
    messages = [{"role": "user", "content": turns[0]["value"]}]
    ids = conversation.encode(turns, tokenizer, CHATML, open_answer=True).ids
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(ids) == list(expected)


def test_the_llm_answers_the_text_skills(llm, tokenizer):
    rng, accuracies = random.Random(5), []
    for name in skills.SKILLS:
        samples = [skills.sample(rng, name, "test") for _ in range(60)]
        turns = [
            [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            for question, answer in samples
        ]

        rows = [conversation.expand(conversation.encode(t, tokenizer, CHATML), 1) for t in turns]
        width = max(len(row.tokens) for row in rows)
        tokens = np.stack([np.pad(r.tokens, (0, width - len(r.tokens))) for r in rows])
        targets = np.stack(
            [
                np.pad(r.targets, (0, width - len(r.targets)), constant_values=layout.IGNORE)
                for r in rows
            ]
        )

        is_wrong = (logits(llm, tokens).argmax(-1) != targets) & (targets != layout.IGNORE)
        accuracies.append(np.mean(~is_wrong.any(1)))
    assert np.mean(accuracies) >= 0.95, dict(zip(skills.SKILLS, accuracies, strict=True))


def test_transformers_reads_the_llm(llm):
    torch = pytest.importorskip("torch")
    reference = transformers.AutoModelForCausalLM.from_pretrained(BASE / "llm", dtype="float32")
    tokens = np.random.default_rng(0).integers(1, 500, (2, 90)).astype(np.int32)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(logits(llm, tokens), expected, atol=2e-4)


def test_transformers_reads_the_tower(tower):
    torch = pytest.importorskip("torch")
    arch, params = tower
    reference = transformers.SiglipVisionModel.from_pretrained(BASE / "vision", dtype="float32")
    processor = transformers.SiglipImageProcessorPil.from_pretrained(BASE / "vision")
    images, _ = probe_data("test", 4)
    pixels = processor(images=list(images), return_tensors="np")["pixel_values"]
    with torch.no_grad():
        states = reference(torch.tensor(pixels), output_hidden_states=True).hidden_states
    features = vision.VisionTower(arch).apply({"params": params}, images)
    np.testing.assert_allclose(features, states[arch.feature_layer].numpy(), atol=2e-4)


def probe_data(split, count):
    """Returns images u8[count,64,64,3] and, by cell, the placed object or None."""
    rng, glyphs = random.Random(f"probe-{split}"), drawings.load_glyphs(split)
    images, objects_by_cell = [], []
    for _ in range(count):
        objects = questions.make_objects(rng, glyphs)
        images.append(drawings.render(objects, glyphs))
        by_cell = {placed.cell: placed for placed in objects}
        objects_by_cell += [by_cell.get(cell) for cell in range(4)]
    return np.stack(images), objects_by_cell


def cell_features(tower, images):
    """Returns f32[4*count,E]: the mean of the patch features of every cell."""
    arch, params = tower
    apply = jax.jit(lambda x: vision.VisionTower(arch).apply({"params": params}, x))
    patches = np.asarray(apply(jnp.asarray(images)))

    side = arch.image_size // arch.patch_size // 2
    cells = patches.reshape(len(images), 2, side, 2, side, -1).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(len(images) * 4, side * side, -1).mean(1)


def test_linear_probes_read_names_and_colors_of_unseen_shapes(tower):
    features, objects = {}, {}
    for split, count in (("train", 1500), ("test", 400)):
        images, objects[split] = probe_data(split, count)
        features[split] = cell_features(tower, images)

    accuracies = {}
    for what, values in (
        ("digit", drawings.DIGITS),
        ("thing", drawings.THINGS),
        ("color", list(drawings.COLORS)),
    ):
        inputs, labels = {}, {}
        for split in ("train", "test"):
            attribute = "color" if what == "color" else "name"
            found = [getattr(placed, attribute, None) for placed in objects[split]]
            cells = [cell for cell, value in enumerate(found) if value in values]
            ones = ((0, 0), (0, 1))
            inputs[split] = np.pad(features[split][cells], ones, constant_values=1)
            labels[split] = np.array([values.index(found[cell]) for cell in cells])

        # Ridge regression onto one-hot labels
        x, y = inputs["train"], np.eye(len(values))[labels["train"]]
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
        accuracies[what] = np.mean((inputs["test"] @ weights).argmax(1) == labels["test"])

    assert accuracies["digit"] >= 0.97, accuracies
    assert accuracies["thing"] >= 0.78, accuracies
    assert accuracies["color"] >= 0.99, accuracies


def test_the_tool_that_makes_the_base_starts():
    """`python tools/make_tiny --help`, from another directory."""
    root = pathlib.Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "tools" / "make_tiny"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "python tools/make_tiny OUT" in done.stdout
