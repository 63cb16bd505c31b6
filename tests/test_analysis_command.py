"""The command `wings_jax.analyze laws`."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import analysis_cases
import numpy as np
import pytest
import tiny_data
from analysis_cases import LONG, run_analyze
from PIL import Image

from wings_jax import analyze
from wings_jax.analysis import laws, probes, slot_classes
from wings_jax.analysis.probes import Variant
from wings_jax.analysis.slot_classes import CLASSES
from wings_jax.data import samples

BEFORE = CLASSES.index("before")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return analysis_cases.write_model(tmp_path_factory.mktemp("run") / "random")


def test_command_writes_curves_and_plots(workdir, tmp_path, monkeypatch, capsys):
    report = {
        "models": [
            {
                "name": name,
                "tasks": {"scenes_text": {"all text": {"accuracy": 0.5, "interval95": [0.4, 0.6]}}},
            }
            for name in ("one", "two")
        ]
    }
    tiny_data.write_json(tmp_path / "report.json", report)
    out = tmp_path / "new" / "out"
    models = ("--checkpoint", f"one={workdir}", f"two={workdir}")
    scores = ("--scores", tmp_path / "report.json")
    run_analyze(monkeypatch, *models, *scores, "--limit", 4, "--out", out)
    one, two = json.loads((out / "laws_summary.json").read_text())["models"]
    assert {**one, "name": "two"} == two
    assert one["variant"] == dataclasses.asdict(Variant())
    assert (one["n_used"], one["n_skipped"], one["layers"]) == (4, 0, 3)
    assert 0 <= one["shift"]["mean"] <= 2
    assert {rows: by["n_used"] for rows, by in one["shift_by_rows"].items()} == {
        "all": 4,
        "after": 4,
    }
    total = sum(np.array(curve["mean"]) for curve in one["curves"].values())
    np.testing.assert_allclose(total, 1, atol=1e-5)
    router = one["router"]
    np.testing.assert_allclose(
        np.add(router["visual"]["text"], router["textual"]["text"]), 1, atol=1e-5
    )
    lines = [json.loads(line) for line in (out / "laws.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    rho = laws.correlation(*(lines[0]["curves"][name] for name in ("before", "after")))
    assert lines[0]["shift"] == pytest.approx(1 - rho, abs=1e-3)
    heads = np.load(out / "laws_heads-one.npz")
    assert heads["masses"].shape == (4, 3, 4, len(CLASSES))
    before = heads["masses"].mean(2)[0, :, BEFORE]
    np.testing.assert_allclose(before, lines[0]["curves"]["before"], atol=1e-5)
    gates, kinds = heads["gates"], list(heads["kinds"])
    assert gates.shape == heads["norms"].shape == (4, 3, 2, 2)
    visual = gates[:, :, kinds.index("text"), list(heads["learners"]).index("visual")].mean(0)
    np.testing.assert_allclose(visual, router["visual"]["text"], atol=1e-5)
    for name in ("curves", "shares-one", "shares-two", "router", "norms", "scatter"):
        assert Image.open(out / f"laws_{name}.png").width > 300
    assert sorted(path.suffix for path in out.iterdir()) == [
        ".json",
        ".jsonl",
        *[".npz"] * 2,
        *[".png"] * 6,
    ]
    assert "Attention shift over layers (rows: all" in capsys.readouterr().out


def test_users_data_and_skipped_samples(workdir, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    good = tiny_data.turns(LONG, "yes", f"<image>\n{LONG}", "no")
    records = [
        {"id": "good", "image": "a.png", "conversations": good},
        {"id": "open", "image": "a.png", "conversations": good[:-1]},
        {"id": "text", "conversations": good},
        {"id": "lost", "image": "b.png", "conversations": good},
    ]
    file = tiny_data.write_json(tmp_path / "data.json", records)
    out = tmp_path / "out"
    given = ("--checkpoint", workdir, "--data", file, "--out", out, "--rows", "after")
    run_analyze(monkeypatch, *given, "--prompt-only", "--exclude-prefix", 3)
    (actual,) = json.loads((out / "laws_summary.json").read_text())["models"]
    assert actual["variant"] == {"rows": "after", "exclude_prefix": 3, "prompt_only": True}
    assert actual["n_used"] == 2
    assert {c: row["count"] for c, row in actual["skipped"].items()} == {
        probes.TEXT_ONLY: 1,
        samples.MISSING_IMAGE: 1,
    }
    assert min(actual["curves"]["excluded"]["mean"]) > 0
    one, other = (json.loads(line) for line in (out / "laws.jsonl").read_text().splitlines())
    assert one["curves"] == other["curves"]  # without its answer it is the same prompt
    printed = capsys.readouterr().out
    assert "rows: after, excluded prefix: 3, prompt only" in printed
    assert "2 of 4 samples are skipped: 1 x text only (first: text: no image)" in printed


def read_curves(directory: pathlib.Path) -> np.ndarray:
    """Returns f64[model x sample,C,L], the curves of laws.jsonl."""
    lines = (directory / "laws.jsonl").read_text().splitlines()
    return np.array([list(json.loads(line)["curves"].values()) for line in lines])


def test_mesh_and_dtype(workdir, tmp_path, monkeypatch):
    given = ("--checkpoint", workdir, "--limit", 5, "--batch-size", 2)
    options = {
        "one": (),
        "mesh": ("--mesh", "data=2,fsdp=2,tensor=2"),
        "bfloat16": ("--dtype", "bfloat16"),
    }
    for name, option in options.items():
        run_analyze(monkeypatch, *given, *option, "--out", tmp_path / name)

    one, mesh, bfloat16 = (read_curves(tmp_path / name) for name in options)
    np.testing.assert_allclose(mesh, one, atol=2e-6)
    np.testing.assert_allclose(bfloat16, one, atol=0.05)
    assert np.abs(bfloat16 - one).max() > 1e-5


def test_base_of_an_imported_model(tmp_path, monkeypatch):
    imported = analysis_cases.write_model(tmp_path / "imported", stage="import")
    given = ("--checkpoint", imported, "--limit", 2, "--base", "--out", tmp_path / "out")
    run_analyze(monkeypatch, *given)
    summary = json.loads((tmp_path / "out" / "laws_summary.json").read_text())
    assert [model["name"] for model in summary["models"]] == ["base", "imported"]
    base, model = read_curves(tmp_path / "out").reshape(2, 2, len(CLASSES), 3)
    np.testing.assert_array_equal(base, model)


def test_base_given_as_a_directory(workdir, tmp_path, monkeypatch):
    given = ("--checkpoint", workdir, "--limit", 2, "--base", f"before={workdir}")
    run_analyze(monkeypatch, *given, "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "laws_summary.json").read_text())
    assert [model["name"] for model in summary["models"]] == ["before", "random"]


def test_help_lists_the_rows_of_the_probes():
    assert slot_classes.ROWS == analyze.ROWS
