"""`python -m wings_jax.convert`: there and back bit for bit, and one clear line per mistake."""

from __future__ import annotations

import pathlib
import shutil

import jax
import numpy as np
import pytest
import transformers
import weights_cases
from weights_cases import LLM, RANK, run

from wings_jax import checkpoint, convert, tree
from wings_jax.model import layout, parameters, presets
from wings_jax.model import wings as model_lib
from wings_jax.weights import hf, imports, release, rules, store

torch = pytest.importorskip("torch")


@pytest.fixture
def sources() -> pathlib.Path:
    return weights_cases.sources()


def assert_same_tensors(one: pathlib.Path, other: pathlib.Path, skipped: str = r"$") -> None:
    first, second = store.open_tensors(one), store.open_tensors(other)
    kept = {key for key in first if not rules.any_match([skipped], key)}
    assert kept == set(second)
    for key in kept:
        a, b = np.asarray(first[key]), np.asarray(second[key])
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=key)


def test_llm_and_tower_there_and_back(sources, tmp_path):
    """The export is the source bit for bit, opens in transformers, and gives our logits."""
    run("import", "--llm", sources / "llm", "--vision", sources / "tower", "--out", tmp_path / "in")
    found = checkpoint.load(tmp_path / "in")
    assert found.arch.learners == ()
    assert found.config.data.template == "chatml"
    assert set(found.params) == {"decoder", "vision"}
    run("export", "--checkpoint", tmp_path / "in", "--format", "llm", "--out", tmp_path / "out")
    assert_same_tensors(sources / "llm", tmp_path / "out")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    theirs.eval()
    tokens = np.random.default_rng(0).integers(0, LLM["vocab_size"], (2, 70))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    ours = text_logits(found.arch, found.params, tokens)
    np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=1e-4)
    text = "Hello <|im_end|> world"
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(text)["input_ids"] == found.tokenizer(text)["input_ids"]
    kept = store.read_config(tmp_path / "out")
    source = store.read_config(sources / "llm")
    assert {k: kept[k] for k in ("bos_token_id", "max_window_layers")} == {
        k: source[k] for k in ("bos_token_id", "max_window_layers")
    }


def text_logits(arch: presets.WingsArch, params, tokens: np.ndarray) -> np.ndarray:
    rows = layout.make_layout(tokens, np.full_like(tokens, layout.TEXT))
    side = arch.vision.image_size
    batch = layout.Batch(rows, tokens, np.zeros((len(tokens), 0, side, side, 3), np.uint8))
    model = model_lib.Wings(arch)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    hidden = model.apply({"params": wide}, batch)
    return np.asarray(model.apply({"params": wide}, hidden, method=model_lib.Wings.logits))


@pytest.mark.parametrize("name", ["wings_stage2", "wings_stage1", "llava"])
def test_release_there_and_back(name: str, sources, tmp_path):
    """The release's checkpoints come back bit for bit (without stage 1's idle learners)."""
    run(
        "import", "--wings", sources / name, "--vision", sources / "tower", "--out", tmp_path / "in"
    )
    arch = checkpoint.load(tmp_path / "in").arch
    if name == "wings_stage2":
        assert arch.router
        assert arch.gain == 2.0
    if name != "llava":
        assert arch.rank == RANK
        assert arch.semantics == presets.release_semantics(9)
    run("export", "--checkpoint", tmp_path / "in", "--format", "wings", "--out", tmp_path / "out")
    assert_same_tensors(
        sources / name, tmp_path / "out", skipped=r".*attn_t_pool.*" * (name[-1] == "1")
    )
    kept, source = store.read_config(tmp_path / "out"), store.read_config(sources / name)
    source.pop("architectures", None)
    assert {key: kept.get(key) for key in source} == source


def test_a_tower_of_known_size_needs_no_directory(sources, monkeypatch):
    """The sizes of `presets.VISION` are recognised by their shapes alone."""
    arch = presets.vision_from_hf(store.read_config(sources / "tower"))
    clip = presets.vision_from_hf(store.read_config(sources / "clip"))
    monkeypatch.setattr(presets, "VISION", presets.VISION | {"narrow": clip, "tiny": arch})
    made = imports.from_release(sources / "wings_stage2")
    assert made.arch.vision == arch
    steps, fresh = imports.plan_parts(made)
    assert not fresh
    assert [step.part.name for step in steps] == ["Wings"]


def test_a_tower_may_come_from_elsewhere(sources, tmp_path):
    """A checkpoint without a tower takes that of --vision; without that, it says so."""
    shutil.copytree(sources / "llava", tmp_path / "blind")
    for file in (tmp_path / "blind").glob("model*"):
        file.unlink()
    tensors = store.open_tensors(sources / "llava")
    blind = {key: t for key, t in tensors.items() if not key.startswith(release.TOWER)}
    store.write_shards(tmp_path / "blind", blind)
    made = imports.from_release(tmp_path / "blind", sources / "tower")
    assert [part.name for part in made.parts] == ["Wings", "tower"]
    flat = imports.load_parts(imports.plan_parts(made)[0])
    assert flat.keys() == parameters.abstract_params(made.arch).keys()
    with pytest.raises(rules.WeightsError, match="holds no vision tower"):
        imports.from_release(tmp_path / "blind")


