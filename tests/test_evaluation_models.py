"""The models of an evaluation: their bases, where they are placed, and names that are wrong."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import inference_cases as cases
import jax
import numpy as np
import pytest

from wings_jax import axes, checkpoint, cli, tree
from wings_jax.errors import UserError
from wings_jax.evaluation import models
from wings_jax.model import parameters


def write_model(
    directory: pathlib.Path,
    case: str = "plain",
    *,
    parts: tuple[str, ...] = ("vision", "projector", "decoder"),
    scale: float = 1.0,
    **changes,
) -> pathlib.Path:
    """Writes a random model times `scale`, with a config of these leaves."""
    cases.write_checkpoint(directory / "random", case, parts=parts)
    restored = checkpoint.load(directory / "random")
    files = checkpoint.read_tokenizer_files(restored.directory)
    flat = {path: scale * leaf for path, leaf in tree.flatten(restored.params).items()}
    model_changes = {name: changes.pop(name) for name in ("llm", "vision") if name in changes}
    model = dataclasses.replace(restored.config.model, learners=(), router=False, **model_changes)
    new = dataclasses.replace(restored.config, model=model, **changes)
    checkpoint.write_checkpoint(directory, flat, new, restored.arch, files)
    return directory


def flat_params(model: models.LazyModel) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(model.open().params).items()}


def assert_same(params: dict, expected: dict) -> None:
    assert params.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(params[path], expected[path])


# ---- the base ----


def test_base_of_an_imported_model_is_itself(tmp_path):
    imported = write_model(tmp_path / "imported", stage="import")
    base, model = models.find_models([str(imported)], with_base=True)
    assert (base.name, base.step) == ("base", None)
    assert base.origin == f"{imported}, as it was imported"
    assert_same(flat_params(base), flat_params(model))


def test_base_of_a_trained_model_is_at_the_end_of_its_chain(tmp_path):
    imported = write_model(tmp_path / "imported", stage="import", scale=2.0)
    first = write_model(tmp_path / "first", stage="stage1", init_from=str(imported), scale=3.0)
    last = write_model(tmp_path / "last", "router", stage="stage2", init_from=str(first))
    base, _ = models.find_models([str(last)], with_base=True)
    assert base.origin == f"{imported}, as it was imported"
    assert_same(flat_params(base), flat_params(models.parse_model(str(imported))))


def test_base_of_imported_parts_gets_a_new_projector(tmp_path):
    imported = write_model(tmp_path / "imported", parts=("vision", "decoder"), stage="import")
    base, model = models.find_models([str(imported)], with_base=True)
    params, expected = flat_params(base), flat_params(model)
    new = sorted(set(params) - set(expected))
    assert new
    assert all(path.startswith("projector/") for path in new)
    assert_same({path: params[path] for path in expected}, expected)


def test_base_of_a_shipped_model_is_the_shipped_llm(tmp_path):
    """A chain that ends before an import: the LLM and the tower of its config."""
    first = write_model(tmp_path / "first", llm="tiny", vision="tiny", stage="stage1")
    last = write_model(
        tmp_path / "last", llm="tiny", vision="tiny", stage="stage2", init_from=str(first)
    )
    base, _ = models.find_models([str(last)], with_base=True)
    assert base.origin == "tiny + tiny, before any training"
    opened = base.open()
    paths = set(tree.flatten(opened.params))
    assert paths == set(parameters.abstract_params(opened.arch))
    (first / "checkpoints").rename(tmp_path / "moved")  # the chain is broken, the parts are known
    again, _ = models.find_models([str(last)], with_base=True)
    assert again.origin == base.origin


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "no/such"}, "its init_from, no/such, has no checkpoint"),
        ({}, "its model.llm, qwen1_5_7b, is a preset without weights"),
        ({"llm": "no/llm"}, "config.model.llm: 'no/llm' is "),
    ],
)
def test_an_unknown_base_is_asked_for(tmp_path, changes, message):
    preset = {"llm": "qwen1_5_7b", "vision": "siglip_so400m_384"}
    last = write_model(tmp_path / "last", stage="stage2", **(preset | changes))
    with pytest.raises(UserError, match=rf"^--base: .*last: {message}.*give --base DIR"):
        models.find_models([str(last)], with_base=True)


def test_a_chain_in_a_circle_ends(tmp_path):
    first, last = tmp_path / "first", tmp_path / "last"
    write_model(first, llm="tiny", vision="tiny", stage="stage1", init_from=str(last))
    write_model(last, llm="tiny", vision="tiny", stage="stage2", init_from=str(first))
    base, _ = models.find_models([str(last)], with_base=True)
    assert base.origin == "tiny + tiny, before any training"


# ---- where a model is placed ----


@pytest.mark.parametrize("kind", ["trained", "imported", "shipped"])
def test_models_are_loaded_onto_a_mesh_in_a_dtype(tmp_path, kind):
    parts = {"llm": "tiny", "vision": "tiny"} if kind == "shipped" else {}
    stage = "import" if kind == "imported" else "stage1"
    directory = write_model(tmp_path / "model", stage=stage, **parts)
    loading = models.LoadOptions("bfloat16", axes.make_mesh({"data": 8}))
    base = None if kind != "trained" else f"old={directory}"
    first, _ = models.find_models([f"new={directory}"], with_base=True, base=base, loading=loading)
    flat = tree.flatten(first.open().params)
    assert {leaf.dtype.name for path, leaf in flat.items() if "kernel" in path} <= {"bfloat16"}
    assert flat["decoder/norm/scale"].dtype == "float32"
    assert all(len(leaf.sharding.device_set) == 8 for leaf in flat.values())


def run_evaluate(monkeypatch, *flags: object) -> None:
    from wings_jax import evaluate  # the entry point, imported only to be run

    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, flags)])
    cli.run_main("python -m wings_jax.evaluate", evaluate.main)


def test_command_on_a_mesh_gives_the_same_numbers(tmp_path, monkeypatch, capsys):
    model = cases.write_checkpoint(tmp_path / "model")
    reports = []
    for name, flags in (("one", []), ("mesh", ["--mesh", "data=8"])):
        out = tmp_path / name
        command = ["language", "--checkpoint", model, "--limit", 3, "--batch-size", 8]
        run_evaluate(monkeypatch, *command, "--out", out, *flags)
        (report,) = json.loads((out / "language.json").read_text())["models"]
        reports.append(report["perplexity"]["value"])
    assert len(jax.devices()) == 8
    assert reports[1] == pytest.approx(reports[0], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "data=3"], "mesh data=3 x fsdp=1 x tensor=1 does not fit 8 device(s)"),
        (["--mesh", "rows=2"], "--mesh: 'rows=2' is not AXIS=SIZE"),
        (["--mesh", "tensor=8"], "--mesh: the LLM"),
        (["--checkpoint", "Qwen/Qwen1.5-7B-Chat"], "Qwen/Qwen1.5-7B-Chat"),
    ],
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, flags, message):
    model = [] if flags[0] == "--checkpoint" else ["--checkpoint", write_model(tmp_path / "model")]
    with pytest.raises(SystemExit) as caught:
        run_evaluate(monkeypatch, "language", *model, "--limit", 2, *flags)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_hub_id_is_explained(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_evaluate(monkeypatch, "--checkpoint", "Qwen/Qwen1.5-7B-Chat")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "python -m wings_jax.convert import" in line
    assert "Qwen/Qwen1.5-7B-Chat" in line
