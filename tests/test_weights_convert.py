"""`python -m wings_jax.convert`: there and back bit for bit, and one clear line per mistake."""

from __future__ import annotations

import pathlib
import shutil

import hf_directories
import numpy as np
import pytest
import transformers
import weights_cases
from weights_cases import LLM, RANK, run

from wings_jax import checkpoint, tree
from wings_jax import config as config_lib
from wings_jax.model import hf_config, parameters, presets
from wings_jax.weights import commands, imports, release, release_import, rules, store
from wings_jax.weights import sources as sources_lib
from wings_jax.weights.tensors import WeightsError

torch = pytest.importorskip("torch")


@pytest.fixture
def sources() -> pathlib.Path:
    return weights_cases.sources()


def assert_same_tensors(one: pathlib.Path, other: pathlib.Path, skipped: str = r"$") -> None:
    first, second = store.open_tensors(one), store.open_tensors(other)
    compared = {key for key in first if not rules.any_match([skipped], key)}
    assert compared == set(second)
    for key in compared:
        a, b = np.asarray(first[key]), np.asarray(second[key])
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=key)


def test_llm_and_tower_there_and_back(sources, tmp_path):
    """The export is the source bit for bit, opens in transformers, and gives the same logits."""
    run("import", "--llm", sources / "llm", "--vision", sources / "tower", "--out", tmp_path / "in")
    imported = checkpoint.load(tmp_path / "in")
    assert imported.arch.learners == ()
    assert imported.config.data.template == "chatml"
    assert set(imported.params) == {"decoder", "vision"}
    run("export", "--checkpoint", tmp_path / "in", "--format", "llm", "--out", tmp_path / "out")
    assert_same_tensors(sources / "llm", tmp_path / "out")

    # Logits.
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    hf_model.eval()
    tokens = np.random.default_rng(0).integers(0, LLM["vocab_size"], (2, 70))
    with torch.no_grad():
        expected = hf_model(torch.tensor(tokens)).logits.numpy()
    logits = hf_directories.text_logits(imported.arch, imported.params, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)

    # Tokenizer, and entries of config.json that nothing here reads.
    text = "Hello <|im_end|> world"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text)["input_ids"] == imported.tokenizer(text)["input_ids"]
    exported = store.read_config(tmp_path / "out")
    source = store.read_config(sources / "llm")
    for key in ("bos_token_id", "max_window_layers"):
        assert exported[key] == source[key]


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
    skipped = r".*attn_t_pool.*" if name == "wings_stage1" else "$"
    assert_same_tensors(sources / name, tmp_path / "out", skipped=skipped)
    exported, source = store.read_config(tmp_path / "out"), store.read_config(sources / name)
    source.pop("architectures", None)
    assert {key: exported.get(key) for key in source} == source


def test_import_recognizes_a_tower_of_known_size(sources, monkeypatch):
    """The sizes of `presets.VISION` are recognized by their shapes alone."""
    arch = hf_config.vision_from_hf(store.read_config(sources / "tower"))
    clip = hf_config.vision_from_hf(store.read_config(sources / "clip"))
    monkeypatch.setattr(presets, "VISION", presets.VISION | {"narrow": clip, "tiny": arch})
    spec = release_import.from_release(sources / "wings_stage2")
    assert spec.arch.vision == arch
    steps, fresh = imports.plan_parts(spec)
    assert not fresh
    assert [step.part.name for step in steps] == ["Wings"]


def test_import_takes_the_tower_of_another_directory(sources, tmp_path):
    """A checkpoint without a tower takes that of --vision, which is required then."""
    shutil.copytree(sources / "llava", tmp_path / "blind")
    for file in (tmp_path / "blind").glob("model*"):
        file.unlink()
    tensors = store.open_tensors(sources / "llava")
    blind = {key: t for key, t in tensors.items() if not key.startswith(release.TOWER)}
    store.write_shards(tmp_path / "blind", blind)
    spec = release_import.from_release(tmp_path / "blind", sources / "tower")
    assert [part.name for part in spec.parts] == ["Wings", "tower"]
    flat = imports.load_parts(imports.plan_parts(spec)[0])
    assert flat.keys() == parameters.abstract_params(spec.arch).keys()
    with pytest.raises(WeightsError, match="holds no vision tower"):
        release_import.from_release(tmp_path / "blind")


def save_projector(file: pathlib.Path) -> dict[str, torch.Tensor]:
    """Writes LLaVA's projector file with random weights; returns them."""
    rng = np.random.default_rng(0)
    shapes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    content = {
        f"model.mm_projector.{key}": torch.tensor(rng.normal(size=shape), dtype=torch.bfloat16)
        for key, shape in shapes.items()
    }
    torch.save(content, file)
    return content


