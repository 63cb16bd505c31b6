"""A user's mistake gets one clear line on stderr and exit status 2; nothing is written."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import training_cases as cases

from wings_jax import axes, cli, errors, train
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
    with pytest.raises(SystemExit) as stopped:
        cli.run_main(train.PROGRAM, train.main)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in printed if line.startswith(f"{train.PROGRAM}: ")]
    assert len(lines) == 1, printed
    assert printed[-1] == lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonsense": "1"}, "nonsense"),
        ({"optimizer__clap": "1"}, "clap"),
        ({"batch_size": "many"}, "batch_size"),
        ({"data__sources__scenes__path": "/nowhere.json"}, "/nowhere.json"),
        (
            {"mesh__fsdp": "3"},
            "--config.mesh: mesh data=-1 x fsdp=3 x tensor=1 does not fit",
        ),
        ({"mesh__tensor": "4"}, "the LLM: the mesh does not divide K=2 over tensor=4"),
        ({"mesh__fsdp": "-1"}, "--config.mesh: mesh data=-1 x fsdp=-1 x tensor=1: sizes are"),
        ({"optimizer__groups__visual": "decoder/wing/.*"}, "visual (decoder/wing/.*)"),
        ({"init_from": "/nowhere"}, "config.init_from: /nowhere holds no checkpoint"),
        ({"model__llm": "qwen1_5_7b"}, "config.data.tokenizer"),
        ({"model__rank": "0"}, "config.model.rank: 0 is less than 1"),
        ({"optimizer__skip_limit": "0"}, "config.optimizer.skip_limit: 0 is less than 1"),
        ({"optimizer__warmup_ratio": "5.0"}, "config.optimizer.warmup_ratio: 5.0 is not"),
        ({"optimizer__groups__visual": "("}, "config.optimizer.groups: '(' is not a regular"),
        ({"optimizer__learning_rates__visual": "-1e-3"}, "learning_rates.visual: -0.001 is less"),
        (
            {"model__lora_targets": "('q','z')"},
            "config.model.lora_targets: 'z' is not one of q, k,",
        ),
        ({"model__lora_rank": "4"}, "learning_rates.llm: decoder/layers/attn/k/a is newly init"),
        ({"steps": "-1", "epochs": "0.0"}, "config.epochs: 0.0 is not more than 0"),
        (
            {"init_from": "s3://there"},
            "config.init_from: s3://there: only local paths and gs:",
        ),
    ],
)
def test_user_error_is_one_line(changes, message, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    line = fails(command(workdir, **changes), capsys, monkeypatch)
    assert message in line
    assert not workdir.exists()


def test_user_error_unknown_preset(capsys, monkeypatch):
    unknown = [f"--config={cases.ROOT}/configs/stage1.py:gigantic"]
    line = fails(unknown, capsys, monkeypatch)
    assert "configs/stage1.py: preset 'gigantic' is not one of tiny" in line


def test_user_error_config_does_not_exist(capsys, monkeypatch):
    line = fails([f"--config={cases.ROOT}/configs/stage9.py"], capsys, monkeypatch)
    assert "configs/stage9.py" in line
    assert "Traceback" not in line
    assert len(line) < 300


def test_checkpoint_of_another_model_or_with_adapters(tmp_path, capsys):
    """What no shape shows: the LLM's rope, LoRA that would be dropped, ignored parameters."""
    cases.run(tmp_path / "lora", "lora", steps=1)
    message = r"decoder/layers/attn/k/a is not in the config's model and would be lost"
    with pytest.raises(errors.UserError, match=message):
        cases.set_up(tmp_path / "run", "llava", init_from=str(tmp_path / "lora"))
    cases.run(tmp_path / "stage1", "stage1", steps=1)
    llm = tmp_path / "llm"
    shutil.copytree(cases.folder() / "llm", llm)
    described = json.loads((llm / "config.json").read_text())
    described["rope_theta"] = described.get("rope_theta", 1e6) * 2
    if "rope_parameters" in described:
        described["rope_parameters"]["rope_theta"] = described["rope_theta"]
    (llm / "config.json").write_text(json.dumps(described))
    message = r"config\.model\.llm: decoder rope_theta differs from the checkpoint's .*stage1/"
    init_from = str(tmp_path / "stage1")
    with pytest.raises(errors.UserError, match=message):
        cases.set_up(tmp_path / "run", init_from=init_from, model__llm=str(llm))
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    cases.set_up(tmp_path / "run", "llava", init_from=init_from)
    assert "ignored parameters of the checkpoint " in capsys.readouterr().out
    cases.run(tmp_path / "stage2", steps=1)
    message = "config.model.gain differs from the checkpoint's (1.0 -> 2.0), "
    gain2 = {"init_from": str(tmp_path / "stage2")}
    with pytest.raises(errors.UserError, match=re.escape(message)):
        cases.set_up(tmp_path / "gain", "gain2", **gain2)
    assert not (tmp_path / "gain").exists()
    capsys.readouterr()
    cases.set_up(tmp_path / "gain", "gain2", accept_changed_model=True, **gain2)
    assert message in capsys.readouterr().out


