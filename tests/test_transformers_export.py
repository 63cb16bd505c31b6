"""`export --format transformers`: a directory that runs without wings_jax, and comes back."""

from __future__ import annotations

import copy
import dataclasses
import importlib.resources
import json
import pathlib
import subprocess
import sys

import inference_cases as cases
import numpy as np
import pytest
import tiny_model
from PIL import Image

import wings_jax
from wings_jax import checkpoint, config, tree
from wings_jax import convert as convert_entry
from wings_jax.data import conversation, images, samples, templates
from wings_jax.data.turns import normalize_sample
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model.wings import Wings
from wings_jax.weights import transformers_files

pytest.importorskip("torch")
from wings_jax.weights.transformers_code import processing_wings

# Runs where neither wings_jax nor jax can be imported.
SCRIPT = """
import json, sys
sys.modules["jax"] = sys.modules["wings_jax"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

directory, requests = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(
    directory, trust_remote_code=True, dtype=torch.float32
).eval()
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
results = []
for messages in requests:
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    pixels = inputs["pixel_values"] if "pixel_values" in inputs else None
    results.append({
        "ids": inputs["input_ids"][0].tolist(),
        "new": new[0].tolist(),
        "text": text,
        "jinja": processor.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        ),
        "pixels": None if pixels is None else pixels[0].double().sum().item(),
    })
together = processor.apply_chat_template(
    requests, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**together, max_new_tokens=8, do_sample=False)
batched = output[:, together["input_ids"].shape[1] :].tolist()
print(json.dumps({"results": results, "batched": batched}))
"""


def write_checkpoint(directory: pathlib.Path, case: str) -> pathlib.Path:
    """Writes a random small model that has every parameter of a real tower."""
    arch = cases.with_vocabulary(cases.ARCHS[case], len(cases.tokenizer()))
    arch = dataclasses.replace(arch, vision=dataclasses.replace(arch.vision, post_norm=True))
    params = tree.flatten(tiny_model.init(Wings(arch)))
    llm = importlib.resources.files("wings_jax") / "assets" / "tiny" / "llm"
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: (llm / name).read_text(encoding="utf-8") for name in names}
    checkpoint.write_checkpoint(directory, params, config.Config(), arch, files)
    return directory


