"""Imports from the hub, against a stand-in that serves repositories in the layouts of real ones."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import hub_server
import llava_cases
import pytest
import transformers
import weights_cases
from weights_cases import LLM, VISION

from wings_jax import checkpoint

torch = pytest.importorskip("torch")

VICUNA = "lmsys/vicuna-7b-v1.5"
CLIP = "openai/clip-vit-large-patch14-336"
QWEN = "Qwen/Qwen1.5-7B-Chat"
SIGLIP = "google/siglip-so400m-patch14-384"
WINGS = "AIDC-AI/Wings-Qwen1_5-8B"
LLAVA = "llava-hf/llava-1.5-7b-hf"
JUNK = b"not read"


def save_full_model(family: str, directory: pathlib.Path) -> None:
    """Writes a tower with its text half, as the repositories of towers have it."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=VISION)
    weights_cases.save_random(getattr(transformers, f"{family}Model")(config), directory)
    side = VISION["image_size"]
    size = {"height": side, "width": side} if family == "Siglip" else {"shortest_edge": side}
    arguments = {} if family == "Siglip" else {"crop_size": {"height": side, "width": side}}
    processor = getattr(transformers, f"{family}ImageProcessor")(size=size, **arguments)
    processor.save_pretrained(directory)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Repository id -> directory, of tiny sizes."""
    root = tmp_path_factory.mktemp("hub")
    sources = weights_cases.sources()

    # Torch shards with an index, and a SentencePiece tokenizer only.
    vicuna = root / "vicuna"
    config = transformers.LlamaConfig(**LLM, tie_word_embeddings=False)
    weights_cases.save_random(transformers.LlamaForCausalLM(config), vicuna)
    weights_cases.to_torch(vicuna, shards=2)
    weights_cases.use_sentencepiece(vicuna)

    # One torch file beside other frameworks' copies, and tokenizer files.
    clip = root / "clip"
    save_full_model("CLIP", clip)
    weights_cases.to_torch(clip)
    for name in ("tf_model.h5", "flax_model.msgpack", "README.md"):
        (clip / name).write_bytes(JUNK)
    (clip / "merges.txt").write_text("#version: 0.2\n")

    # Safetensors shards; a copy of the weights in a subdirectory.
    qwen = shutil.copytree(sources / "llm", root / "qwen")
    (qwen / "LICENSE").write_bytes(JUNK)
    (qwen / "original").mkdir()
    (qwen / "original" / "consolidated.00.pth").write_bytes(JUNK)
    (qwen / "original" / "params.json").write_bytes(JUNK)

    siglip = root / "siglip"
    save_full_model("Siglip", siglip)
    (siglip / "spiece.model").write_bytes(JUNK)

    wings = shutil.copytree(sources / "wings_stage2", root / "wings")
    (wings / "run").mkdir()
    (wings / "run" / "infer_args.json").write_bytes(JUNK)

    # The keys of transformers 4, and the chat template of an older processor.
    llava = shutil.copytree(llava_cases.saved("llama_clip"), root / "llava")
    llava_cases.rename_keys(llava, {"vision_tower.": "vision_tower.vision_model."})
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    template += "{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (llava / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (llava / "tf_model.h5").write_bytes(JUNK)
    repositories = {VICUNA: vicuna, CLIP: clip, QWEN: qwen, SIGLIP: siglip, WINGS: wings}
    return repositories | {LLAVA: llava}


def run_command(
    server: hub_server.HubServer, home: pathlib.Path, *arguments: object
) -> subprocess.CompletedProcess:
    """Runs `convert import` in a process of its own, with the stand-in as the hub."""
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(home)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "wings_jax.convert", "import", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "not_downloaded"),
    [
        (("--llm", VICUNA, "--vision", CLIP, "--template", "vicuna"), ("tf_model.h5",)),
        (("--llm", QWEN, "--vision", SIGLIP), ("consolidated.00.pth", "params.json", "LICENSE")),
        (("--wings", WINGS, "--vision", SIGLIP), ("infer_args.json",)),
        (("--llava", LLAVA), ("tf_model.h5",)),
    ],
)
def test_repositories_are_imported(arguments, not_downloaded, repositories, tmp_path):
    with hub_server.serve(repositories) as server:
        result = run_command(server, tmp_path / "home", *arguments, "--out", tmp_path / "in")
    assert result.returncode == 0, result.stderr
    assert "model.safetensors" in server.downloads or "config.json" in server.downloads
    for name in not_downloaded:
        assert name not in server.downloads

    model = checkpoint.load(tmp_path / "in")
    assert {"decoder", "vision"} <= set(model.params)
    assert model.arch.vision.class_token == (CLIP in arguments or LLAVA in arguments)
    if LLAVA in arguments:
        assert model.config.data.template == "qwen3"  # ChatML without a system text
    assert bool(model.arch.learners) == (WINGS in arguments)


@pytest.mark.slow
def test_refused_repositories_are_one_line(repositories, tmp_path):
    with hub_server.serve(repositories) as server:
        server.gated.add(QWEN)
        for name, message in (
            ("no/where", f"no/where is not a directory, and there is no repository {server.url}"),
            (QWEN, f"{QWEN} is gated: request access at {server.url}/{QWEN}, then run `hf auth"),
            (f"{VICUNA}@v9", f"{VICUNA}@v9: the repository {VICUNA} has no such revision"),
        ):
            result = run_command(server, tmp_path / "home", "--llm", name, "--dry-run")
            assert result.returncode == 2
            line = result.stderr.strip().splitlines()[-1]
            assert line.startswith(f"python -m wings_jax.convert: --llm: {message}")
            assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_downloads_are_resumed_and_cached(repositories, tmp_path):
    """A broken connection is resumed within the file; the cache serves without a connection."""
    # The library keeps a file in blocks of 10 MiB; the connection breaks within the second one.
    block = 10 * 2**20
    vicuna = shutil.copytree(repositories[VICUNA], tmp_path / "vicuna")
    (vicuna / "notes.txt").write_bytes(bytes(3 * block))
    with hub_server.serve(repositories | {VICUNA: vicuna}) as server:
        server.cut = "notes.txt"
        server.revisions.add("v1")
        flags = ("--llm", f"{VICUNA}@v1", "--template", "vicuna", "--dry-run")
        result = run_command(server, tmp_path / "home", *flags)
        assert result.returncode == 0, result.stderr
        assert server.ranges == [f"bytes={block}-"]

    # The server is gone.
    result = run_command(server, tmp_path / "home", *flags)
    assert result.returncode == 0, result.stderr
    result = run_command(server, tmp_path / "home", "--llm", QWEN, "--dry-run")
    assert result.returncode == 2
    assert "there is no connection to the Hugging Face hub" in result.stderr