def test_mesh_on_which_hosts_would_share_a_batch():
    """On eight devices as of two hosts, `tensor` must divide those of a host."""

    def hosts(shape, host_of):
        mesh = axes.make_mesh(shape)
        places = axes.sharding_of(mesh, ("B",)).devices_indices_map((16,))
        fakes = {mock.Mock(process_index=host_of(d.id)): span for d, span in places.items()}
        return mock.Mock(devices_indices_map=lambda shape: fakes)

    def check(shape, host_of):
        with mock.patch.object(axes, "sharding_of", return_value=hosts(shape, host_of)):
            axes.check_hosts(None, 16)

    for shape in ({"data": 8}, {"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}):
        check(shape, lambda number: number // 4)
    for shape, host_of in (
        ({"data": 1, "tensor": 8}, lambda number: number // 4),
        ({"data": 4, "tensor": 2}, lambda number: number % 2),
        ({"data": 8}, lambda number: int(number == 0)),
    ):
        with pytest.raises(axes.MeshError, match="of a batch of 16 rows the hosts would hold"):
            check(shape, host_of)


def test_user_error_stage2_without_stage1(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command(tmp_path / "run", "stage2")
    line = fails(arguments, capsys, monkeypatch)
    assert "config.init_from: runs/stage1 holds no checkpoint; run the stage before" in line


def test_user_error_malformed_json_with_its_position(tmp_path, capsys, monkeypatch):
    broken = tmp_path / "broken.json"
    broken.write_text('[{"id": "a",\n  "conversations": oops}]')
    path = {"data__sources__scenes__path": str(broken)}
    line = fails(command(tmp_path / "run", **path), capsys, monkeypatch)
    assert "broken.json" in line
    assert "line 2" in line


def test_workdir_of_another_config_is_not_changed(tmp_path):
    cases.run(tmp_path / "run", "stage1", steps=1)
    before = (tmp_path / "run/config.json").read_text()
    with pytest.raises(errors.UserError, match=r"a run of another config \(seed: 0 -> 5\)"):
        cases.set_up(tmp_path / "run", "stage1", steps=1, seed=5)
    assert (tmp_path / "run/config.json").read_text() == before


def test_user_error_workdir_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    line = fails(command(tmp_path / "file/run"), capsys, monkeypatch)
    assert f"--workdir: cannot write to {tmp_path}/file" in line


def test_user_error_checkpoints_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("")
    line = fails(command(tmp_path / "run"), capsys, monkeypatch)
    assert f"--workdir: {tmp_path}/run/checkpoints is not a directory" in line


@pytest.mark.parametrize("when", ["save", "wait_until_finished"])
def test_full_disk_is_one_line(tmp_path, monkeypatch, when):
    """Orbax raises a ValueError of many lines, at once or when it is waited for."""
    run = cases.set_up(tmp_path / "run", "stage1", steps=1)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device\nand more")

    monkeypatch.setattr(run.writer._manager, when, full)
    with pytest.raises(errors.UserError, match=r"--workdir: .*run/checkpoints: cannot be.*space"):
        loop.train(run)


@pytest.mark.parametrize(
    ("before", "raised"), [(KeyError("first"), KeyError), (SystemExit(143), errors.UserError)]
)
def test_error_of_the_run_is_raised_before_one_of_the_disk(tmp_path, monkeypatch, before, raised):
    """After a stop the failed save is raised: the exit status must not report success."""
    run = cases.set_up(tmp_path / "run", "stage1", steps=1)

    def full():
        raise OSError("No space left on device")

    monkeypatch.setattr(run.writer._manager, "wait_until_finished", full)
    with pytest.raises(raised), run.writer:
        raise before


@pytest.mark.slow
def test_command_trains_and_resumes(tmp_path):
    arguments = command(tmp_path / "run", steps="2")
    environment = cases.one_device()
    start = [sys.executable, "-m", "wings_jax.train", *arguments]
    for _ in range(2):
        done = subprocess.run(
            start, cwd=cases.ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
    assert "resuming from step 2" in done.stdout
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 2
