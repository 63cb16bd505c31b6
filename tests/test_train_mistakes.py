"""A user's mistake gets one clear line on stderr, exit status 2, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import training_cases as cases
from absl import flags

from wings_jax import errors, train
from wings_jax.training import loop


def command(workdir: pathlib.Path, stage: str = "stage1", **changes: str) -> list[str]:
    """Returns the arguments of a run on the small base."""
    values = {
        "model.llm": cases.folder() / "llm",
        "model.vision": cases.folder() / "vision",
        "data.scenes": "",
        "data.sequence_length": 128,
        "data.sources.scenes.path": cases.folder() / f"scenes/train_{stage}.json",
        "data.sources.scenes.images": cases.folder() / "scenes/images",
        "steps": 1,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    config = f"--config={cases.ROOT}/configs/{stage}.py"
    return [config, *(f"--config.{k}={v}" for k, v in values.items()), f"--workdir={workdir}"]


def fails(arguments: list[str], capsys, monkeypatch) -> str:
    """Returns the one line that the command ends with."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    flags.FLAGS.unparse_flags()
    for name in list(flags.FLAGS):
        if name.startswith("config."):  # the overrides that an earlier command defined
            delattr(flags.FLAGS, name)
    with pytest.raises(SystemExit) as stopped:
        errors.entry("wings_jax.train", train.main)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in said if line.startswith("wings_jax.train: ")]
    assert len(lines) == 1, said
    assert said[-1] == lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonsense": "1"}, "nonsense"),
        ({"optimizer__clap": "1"}, "clap"),
        ({"batch_size": "many"}, "batch_size"),
        ({"data__sources__scenes__path": "/nowhere.json"}, "/nowhere.json"),
        ({"mesh__fsdp": "3"}, "mesh data=-1 x fsdp=3 x tensor=1 does not fit 8 device(s)"),
        ({"mesh__tensor": "4"}, "the LLM: the mesh does not divide K=2 over tensor=4"),
        ({"batch_size": "12"}, "the batch: the mesh does not divide B=12"),
        ({"optimizer__groups__visual": "decoder/wing/.*"}, "visual (decoder/wing/.*)"),
        ({"init_from": "/nowhere"}, "config.init_from: /nowhere holds no checkpoint"),
        ({"model__llm": "qwen1_5_7b"}, "config.data.tokenizer"),
    ],
)
def test_mistakes_are_told_in_one_line(changes, message, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    said = fails(command(workdir, **changes), capsys, monkeypatch)
    assert message in said
    assert not workdir.exists()


def test_an_unknown_preset(capsys, monkeypatch):
    unknown = [f"--config={cases.ROOT}/configs/stage1.py:gigantic"]
    assert "'gigantic' is not one of tiny" in fails(unknown, capsys, monkeypatch)


def test_stage_two_without_stage_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command(tmp_path / "run", "stage2")
    said = fails(arguments, capsys, monkeypatch)
    assert "config.init_from: runs/stage1 holds no checkpoint; run the stage before" in said


def test_malformed_json_with_its_position(tmp_path, capsys, monkeypatch):
    broken = tmp_path / "broken.json"
    broken.write_text('[{"id": "a",\n  "conversations": oops}]')
    path = {"data__sources__scenes__path": str(broken)}
    said = fails(command(tmp_path / "run", **path), capsys, monkeypatch)
    assert "broken.json" in said
    assert "line 2" in said


def test_a_workdir_of_another_config_is_left_as_it_is(tmp_path):
    cases.run(tmp_path / "run", "stage1", steps=1)
    before = (tmp_path / "run/config.json").read_text()
    with pytest.raises(errors.UserError, match=r"made with another config \(seed: 0 -> 5\)"):
        cases.set_up(tmp_path / "run", "stage1", steps=1, seed=5)
    assert (tmp_path / "run/config.json").read_text() == before


def test_a_workdir_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    said = fails(command(tmp_path / "file/run"), capsys, monkeypatch)
    assert f"--workdir: cannot write to {tmp_path}/file" in said


def test_checkpoints_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("")
    said = fails(command(tmp_path / "run"), capsys, monkeypatch)
    assert f"--workdir: {tmp_path}/run/checkpoints is no folder" in said


@pytest.mark.parametrize("when", ["save", "wait_until_finished"])
def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch, when):
    """Orbax raises a ValueError of many lines, at once or when it is waited for."""
    run = cases.set_up(tmp_path / "run", "stage1", steps=1)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device\nand more")

    monkeypatch.setattr(run.writer._manager, when, full)
    with pytest.raises(errors.UserError, match=r"--workdir: .*run/checkpoints: cannot be.*space"):
        loop.train(run)


@pytest.mark.parametrize(
    ("before", "told"), [(KeyError("first"), KeyError), (SystemExit(143), errors.UserError)]
)
def test_an_error_is_told_before_the_disk_and_a_stop_is_not(tmp_path, monkeypatch, before, told):
    """Whoever is asked to stop and could not save must not say that all is well."""
    run = cases.set_up(tmp_path / "run", "stage1", steps=1)

    def full():
        raise OSError("No space left on device")

    monkeypatch.setattr(run.writer._manager, "wait_until_finished", full)
    with pytest.raises(told), run.writer:
        raise before


@pytest.mark.slow
def test_the_command_trains_and_resumes(tmp_path):
    arguments = command(tmp_path / "run", steps="2")
    environment = {**os.environ, "XLA_FLAGS": ""}
    start = [sys.executable, "-m", "wings_jax.train", *arguments]
    for _ in range(2):
        done = subprocess.run(
            start, cwd=cases.ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
    assert "going on after step 2" in done.stdout
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 2
