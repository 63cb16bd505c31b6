"""Adapters: what training added to a frozen LLM and tower, in one file."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import training_cases
import weights_cases
from PIL import Image

import wings_jax
from wings_jax import checkpoint, generate, tree
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.evaluation import models
from wings_jax.inference.prompts import Request
from wings_jax.model import parameters
from wings_jax.weights import adapter, digests, safetensors_file, starting, store

QUESTIONS = ("What is red?", "Is 4 even?")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with an imported `base`, two models on it with their adapters, and an image."""
    root = tmp_path_factory.mktemp("adapters")
    sources = training_cases.folder()
    flags = ("--llm", sources / "llm", "--vision", sources / "vision")
    weights_cases.run("import", *flags, "--out", root / "base", "--template", "chatml")
    for stage in ("frozen_llm", "lora"):
        write_model(root, stage)
        flags = ("--checkpoint", root / stage, "--format", "adapter")
        weights_cases.run("export", *flags, "--out", root / f"{stage}.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(root / "image.png")
    return root


def write_model(root, stage: str, *, seed: int = 0) -> None:
    """Writes what configs/`stage`.py trains on the base: all that it adds has random values."""
    config = config_lib.from_config_dict(training_cases.tree_of(stage, data__template="chatml"))
    arch = starting.resolve_arch(config.model)
    step = checkpoint.find_step(root / "base", flag="")
    base, rng = checkpoint.read_params(step), np.random.default_rng(seed)
    flat = {
        path: base[path] if path in base else rng.normal(0, 0.2, struct.shape).astype(np.float32)
        for path, struct in parameters.abstract_params(arch).items()
    }
    files = checkpoint.read_tokenizer_files(step)
    checkpoint.write_checkpoint(root / stage, flat, config, arch, files)


def answer(model: wings_jax.Generator, root, images: bool) -> list:
    """Returns greedy answers with their log-probabilities."""
    paths = [root / "image.png"] if images else []
    sampling = wings_jax.SamplingParams(max_new_tokens=8, logprobs=True)
    return model.generate([Request(question, paths, sampling) for question in QUESTIONS])


def test_adapter_on_the_base_is_the_trained_model(root, capsys):
    """With a frozen LLM, text answers are the base's token for token, also through the file."""
    base, trained = wings_jax.load(root / "base"), wings_jax.load(root / "frozen_llm")
    adapted = wings_jax.load(root / "base", adapter=root / "frozen_llm.safetensors")
    for images in (False, True):
        assert answer(adapted, root, images) == answer(trained, root, images)
    for own, bases in zip(answer(adapted, root, False), answer(base, root, False), strict=True):
        assert own.tokens == bases.tokens
        assert own.logprobs == bases.logprobs
    assert "projector" not in base.weights.rest
    weights_cases.run("inspect", root / "frozen_llm.safetensors")
    printed = capsys.readouterr().out
    assert "an adapter, stage 'frozen_llm', step 0" in printed
    assert "wings: visual, rank 4" in printed

    # One file, much smaller than the model, with nothing of LLM or tower.
    tensors = safetensors_file.open_safetensors(root / "frozen_llm.safetensors")
    assert all(".learners.visual." in key or "model.projector." in key for key in tensors)
    learners = np.asarray(tensors["model.language_model.layers.0.learners.visual.o.b.weight"])
    assert np.abs(learners).max() > 0

    # The same tensors as in the whole model's export.
    flags = ("--checkpoint", root / "frozen_llm", "--format", "transformers")
    weights_cases.run("export", *flags, "--out", root / "whole")
    whole = store.open_tensors(root / "whole")
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(np.asarray(tensor), np.asarray(whole[key]), err_msg=key)


def test_adapters_are_switched_on_one_loaded_base(root):
    base = wings_jax.load(root / "base")
    embedding = base.weights.rest["decoder"]["embed"]["embedding"]
    for stage in ("frozen_llm", "lora"):
        model = base.with_adapter(root / f"{stage}.safetensors")
        assert model.weights.rest["decoder"]["embed"]["embedding"] is embedding
        for images in (False, True):
            assert answer(model, root, images) == answer(wings_jax.load(root / stage), root, images)

    # From one to the other; the parts of the first are gone.
    again = model.with_adapter(root / "frozen_llm.safetensors")
    assert answer(again, root, True) == answer(wings_jax.load(root / "frozen_llm"), root, True)


def write_base(root, name: str, **changes) -> None:
    """Writes a copy of the base, with other parameters by path or another `arch`."""
    step = checkpoint.find_step(root / "base", flag="")
    config, arch, _ = checkpoint.read_meta(step)
    flat = {path: np.array(array) for path, array in checkpoint.read_params(step).items()}
    arch = changes.pop("arch", arch)
    files = checkpoint.read_tokenizer_files(step)
    files |= changes.pop("files", {})
    for path, change in changes.items():
        change(flat[path])
    checkpoint.write_checkpoint(root / name, flat, config, arch, files)


def change_layer(array: np.ndarray) -> None:
    array[1].flat[3] += 0.5


def test_wrong_base_is_refused_by_its_first_differing_tensor(root):
    file = root / "frozen_llm.safetensors"
    write_base(root, "changed", **{"decoder/layers/mlp/up/kernel": change_layer})
    with pytest.raises(
        UserError, match=r"adapter: .*llm.safetensors .*/changed: decoder/layers/mlp/up/kernel\[1\]"
    ):
        wings_jax.load(root / "changed", adapter=file)
    with pytest.raises(UserError, match=r"decoder/layers/mlp/up/kernel\[1\] differs"):
        wings_jax.load(root / "changed").with_adapter(file)

    # What no tensor shows.
    _, arch, _ = checkpoint.read_meta(checkpoint.find_step(root / "base", flag=""))
    decoder = dataclasses.replace(arch.decoder, rope_theta=77.0)
    write_base(root, "rope", arch=dataclasses.replace(arch, decoder=decoder))
    with pytest.raises(UserError, match=r"decoder rope_theta differs \(10000.0 -> 77.0\)"):
        wings_jax.load(root / "rope", adapter=file)

    # A base without a tower, or with other ids.
    llm = training_cases.folder() / "llm"
    weights_cases.run("import", "--llm", llm, "--out", root / "llm", "--template", "chatml")
    with pytest.raises(UserError, match=r"has no vision/.*: import it with --vision"):
        wings_jax.load(root / "llm", adapter=file)
    content = json.loads((llm / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 999, "content": "<new>"})
    write_base(root, "ids", files={"tokenizer.json": json.dumps(content)})
    with pytest.raises(UserError, match=r"the tokenizer's vocabulary .* differs"):
        wings_jax.load(root / "ids", adapter=file)


def test_digests_do_not_depend_on_the_dtype_of_storage():
    exact = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    rounded = exact.astype(digests.ml_dtypes.bfloat16)
    digest = digests.digest_array(exact)
    assert digest.is_same(digests.digest_array(rounded))
    assert not digest.is_same(digests.digest_array(exact * np.float32(1 + 1e-6)))
    assert not digest.is_same(digests.digest_array(exact.reshape(3, 2)))
    assert digests.digest_array(rounded) == digests.digest_array(rounded.astype(np.float32))


def test_trained_llm_is_refused_with_the_formats_that_hold_it(root, capsys):
    write_model(root, "stage2")
    write_base(root, "tuned", **{"decoder/layers/mlp/up/kernel": change_layer})
    flags = ("export", "--format", "adapter", "--out", root / "no.safetensors")
    with pytest.raises(SystemExit):
        weights_cases.run(*flags, "--checkpoint", root / "stage2")
    message = capsys.readouterr().err
    assert "an adapter cannot hold decoder/embed/embedding: stage 'stage2' trained it" in message
    assert "--format transformers or llm can hold the checkpoint" in message

    # Compared with a base, the first tensor that differs is named.
    with pytest.raises(SystemExit):
        weights_cases.run(*flags, "--checkpoint", root / "stage2", "--base", root / "tuned")
    message = capsys.readouterr().err
    assert "an adapter cannot hold decoder/layers/mlp/up/kernel[1], which differs" in message
    assert "--format transformers or llm can hold the checkpoint" in message
    with pytest.raises(SystemExit):
        weights_cases.run(*flags, "--checkpoint", root / "base")
    assert "projector is missing" in capsys.readouterr().err
    assert not (root / "no.safetensors").exists()

    # A frozen run passes the comparison.
    out = root / "compared.safetensors"
    flags = ("--checkpoint", root / "frozen_llm", "--base", root / "base", "--out", out)
    weights_cases.run("export", "--format", "adapter", *flags)
    assert out.read_bytes() == (root / "frozen_llm.safetensors").read_bytes()


def test_adapters_of_commands(root, monkeypatch, capsys):
    """generate takes one; evaluate and analyze compare several on one base."""
    file = root / "frozen_llm.safetensors"
    words = ["--checkpoint", root / "base", "--adapter", file, "--prompt", QUESTIONS[0]]
    words += ["--image", root / "image.png", "--max-new-tokens", 8]
    monkeypatch.setattr("sys.argv", ["generate", *map(str, words)])
    generate.main()
    assert (
        capsys.readouterr().out.strip()
        == answer(wings_jax.load(root / "frozen_llm"), root, True)[0].text.strip()
    )

    found = models.find_models(
        [str(root / "base")],
        with_base=True,
        adapters=[str(file), f"low-rank={root / 'lora.safetensors'}"],
    )
    assert [model.name for model in found] == ["base", "frozen_llm", "low-rank"]
    assert found[2].open().arch.lora_rank > 0
    trained = tree.flatten(checkpoint.load(root / "frozen_llm").params)
    for path, array in tree.flatten(found[1].open().params).items():
        np.testing.assert_array_equal(array, trained[path], err_msg=path)
    with pytest.raises(UserError, match="--adapter: goes with one --checkpoint, there are 2"):
        models.find_models([str(root / "base")] * 2, with_base=False, adapters=[str(file)])


def test_files_that_are_no_adapters(root, tmp_path):
    with pytest.raises(UserError, match=r"--adapter: .*none.safetensors is not a file"):
        adapter.open_adapter(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"is a directory, an adapter of wings_jax is a file"):
        adapter.open_adapter(tmp_path)
    safetensors_file.write_safetensors(tmp_path / "other.safetensors", {})
    with pytest.raises(UserError, match=r"other.safetensors is not an adapter of wings_jax"):
        adapter.open_adapter(tmp_path / "other.safetensors")

    # Cut short, or with a part that is missing.
    whole = (root / "frozen_llm.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"cut.safetensors is cut short"):
        adapter.open_adapter(tmp_path / "cut.safetensors")
    opened = adapter.open_adapter(root / "frozen_llm.safetensors")
    metadata = safetensors_file.read_metadata(opened.file)
    tensors = dict(list(opened.tensors.items())[1:])
    safetensors_file.write_safetensors(tmp_path / "less.safetensors", tensors, metadata=metadata)
    with pytest.raises(UserError, match="missing keys"):
        wings_jax.load(root / "base", adapter=tmp_path / "less.safetensors")