def test_dtype_mesh_and_projector(sources, tmp_path):
    """Onto 8 devices in another dtype, with LLaVA's projector file."""
    content = save_projector(tmp_path / "mm_projector.bin")
    spec = sources_lib.from_llm(
        sources / "llm", sources / "tower", projector=tmp_path / "mm_projector.bin"
    )
    on_host = imports.load_parts(imports.plan_parts(spec, dtype=np.float32)[0])
    mesh = commands.parse_mesh("data=2,fsdp=2,tensor=2")
    on_mesh = imports.load_parts(imports.plan_parts(spec, dtype=np.float32, mesh=mesh)[0])

    assert on_host.keys() == on_mesh.keys()
    for path, array in on_host.items():
        assert on_mesh[path].sharding.mesh == mesh
        np.testing.assert_array_equal(array, on_mesh[path], err_msg=path)
    kernel = on_mesh["decoder/layers/mlp/gate/kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 24)

    weight = content["model.mm_projector.0.weight"].float().numpy()
    np.testing.assert_array_equal(on_host["projector/linear_0/kernel"].T, weight)

    # The same by the command.
    run(
        *("import", "--llm", sources / "llm", "--vision", sources / "tower"),
        *("--projector", tmp_path / "mm_projector.bin", "--mesh", "fsdp=8", "--dtype", "float32"),
        *("--out", tmp_path / "in"),
    )
    params = tree.flatten(checkpoint.load(tmp_path / "in").params)
    for path, array in on_host.items():
        np.testing.assert_array_equal(array, params[path], err_msg=path)


def test_load_model_is_one_call_from_directories_to_parameters(sources):
    """Without an architecture it is that of the config files; dtypes may differ by path."""
    mesh = commands.parse_mesh("fsdp=4,tensor=2")

    def dtype_of(path: str) -> str:
        return "float32" if path.startswith("vision/") else "bfloat16"

    params = sources_lib.load_model(sources / "llm", sources / "tower", mesh=mesh, dtype=dtype_of)
    spec = sources_lib.from_llm(sources / "llm", sources / "tower")
    expected = imports.load_parts(imports.plan_parts(spec)[0])
    assert params.keys() == expected.keys()
    for path, array in params.items():
        assert array.dtype == dtype_of(path)
        assert array.sharding.mesh == mesh
        np.testing.assert_array_equal(np.asarray(array), expected[path].astype(array.dtype))


def test_merged_lora_is_unmerged_lora(sources, tmp_path):
    decoder = hf_config.decoder_from_hf(store.read_config(sources / "llm"))
    vision = hf_config.vision_from_hf(store.read_config(sources / "tower"))
    arch = presets.WingsArch(decoder, vision, lora_rank=3, lora_alpha=6.0)
    rng = np.random.default_rng(1)
    flat = {
        path: rng.normal(0, 0.15, struct.shape).astype(np.float32)
        for path, struct in parameters.abstract_params(arch).items()
    }
    files = {file.name: file.read_text() for file in (sources / "llm").glob("token*.json")}
    checkpoint.write_checkpoint(tmp_path / "run", flat, config_lib.Config(), arch, files)

    # Only merged LoRA can be exported.
    out = ("--format", "llm", "--out", tmp_path / "out")
    with pytest.raises(SystemExit):
        run("export", "--checkpoint", tmp_path / "run", *out)
    run("export", "--checkpoint", tmp_path / "run", "--merge-lora", *out)

    merged = presets.WingsArch(decoder, vision)
    params = {"decoder": hf_directories.load_llm(tmp_path / "out", decoder)}
    tokens = rng.integers(0, LLM["vocab_size"], (1, 30))
    np.testing.assert_allclose(
        hf_directories.text_logits(merged, params, tokens),
        hf_directories.text_logits(arch, tree.nest(flat), tokens),
        rtol=1e-4,
        atol=1e-4,
    )


def test_dry_runs_write_nothing(sources, tmp_path, capsys):
    llm = ("--llm", sources / "llm", "--vision", sources / "tower")
    run("import", *llm, "--dry-run")
    assert "dry run: nothing written" in capsys.readouterr().out
    run("import", *llm, "--out", tmp_path / "in")

    run("export", "--checkpoint", tmp_path / "in", "--format", "llm", "--dry-run")
    assert "left out: vision" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_inspect_describes_every_kind_of_directory(sources, tmp_path, capsys):
    llm = ("--llm", sources / "llm", "--vision", sources / "tower")
    run("import", *llm, "--out", tmp_path / "in")
    capsys.readouterr()
    expected = {
        sources / "llm": [
            "an LLM (qwen2)",
            "2 layers, width 32",
            "training initializes what the source does not have: projector",
        ],
        sources / "tower": ["a vision tower", "2 of 3 layers used"],
        sources / "clip": ["CLIP"],
        sources / "wings_stage2": ["the release's layout", "of no known size"],
        tmp_path / "in": [
            "a wings_jax checkpoint",
            "exports as llm: yes",
            "wings: no, a checkpoint",
        ],
    }
    for path, parts in expected.items():
        run("inspect", path)
        output = capsys.readouterr().out
        for part in parts:
            assert part in output, (path, part, output)

    run("inspect", sources / "wings_stage2", "--vision", sources / "tower")
    output = capsys.readouterr().out
    assert "visual and textual, rank 4, with a router, gain 2, semantics 'release'" in output