def test_dtype_mesh_and_projector(sources, tmp_path):
    """Onto 8 devices in another dtype, with LLaVA's projector file."""
    rng = np.random.default_rng(0)
    content = {
        f"model.mm_projector.{key}": torch.tensor(rng.normal(size=shape), dtype=torch.bfloat16)
        for key, shape in {
            "0.weight": (32, 16),
            "0.bias": (32,),
            "2.weight": (32, 32),
            "2.bias": (32,),
        }.items()
    }
    torch.save(content, tmp_path / "mm_projector.bin")
    made = imports.from_llm(
        sources / "llm", sources / "tower", projector=tmp_path / "mm_projector.bin"
    )
    plain = imports.load_parts(imports.plan_parts(made, dtype=np.float32)[0])
    mesh = convert.read_mesh("data=2,fsdp=2,tensor=2")
    placed = imports.load_parts(imports.plan_parts(made, dtype=np.float32, mesh=mesh)[0])
    assert plain.keys() == placed.keys()
    for path, array in plain.items():
        assert placed[path].sharding.mesh == mesh
        np.testing.assert_array_equal(array, placed[path], err_msg=path)
    kernel = placed["decoder/layers/mlp/gate/kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 24)
    np.testing.assert_array_equal(
        plain["projector/linear_0/kernel"].T, content["model.mm_projector.0.weight"].float().numpy()
    )
    run(
        *("import", "--llm", sources / "llm", "--vision", sources / "tower"),
        *("--projector", tmp_path / "mm_projector.bin", "--mesh", "fsdp=8", "--dtype", "float32"),
        *("--out", tmp_path / "in"),
    )
    found = tree.flatten(checkpoint.load(tmp_path / "in").params)
    for path, array in plain.items():
        np.testing.assert_array_equal(array, found[path], err_msg=path)


def test_merged_lora_is_unmerged_lora(sources, tmp_path):
    decoder = presets.decoder_from_hf(store.read_config(sources / "llm"))
    vision = presets.vision_from_hf(store.read_config(sources / "tower"))
    arch = presets.WingsArch(decoder, vision, lora_rank=3, lora_alpha=6.0)
    rng = np.random.default_rng(1)
    flat = {
        path: rng.normal(0, 0.15, struct.shape).astype(np.float32)
        for path, struct in parameters.abstract_params(arch).items()
    }
    files = {file.name: file.read_text() for file in (sources / "llm").glob("token*.json")}
    checkpoint.write_checkpoint(tmp_path / "run", flat, convert.config_lib.Config(), arch, files)
    out = ("--format", "llm", "--out", tmp_path / "out")
    with pytest.raises(SystemExit):
        run("export", "--checkpoint", tmp_path / "run", *out)
    run("export", "--checkpoint", tmp_path / "run", "--merge-lora", *out)
    merged = presets.WingsArch(decoder, vision)
    params = {"decoder": hf.load_llm(tmp_path / "out", decoder)}
    tokens = rng.integers(0, LLM["vocab_size"], (1, 30))
    np.testing.assert_allclose(
        text_logits(merged, params, tokens),
        text_logits(arch, tree.nest(flat), tokens),
        rtol=1e-4,
        atol=1e-4,
    )


def test_dry_runs_and_inspect(sources, tmp_path, capsys):
    llm = ("--llm", sources / "llm", "--vision", sources / "tower")
    run("import", *llm, "--dry-run")
    assert "dry run: nothing written" in capsys.readouterr().out
    run("import", *llm, "--out", tmp_path / "in")
    run("export", "--checkpoint", tmp_path / "in", "--format", "llm", "--dry-run")
    said = capsys.readouterr().out
    assert "left out: vision" in said
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    for path, told in {
        sources / "llm": ["an LLM (qwen2)", "2 layers, width 32", "fresh in training: projector"],
        sources / "tower": ["a vision tower", "3 layers of which 2 are read"],
        sources / "clip": ["CLIP"],
        sources / "wings_stage2": ["the release's layout", "of no known size"],
        tmp_path / "in": ["a checkpoint of ours", "exports as llm: yes", "wings: no, a checkpoint"],
    }.items():
        run("inspect", path)
        said = capsys.readouterr().out
        for part in told:
            assert part in said, (path, part, said)
    run("inspect", sources / "wings_stage2", "--vision", sources / "tower")
    said = capsys.readouterr().out
    assert "visual and textual, rank 4, a router, gain 2, the release's semantics" in said
