"""A user's mistakes with weights: each is one clear line, and nothing is left half-written."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest
import weights_cases
from weights_cases import LLM, VISION, run

from wings_jax.model import parameters, presets
from wings_jax.weights import exports, rules, store

torch = pytest.importorskip("torch")


@pytest.fixture
def sources() -> pathlib.Path:
    return weights_cases.sources()


def broken(sources: pathlib.Path, name: str, tmp_path: pathlib.Path) -> pathlib.Path:
    """Returns a copy of a source, to be spoiled."""
    return shutil.copytree(sources / name, tmp_path / f"broken_{name}")


def edit_config(directory: pathlib.Path, **entries) -> None:
    config = store.read_config(directory)
    (directory / "config.json").write_text(json.dumps({**config, **entries}))


def edit_tensor(directory: pathlib.Path, key: str, change) -> None:
    """Rewrites the file that holds `key`."""
    tensors = store.open_tensors(directory)
    file = tensors[key].origin
    content = {k: np.asarray(t) for k, t in store.open_file(file).items()}
    content[key] = change(content[key])
    store.write_file(
        file, {k: rules.Tensor(a.shape, a.dtype, lambda a=a: a) for k, a in content.items()}
    )


def to_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[3] = np.nan
    return array


def wrong_source(what: str, sources: pathlib.Path, tmp_path: pathlib.Path) -> tuple:
    """Returns a command that reads a broken source, and what its message must name."""
    out = ["--out", tmp_path / "out"]
    if what == "family":
        directory = broken(sources, "llm", tmp_path)
        edit_config(directory, model_type="gpt2")
        return ["import", "--llm", directory, *out], ["model_type 'gpt2'"]
    if what == "tower as llm":
        return ["import", "--llm", sources / "tower", *out], ["siglip_vision_model"]
    if what == "llm as wings":
        return ["import", "--wings", sources / "llm", *out], ["model_type 'qwen2' is none of"]
    if what == "shard":
        directory = broken(sources, "llm", tmp_path)
        shard = sorted(directory.glob("*.safetensors"))[1]
        shard.unlink()
        return ["import", "--llm", directory, *out], [f"lacks the shard {shard.name}"]
    if what == "truncated":
        directory = broken(sources, "llm", tmp_path)
        shard = sorted(directory.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-10])
        return ["import", "--llm", directory, *out], [shard.name, "cut short"]
    if what == "vocabulary":
        directory = broken(sources, "llm", tmp_path)
        edit_config(directory, vocab_size=321)
        named = ["model.embed_tokens.weight is [320, 32]", "[321, 32]"]
        return ["import", "--llm", directory, *out], named
    if what == "rank":
        directory = broken(sources, "wings_stage2", tmp_path)
        edit_config(directory, lora_dim=64)
        return ["import", "--wings", directory, *out], ["lora_dim 64", "4"]
    if what == "one rank":
        directory = broken(sources, "wings_stage2", tmp_path)
        key = "model.layers.1.attn_pool.v_proj.0.weight"
        edit_tensor(directory, key, lambda a: a[:3])
        wings_there = ["import", "--wings", directory, "--vision", sources / "tower", *out]
        return wings_there, [f"{key} is [3, 32]", "[4, 32]"]
    if what == "nan":
        directory = broken(sources, "llm", tmp_path)
        key = "model.layers.1.mlp.up_proj.weight"
        edit_tensor(directory, key, to_nan)
        return ["import", "--llm", directory, *out], [f"{key} of", "NaN"]
    directory = broken(sources, "llm", tmp_path)
    if what == "no tokenizer":
        (directory / "tokenizer.json").unlink()
        return ["import", "--llm", directory, *out], ["no tokenizer", "give one with --tokenizer"]
    assert what == "tokenizer too large"
    edit_config(directory, vocab_size=200)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        edit_tensor(directory, key, lambda a: a[:200])
    return ["import", "--llm", directory, *out], ["has 259 tokens, the LLM's embedding 200"]


def wrong_flag(what: str, sources: pathlib.Path, tmp_path: pathlib.Path) -> tuple:
    """Returns a command whose parts do not fit together, and what its message must name."""
    out = ["--out", tmp_path / "out"]
    llm = ["import", "--llm", sources / "llm", *out]
    if what == "llm as tower":
        return [*llm, "--vision", sources / "llm"], ["qwen2", "no SigLIP or CLIP"]
    if what == "projector":
        torch.save({"mm_projector.0.weight": torch.zeros(32, 17)}, tmp_path / "p.bin")
        named = ["p.bin reads features of width 17", "gives 16"]
        return [*llm, "--vision", sources / "tower", "--projector", tmp_path / "p.bin"], named
    if what == "tower width":
        directory = broken(sources, "wings_stage2", tmp_path)
        return ["import", "--wings", directory, "--vision", sources / "clip", *out], [
            "vision_model"
        ]
    if what == "exists":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("x")
        return llm, ["out exists already"]
    if what == "nowhere":
        return ["import", "--llm", tmp_path / "nowhere", *out], ["--llm", "nowhere is not a dir"]
    if what == "mesh":
        return [*llm, "--mesh", "rows=2"], ["--mesh: 'rows=2'"]
    if what == "template":
        return [*llm, "--template", "haiku"], ["'haiku' is unknown"]
    if what == "no checkpoint":
        return ["export", "--checkpoint", tmp_path, "--format", "llm", *out], [
            "holds no checkpoint"
        ]
    raise AssertionError(what)


SOURCES = """
    family, tower as llm, llm as wings, shard, truncated, vocabulary, rank, one rank, nan,
    no tokenizer, tokenizer too large
