"""LLM directories as people have them: tied heads, torch files, Trainer outputs, tokenizers."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import hf_directories
import ml_dtypes
import numpy as np
import pytest
import transformers
import weights_cases
from weights_cases import run

from wings_jax import checkpoint, convert
from wings_jax.errors import UserError
from wings_jax.weights import hf, release_import, sources, store
from wings_jax.weights.tensors import WeightsError

torch = pytest.importorskip("torch")


@pytest.fixture
def llm(tmp_path) -> pathlib.Path:
    """A copy of the small LLM, to be changed."""
    return shutil.copytree(weights_cases.sources() / "llm", tmp_path / "llm")


# Tied heads


def test_a_different_head_is_used_although_the_config_ties_it(llm, tmp_path, capsys):
    """As in transformers 5, which compares the values; logits within 1e-4."""
    weights_cases.edit_config(llm, tie_word_embeddings=True)
    run("import", "--llm", llm, "--out", tmp_path / "in")
    assert "lm_head.weight differs from the embedding" in capsys.readouterr().out
    imported = checkpoint.load(tmp_path / "in")
    assert not imported.arch.decoder.tie_embeddings

    model = transformers.AutoModelForCausalLM.from_pretrained(llm, dtype="float32").eval()
    tokens = np.random.default_rng(0).integers(0, 300, (1, 20))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    logits = hf_directories.text_logits(imported.arch, imported.params, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    assert hf.read_decoder_arch(llm) == imported.arch.decoder


def test_an_equal_head_stays_tied(llm):
    arrays = weights_cases.read_arrays(llm)
    weights_cases.rewrite(llm, arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]})
    weights_cases.edit_config(llm, tie_word_embeddings=True)
    arch = hf.read_decoder_arch(llm)
    assert arch.tie_embeddings
    assert "head" not in hf_directories.load_llm(llm, arch)


# Quantized weights


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ("what?", "an unknown method"),
    ],
)
def test_quantization_is_refused_by_its_method(llm, quantization, named: str):
    weights_cases.edit_config(llm, quantization_config=quantization)
    with pytest.raises(UserError, match=f"quantized with '{named}'"):
        sources.from_llm(llm)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("model.layers.0.mlp.up_proj.weight", np.int8),
        ("model.layers.0.mlp.up_proj.weight", np.uint8),
        ("model.layers.0.mlp.up_proj.qweight", np.int32),
        ("model.layers.0.mlp.up_proj.weight_scale", np.float32),
        ("model.layers.0.mlp.up_proj.SCB", np.float32),
    ],
)
def test_integers_are_not_read_as_weights(llm, key: str, dtype):
    weights_cases.rewrite(llm, weights_cases.read_arrays(llm) | {key: np.ones((48, 32), dtype)})
    with pytest.raises(WeightsError, match=r"is quantized \(model\.layers\.0\.mlp\.up_proj"):
        sources.from_llm(llm)


def test_float8_is_named_as_quantized(llm):
    file = llm / "model.safetensors"
    weights_cases.rewrite(llm, weights_cases.read_arrays(llm))
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(b'"BF16"', b'"F8_E4M3"', 1)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    with pytest.raises(WeightsError, match=r"F8_E4M3.*quantized"):
        store.open_tensors(llm)


# Torch files and Trainer directories


@pytest.mark.parametrize(("is_zip", "shards"), [(True, 1), (False, 1), (True, 2), (False, 2)])
def test_torch_files_of_every_age(llm, is_zip: bool, shards: int):
    expected = weights_cases.read_arrays(llm)
    weights_cases.to_torch(llm, is_zip=is_zip, shards=shards)
    arrays = weights_cases.read_arrays(llm)
    assert arrays.keys() == expected.keys()
    for key, array in arrays.items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, expected[key])


def test_torch_is_asked_for_only_where_it_is_needed(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sources.from_llm(llm)
    (llm / "model.safetensors.index.json").unlink()
    for file in llm.glob("model*"):
        file.unlink()
    (llm / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="install torch to read them"):
        sources.from_llm(llm)


def test_a_trainer_directory_is_its_model(llm):
    """Optimizer states, consolidated and fp16 copies beside the model are not read."""
    expected = weights_cases.read_arrays(llm)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (llm / name).write_bytes(b"not a model")
    shutil.copy(llm / "model.safetensors.index.json", llm / "other.json")
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        (llm / name).write_bytes(b"not a model")
    assert weights_cases.read_arrays(llm).keys() == expected.keys()

    # One canonical file, without an index.
    weights_cases.rewrite(llm, expected)
    (llm / "model.fp16.safetensors").write_bytes(b"not a model")
    assert weights_cases.read_arrays(llm).keys() == expected.keys()


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/llm"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for read in (
        sources.from_llm,
        hf.read_vision_arch,
        store.open_tensors,
        release_import.from_release,
    ):
        with pytest.raises(
            WeightsError, match=r"holds a PEFT adapter .* --peft, with its base some/llm"
        ):
            read(tmp_path)


# git-lfs pointers


@pytest.mark.parametrize(
    "name", ["config.json", "model-00001-of-00004.safetensors", "tokenizer.json"]
)
def test_git_lfs_pointers_are_named(llm, name: str, tmp_path, capsys):
    weights_cases.write_pointer(llm / name)
    with pytest.raises(SystemExit):
        run("import", "--llm", llm, "--out", tmp_path / "in")
    message = capsys.readouterr().err.splitlines()[-1]
    assert "is a git-lfs pointer" in message
    assert name in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tokenizer.model"])
def test_git_lfs_pointers_of_other_files(llm, name: str, tmp_path, capsys):
    if name == "pytorch_model.bin":
        weights_cases.to_torch(llm)
    else:
        (llm / "tokenizer.json").unlink()
    weights_cases.write_pointer(llm / name)
    with pytest.raises(SystemExit):
        run("import", "--llm", llm, "--out", tmp_path / "in")
    assert f"{name} is a git-lfs pointer" in capsys.readouterr().err


def test_help_does_not_import_transformers():
    """Nor the libraries that read weights: --help has to be quick."""
    code = (
        "import sys; sys.argv = ['convert', '--help']\n"
        "from wings_jax import convert\n"
        "try: convert.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'transformers', 'huggingface_hub', 'torch', 'gguf', 'orbax'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "heavy: []" in result.stdout, result.stdout + result.stderr


def test_import_and_export_do_not_import_torch(tmp_path):
    """transformers imports torch with the first tokenizer, unless it takes it for missing."""
    code = (
        "import sys; from wings_jax import convert; sys.argv[0] = 'convert'\n"
        "convert.main()\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    tiny = pathlib.Path(convert.__file__).parent / "assets" / "tiny"
    imported = ("--llm", tiny / "llm", "--vision", tiny / "vision", "--out", tmp_path / "in")
    exported = ("--checkpoint", tmp_path / "in", "--format", "llm", "--out", tmp_path / "out")
    for arguments in (("import", *imported), ("export", *exported)):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.endswith("False True\n"), result.stdout
        assert "PyTorch" not in result.stderr
