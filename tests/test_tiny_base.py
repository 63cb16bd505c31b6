"""The tiny base that ships: small, readable by transformers, and it knows what it should."""

import importlib.resources
import pathlib
import random

import hf_directories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from wings_jax.data import conversation
from wings_jax.model import layout, presets, vision, wings
from wings_jax.scenes import drawings, questions, skills
from wings_jax.weights import store

BASE = pathlib.Path(str(importlib.resources.files("wings_jax"))) / "assets" / "tiny"
CHATML = conversation.TEMPLATES["chatml"]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(BASE / "llm")


@pytest.fixture(scope="module")
def llm():
    arch = presets.decoder_from_hf(store.read_config(BASE / "llm"))
    return arch, hf_directories.load_llm(BASE / "llm", arch)


@pytest.fixture(scope="module")
def tower():
    arch = presets.vision_from_hf(store.read_config(BASE / "vision"))
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


def test_the_tokenizer_spells_anything_and_answers_in_few_tokens(tokenizer):
    for text in ("Ünïcode 你好 🙂\n\ttabs", "7 + 12 = ?", "<image>\nWhat is red?"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for word in (*drawings.DIGITS, *drawings.THINGS, *drawings.COLORS, "yes", "no"):
        assert len(tokenizer(word).input_ids) == 1, word
        assert len(tokenizer(f" {word}").input_ids) <= 2, word
    for place in drawings.PLACES:
        assert len(tokenizer(place).input_ids) == 2
    assert tokenizer.eos_token == "<|im_end|>"
    assert conversation.get_template_for(tokenizer) == "chatml"


def test_its_chat_template_writes_what_training_writes(tokenizer):
    turns = [{"from": "human", "value": "What is 3 plus 4?"}]
    messages = [{"role": "user", "content": turns[0]["value"]}]
    ours = conversation.encode(turns, tokenizer, CHATML, open_answer=True).ids
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(ours) == list(theirs)


def test_it_knows_the_text_skills(llm, tokenizer):
    rng, right = random.Random(5), []
    for name in skills.SKILLS:
        asked = [skills.sample(rng, name, "test") for _ in range(60)]
        turns = [
            [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            for question, answer in asked
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
        wrong = (logits(llm, tokens).argmax(-1) != targets) & (targets != layout.IGNORE)
        right.append(np.mean(~wrong.any(1)))
    assert np.mean(right) >= 0.95, dict(zip(skills.SKILLS, right, strict=True))


def test_transformers_reads_the_llm(llm):
    torch = pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(BASE / "llm", dtype="float32")
    tokens = np.random.default_rng(0).integers(1, 500, (2, 90)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(logits(llm, tokens), expected, atol=2e-4)


def test_transformers_reads_the_tower(tower):
    torch = pytest.importorskip("torch")
    arch, params = tower
    theirs = transformers.SiglipVisionModel.from_pretrained(BASE / "vision", dtype="float32")
    processor = transformers.SiglipImageProcessorPil.from_pretrained(BASE / "vision")
    pictures, _ = probe_data("test", 4)
    pixels = processor(images=list(pictures), return_tensors="np")["pixel_values"]
    with torch.no_grad():
        states = theirs(torch.tensor(pixels), output_hidden_states=True).hidden_states
    ours = vision.VisionTower(arch).apply({"params": params}, pictures)
    np.testing.assert_allclose(ours, states[arch.feature_layer].numpy(), atol=2e-4)


def probe_data(split, count):
    """Returns pictures u8[count,64,64,3] and, by cell, (name, colour) or None."""
    rng, glyphs = random.Random(f"probe-{split}"), drawings.load_glyphs(split)
    pictures, truths = [], []
    for _ in range(count):
        objects = questions.make_objects(rng, glyphs)
        pictures.append(drawings.render(objects, glyphs))
        truths.append([next((o for o in objects if o.cell == cell), None) for cell in range(4)])
    return np.stack(pictures), truths


def test_the_tower_shows_names_and_colours_of_shapes_it_never_saw(tower):
    arch, params = tower
    features, truths = {}, {}
    apply = jax.jit(lambda x: vision.VisionTower(arch).apply({"params": params}, x))
    for split, count in (("train", 1500), ("test", 400)):
        pictures, truths[split] = probe_data(split, count)
        patches = np.asarray(apply(jnp.asarray(pictures)))
        side = arch.image_size // arch.patch_size // 2
        cells = patches.reshape(count, 2, side, 2, side, -1).transpose(0, 1, 3, 2, 4, 5)
        features[split] = cells.reshape(count * 4, side * side, -1).mean(1)
    scores = {}
    for what, values in (
        ("digit", drawings.DIGITS),
        ("thing", drawings.THINGS),
        ("colour", list(drawings.COLORS)),
    ):
        xs, ys = {}, {}
        for split in ("train", "test"):
            found = [o for picture in truths[split] for o in picture]
            values_found = [
                None if o is None else (o.color if what == "colour" else o.name) for o in found
            ]
            kept = [i for i, value in enumerate(values_found) if value in values]
            xs[split] = np.pad(features[split][kept], ((0, 0), (0, 1)), constant_values=1)
            ys[split] = np.array([values.index(values_found[i]) for i in kept])
        x, y = xs["train"], np.eye(len(values))[ys["train"]]
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
        scores[what] = np.mean((xs["test"] @ weights).argmax(1) == ys["test"])
    assert scores["digit"] >= 0.97, scores
    assert scores["thing"] >= 0.78, scores
    assert scores["colour"] >= 0.99, scores
