"""What an export in the release's layout records, and what an import restores."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import weights_cases
from weights_cases import run

from wings_jax import checkpoint, tree
from wings_jax import config as config_lib
from wings_jax.model import parameters, presets
from wings_jax.weights import hf, store

WINGS = {"learners": ("visual", "textual"), "router": True, "rank": 4}


def write_model(workdir: pathlib.Path, **fields: object) -> presets.WingsArch:
    """Writes a random Wings model as a checkpoint; returns its architecture."""
    sources = weights_cases.sources()
    decoder = hf.read_decoder_arch(sources / "llm")
    tower = dataclasses.replace(
        hf.read_vision_arch(sources / "tower"), feature_layer=-1, mean=(0.1, 0.2, 0.3)
    )
    arch = presets.WingsArch(decoder, tower, **{**WINGS, **fields})
    rng = np.random.default_rng(3)
    params = {
        path: rng.normal(0, 0.2, struct.shape).astype(np.float32)
        for path, struct in parameters.abstract_params(arch).items()
    }
    files = {file.name: file.read_text() for file in (sources / "llm").glob("token*.json")}
    config = config_lib.Config(data=config_lib.DataConfig(template="chatml"))
    checkpoint.write_checkpoint(workdir, params, config, arch, files)
    return arch


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gain": 1.5},
        {"gain": 2.0, "semantics": presets.release_semantics(17)},
        {"learners": ("visual",), "router": False},
    ],
)
def test_an_export_comes_back_as_it_was(fields: dict, tmp_path):
    """Semantics, gain and tower: of the paper's semantics the release's files know nothing."""
    arch = write_model(tmp_path / "run", **fields)
    run("export", "--checkpoint", tmp_path / "run", "--format", "wings", "--out", tmp_path / "out")
    run("import", "--wings", tmp_path / "out", "--out", tmp_path / "in")
    imported = checkpoint.load(tmp_path / "in")
    assert imported.arch == arch
    assert imported.config.model.gain == arch.gain
    is_paper = arch.semantics == presets.PAPER
    assert imported.config.model.semantics == ("paper" if is_paper else "release")

    original = tree.flatten(checkpoint.load(tmp_path / "run").params)
    for path, array in tree.flatten(imported.params).items():
        np.testing.assert_array_equal(array, original[path], err_msg=path)


@pytest.mark.parametrize("semantics", ["paper", "release"])
def test_a_flag_overrides_the_semantics(semantics: str, tmp_path):
    expected = presets.PAPER if semantics == "paper" else presets.release_semantics(9)
    run(
        *("import", "--wings", weights_cases.sources() / "wings_stage2"),
        *("--vision", weights_cases.sources() / "tower", "--semantics", semantics),
        *("--out", tmp_path / "in"),
    )
    assert checkpoint.load(tmp_path / "in").arch.semantics == expected


def test_an_llm_has_no_semantics(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(
            *("import", "--llm", weights_cases.sources() / "llm", "--semantics", "paper"),
            *("--out", tmp_path / "in"),
        )
    assert "--semantics: only for --wings" in capsys.readouterr().err


def test_an_exported_llm_has_no_entries_of_wings(tmp_path):
    write_model(tmp_path / "run")
    run("export", "--checkpoint", tmp_path / "run", "--format", "wings", "--out", tmp_path / "out")
    run("import", "--wings", tmp_path / "out", "--out", tmp_path / "in")
    run("export", "--checkpoint", tmp_path / "in", "--format", "llm", "--out", tmp_path / "llm")
    assert "wings_jax" not in store.read_config(tmp_path / "llm")


def test_a_hub_id_as_checkpoint_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("export", "--checkpoint", "Qwen/Qwen1.5-7B-Chat", "--format", "llm", "--dry-run")
    error = capsys.readouterr().err
    assert "import it first: python -m wings_jax.convert import" in error
