"""The command line of the forgetting experiment: errors, and all of it in two steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import jax
import pytest
import training_cases as cases

from wings_jax import cli
from wings_jax.evaluation import tasks
from wings_jax.forgetting import __main__ as forgetting
from wings_jax.forgetting.methods import SHIFT


def run_command(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["forgetting", *map(str, flags)])
    cli.run_main("python -m wings_jax.forgetting", forgetting.main)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "wings,wing"], "--methods: there is no 'wing'; there are base, llava"),
        (["--methods", ","], "--methods: contains no name"),
        (
            ["--regimes", "text"],
            "--regimes (--base tiny): there is no 'text'; there are images, replay",
        ),
        (["--seeds", "0,a"], "--seeds: '0,a' is not a list of whole numbers"),
        (["--seeds", "0,99999999999999999999"], "--seeds: 99999999999999999999 is not between 0"),
        (["--seeds=-1"], "--seeds: -1 is not between 0 and 4294967295"),
        (["--steps", "0"], "--steps: 0 is less than 1"),
        (["--limit", "0", "--fast"], "--limit: 0 is less than 1"),
        (["--data-root", "no/such"], "--data-root: no/such has no scenes.json"),
        (["--confg.steps=3"], "'--confg.steps=3' is neither a flag nor --config.key=value"),
        (["--config.batch_size", "3"], "'--config.batch_size' is neither a flag nor"),
        (["--methods", "base@steps=3"], "--methods: there is no 'base@steps=3'"),
        (["--methods", "wings@steps=x"], "--methods: there is no 'wings@steps=x'"),
        (["--methods", "wings@steps=0"], "--methods: there is no 'wings@steps=0'"),
        (["--methods", "wings@optimzer.b1=1"], "wings@optimzer.b1=1: its config has no key optim"),
        (["--methods", "llava@model.rank.x=1"], "llava@model.rank.x=1: its config has no key"),
        (["--methods", "wings@seed=3"], "--methods: wings@seed=3: seed is set by the experiment"),
        (["--base", "smollm2", "--regimes", "replay"], "(--base smollm2): there is no 'replay'"),
        (["--base", "smollm2", "--gguf", "no.gguf"], "--gguf: no.gguf is not a file"),
        (
            ["--text", "no.txt"],
            "--text: the tiny LLM was not trained on English; add --base smollm2",
        ),
        (["--gguf", "no.gguf"], "--gguf: the LLM of the tiny base ships here"),
        (["--config.seed=3"], "--config.seed=3: seed is set by the experiment itself"),
    ],
)
def test_user_errors_are_one_line(monkeypatch, capsys, tmp_path, flags, message):
    monkeypatch.chdir(cases.ROOT)
    with pytest.raises(SystemExit) as caught:
        run_command(monkeypatch, "--out", tmp_path / "out", *flags)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_it_finds_the_shipped_configs_from_any_directory(tmp_path):
    """A mistake in a method's key is found after its config was read."""
    flags = ["--fast", "--methods", "wings@model.nothing=1"]
    completed = subprocess.run(
        [sys.executable, "-m", "wings_jax.forgetting", *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(cases.ROOT)},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 2
    (line,) = completed.stderr.strip().splitlines()
    assert line.endswith("--methods: wings@model.nothing=1: its config has no key model.nothing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_experiment(monkeypatch, capsys, tmp_path):
    """Two methods of two steps, to the table; then a third that fails and nothing repeated."""
    monkeypatch.chdir(cases.ROOT)
    assert len(jax.devices()) == 8  # of this process, not of its child processes
    monkeypatch.setenv("XLA_FLAGS", cases.one_device()["XLA_FLAGS"])  # for the child processes
    directory, out = cases.folder(layers=3), tmp_path / "out"
    flags = [
        "--out",
        out,
        "--data-root",
        directory / "scenes",
        "--seeds",
        "0",
        "--regimes",
        "images",
    ]
    flags += ["--steps", "2", "--stage1-steps", "2", "--limit", "6"]
    model = {"model.llm": directory / "llm", "model.vision": directory / "vision", "model.rank": 4}
    quick = {"batch_size": 8, "optimizer.name": "adamw", "data.threads": 1}
    flags += [f"--config.{key}={value}" for key, value in (model | quick).items()]
    run_command(monkeypatch, *flags, "--methods", "base,frozen_llm")
    output = capsys.readouterr().out
    assert "2 of 2 runs done" in output
    assert "Wings, frozen LLM" in output
    content = json.loads((out / "forgetting.json").read_text())
    base, frozen = (content["table"]["images"][name] for name in ("base", "frozen_llm"))
    assert base["trained"] == 0 < frozen["trained"]
    assert set(base["scores"]) == {*tasks.TASKS, "laws"}
    assert base["scores"]["scenes_text"] == {
        row: {**score, "against_reference": score["against_reference"]}
        for row, score in frozen["scores"]["scenes_text"].items()
    }  # the LLM is frozen: the same answers
    assert 0 <= frozen["scores"]["laws"][SHIFT.row]["mean"] <= 2
    assert content["missing"] == {}
    assert (out / "accuracy-images.png").is_file()
    assert not list(out.rglob("*.tmp"))

    # Another method is added; its first stage is damaged, so it fails. No other run is repeated.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    damaged = out / "stage1" / "llava_stage1" / "seed-0"
    shutil.copytree(out / "stage1" / "stage1" / "seed-0", damaged)
    (damaged / "train.done.json").unlink()
    with pytest.raises(SystemExit) as caught:
        run_command(monkeypatch, *flags, "--methods", "base,frozen_llm,llava")
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert "1 of 3 runs failed (llava, images, seed 0)" in captured.err
    error = f"python -m wings_jax.train: --workdir: {damaged} holds a run of another config"
    assert f"see {damaged / 'train.log'}: {error}" in captured.out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("run.json")} == before