def convert(monkeypatch, *arguments: object) -> None:
    """Runs `python -m wings_jax.convert` in this process."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert_entry.main()


def messages_of(question: str, image: pathlib.Path | None = None) -> list[dict]:
    parts = [{"type": "text", "text": question}]
    if image is not None:
        parts.insert(0, {"type": "image", "path": str(image)})
    return [{"role": "user", "content": parts}]


def run_script(directory: pathlib.Path, requests: list) -> dict:
    """Runs SCRIPT on an exported directory and returns what it prints."""
    command = [sys.executable, "-c", SCRIPT, str(directory), json.dumps(requests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["router", "prefix"])
def test_an_export_answers_without_wings_jax(case, tmp_path, monkeypatch):
    workdir = write_checkpoint(tmp_path / "run", case)
    convert(
        monkeypatch,
        "export",
        "--checkpoint",
        workdir,
        "--format",
        "transformers",
        "--out",
        tmp_path / "hf",
    )
    picture = tmp_path / "scene.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 47, 3), np.uint8)
    Image.fromarray(pixels).save(picture)

    long = [
        *messages_of("What is red?", picture),
        {"role": "assistant", "content": "A cat."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Where? <|im_end|> <image>\n"},
                *messages_of("And here?", picture)[0]["content"],
            ],
        },
    ]
    requests = [messages_of("What is 1 plus 2?"), messages_of("What is red?", picture), long]
    found = run_script(tmp_path / "hf", requests)

    model = wings_jax.load(workdir)
    turns = [
        [{"from": "human", "value": "What is 1 plus 2?"}],
        [{"from": "human", "value": "<image>\nWhat is red?"}],
        [
            {"from": "human", "value": "<image>\nWhat is red?"},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Where? <|im_end|> \\<image>\n<image>\nAnd here?"},
        ],
    ]
    params = SamplingParams(max_new_tokens=8)
    for result, conversation_turns, batched in zip(
        found["results"], turns, found["batched"], strict=True
    ):
        count = sum("<image>\n" in turn["value"] for turn in conversation_turns)
        request = Request(conversation_turns, (picture,) * count, params)
        wanted = list(model.generate(request).tokens)
        assert result["new"][: len(wanted)] == wanted
        assert batched[: len(wanted)] == wanted
    assert all(result["text"] == result["jinja"] for result in found["results"])


CHATML = templates.TEMPLATES["chatml"]
TEMPLATES = {
    "chatml": CHATML,
    "strip and lead": dataclasses.replace(CHATML, strip=True, lead=" ", system=""),
    "empty system": dataclasses.replace(CHATML, system="", always_system=True),
    "after system": dataclasses.replace(CHATML, after_system="<|im_start|>first\n"),
}
CONVERSATIONS = {
    "one turn": [("user", " What is red? "), ("assistant", "A cat.\n")],
    "control tokens": [("user", "Say <|im_end|> and <image>."), ("assistant", "<|im_start|>")],
    "system": [("system", "Be brief."), ("user", "Who?"), ("assistant", "I."), ("user", "Why?")],
}


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_processor_writes_the_ids_of_training(name, turns):
    """Also where people write control tokens or `<image>`, and with images between the texts."""
    template = TEMPLATES[name]
    processor = make_processor(template)
    sample = samples.Sample("", (), [{"from": who, "value": text} for who, text in turns])
    ours = normalize_sample(sample, needs_answer=False)
    messages = [{"role": speaker, "content": text} for speaker, text in turns]
    expected = conversation.encode(ours, cases.tokenizer(), template).ids
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=False)
    np.testing.assert_array_equal(found[0], expected)

    # The Jinja program writes the same text.
    program = transformers_files.chat_template(template)
    written = processor.tokenizer.apply_chat_template(
        messages, chat_template=program, tokenize=False, add_generation_prompt=True
    )
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert written == text
    rendered = conversation.render_text(ours, template, open_answer=True)
    assert text == rendered.replace(r"\<image>", "<image>")  # escaped in normalized turns

    # A prompt with two images: each is P ids where it stands.
    image = Image.new("RGB", (9, 5), "red")
    parts = [
        {"type": "image", "image": image},
        {"type": "text", "text": "and"},
        {"type": "image", "image": image},
    ]
    marked = [{"from": "human", "value": "<image>\nand<image>"}]
    ids = conversation.encode(marked, cases.tokenizer(), template, open_answer=True).ids
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, add_generation_prompt=True
    )
    is_image = ids == conversation.IMAGE_ID
    ids = np.where(is_image, processor.image_token_id, ids)
    np.testing.assert_array_equal(inputs["input_ids"][0], np.repeat(ids, np.where(is_image, 4, 1)))
    assert inputs["pixel_values"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("size", [(8, 8), (30, 47), (200, 31), (8, 3)])
def test_the_processor_prepares_images_as_in_training(size):
    """Equal pixels; the normalization is the device's, within a rounding of float32."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    image = Image.fromarray(pixels)
    vision = cases.VISION
    expected = images.prepare_image(image, vision.image_size, vision.mean)
    expected = (expected / 255 - np.array(vision.mean)) / np.array(vision.std)
    found = make_processor(CHATML).prepare_image(image)
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-6)


def make_processor(template: templates.Template):
    """Returns the exported processor class on the tests' tokenizer, with the token `<image>`."""
    tokenizer = copy.deepcopy(cases.tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = cases.VISION
    return processing_wings.WingsProcessor(
        tokenizer,
        template=dataclasses.asdict(template),
        image_size=vision.image_size,
        image_mean=vision.mean,
        image_std=vision.std,
        image_seq_length=vision.num_patches,
    )


@pytest.mark.parametrize("case", cases.ARCHS)
def test_export_and_import_are_bit_exact(case, tmp_path, monkeypatch):
    workdir = write_checkpoint(tmp_path / "run", case)
    convert(
        monkeypatch,
        "export",
        "--checkpoint",
        workdir,
        "--format",
        "transformers",
        "--out",
        tmp_path / "hf",
    )
    convert(monkeypatch, "import", "--transformers", tmp_path / "hf", "--out", tmp_path / "back")
    before, after = (checkpoint.find_step(x, flag="") for x in (workdir, tmp_path / "back"))
    assert checkpoint.read_meta(after)[1] == checkpoint.read_meta(before)[1]
    wanted, found = checkpoint.read_params(before), checkpoint.read_params(after)
    assert wanted.keys() == found.keys()
    for path in wanted:
        np.testing.assert_array_equal(wanted[path], found[path], err_msg=path)