"""
FLAGS = """
    llm as tower, projector, tower width, exists, nowhere, mesh, template, no checkpoint
"""
MISTAKES = {
    name.strip(): maker
    for text, maker in ((SOURCES, wrong_source), (FLAGS, wrong_flag))
    for name in text.split(",")
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(what: str, sources, tmp_path, capsys):
    arguments, named = MISTAKES[what](what, sources, tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    message = said.strip().splitlines()[-1]
    assert message.startswith("wings_jax.convert: ")
    for part in named:
        assert part in message, (part, message)
    assert "Traceback" not in said
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_no_space_left(sources, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit):
        run("import", "--llm", sources / "llm", "--out", tmp_path / "out")
    assert "no space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def exported(tmp_path: pathlib.Path, **changes) -> None:
    """Tries to export a model with the arch's `changes` in the release's layout."""
    arch = presets.WingsArch(
        presets.decoder_from_hf({**LLM, "model_type": "qwen2"}),
        presets.vision_from_hf({**VISION, "model_type": "siglip_vision_model"}),
        **{"learners": ("visual", "textual"), "router": True, **changes},
    )
    flat = {p: np.zeros(s.shape, s.dtype) for p, s in parameters.abstract_params(arch).items()}
    exports.as_release(flat, arch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learners": ("textual",), "router": False}, "no models with learners"),
        ({"router": False}, "a router exactly where"),
        ({"learner_layers": (1,)}, "on some layers only"),
        ({"router_positions": 64}, "reads 4096 positions, this model's 64"),
        ({"lora_rank": 2}, "LoRA is not merged"),
        ({"prefix_length": 2}, "no place for decoder/layers/prefix"),
    ],
)
def test_what_the_release_cannot_hold(changes: dict, message: str, tmp_path):
    with pytest.raises(rules.WeightsError, match=message):
        exported(tmp_path, **changes)


def test_a_prefix_has_no_place(tmp_path):
    arch = presets.WingsArch(
        presets.decoder_from_hf({**LLM, "model_type": "qwen2"}), presets.VISION["siglip_base_224"]
    )
    shapes = parameters.abstract_params(arch)
    flat = {p: np.zeros(s.shape, s.dtype) for p, s in shapes.items() if p.startswith("decoder/")}
    flat["decoder/layers/prefix/k"] = np.zeros((2, 5, 2, 8), np.float32)
    with pytest.raises(rules.WeightsError, match="no place for decoder/layers/prefix/k"):
        exports.as_llm(flat, arch)
