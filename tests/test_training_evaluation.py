"""Evaluation during training, and Weights & Biases: more metrics, and the same training."""

from __future__ import annotations

import json
import pathlib
import shutil
import struct
import sys
from collections.abc import Iterator
from typing import Any

import jax
import pytest
import test_benchmark_run
import training_cases as cases

from wings_jax import train
from wings_jax.errors import UserError
from wings_jax.evaluation import training_metric
from wings_jax.training import loop, metrics, wandb_log


def run(workdir: pathlib.Path, **changes) -> list[dict]:
    """Trains on a mesh of two devices as the command does; returns the lines of the metrics."""
    ready = cases.set_up(workdir, "stage2", devices=2, steps=3, mesh__fsdp=2, **changes)
    measurements = train.make_measurements(ready)
    with jax.set_mesh(ready.mesh):
        loop.train(ready, measurements)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    """A workdir of a run that was not evaluated."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run(workdir)
    return workdir


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """A directory with the files of the tasks."""
    root = test_benchmark_run.write_data(tmp_path_factory.mktemp("data"))
    shutil.copy(cases.folder() / "scenes/test_text.json", root)
    (root / "images").mkdir()
    return root


def settings(alone: pathlib.Path, root: pathlib.Path) -> dict:
    """Returns an evaluation every second step, against the run `alone`."""
    return {
        "eval__every": 2,
        "eval__tasks": "scenes_text,ai2d",
        "eval__data_root": str(root),
        "eval__limit": 6,
        "eval__batch_size": 4,
        "eval__base": str(alone),
    }


def test_evaluation_joins_the_metrics_and_changes_no_number(alone, root, tmp_path, capsys):
    expected = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    lines = run(tmp_path / "run", **settings(alone, root))
    printed = capsys.readouterr().out

    tasks = ("scenes_text", "ai2d")
    names = {f"eval/{task}/{name}" for task in tasks for name in ("accuracy", "change")}
    names |= {"eval/seconds"}
    assert [names <= set(line) for line in lines] == [False, True, True]
    assert " eval scenes_text=" in printed
    for line in lines[1:]:
        assert line["eval/seconds"] > 0
        assert all(0 <= line[f"eval/{task}/accuracy"] <= 1 for task in tasks)

    # The run `alone` is the base, and its parameters are those of the last step.
    assert [lines[-1][f"eval/{task}/change"] for task in tasks] == [0, 0]
    for name in ("loss", "accuracy", "grad_norm"):
        assert [line[name] for line in lines] == [line[name] for line in expected]


def test_wrong_task_is_found_before_anything_is_written(monkeypatch, tmp_path):
    flags = ["--config=configs/stage1.py", "--config.eval.every=1", "--config.eval.tasks=nothing"]
    workdir = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train", *flags, f"--workdir={workdir}"])
    monkeypatch.setattr(train.process, "run_in_caller_thread", lambda: None)
    with pytest.raises(UserError, match=r"config\.eval\.tasks: no such task: 'nothing'"):
        train.main()
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval__tasks": "nothing"}, "config.eval.tasks: no such task: 'nothing'"),
        ({"eval__tasks": "piqa", "eval__data_root": ""}, "config.eval.data_root is missing"),
        ({"eval__data_root": "/nowhere"}, "/nowhere"),
        ({"eval__base": "/nowhere"}, "config.eval.base: /nowhere holds no checkpoint"),
    ],
)
def test_mistakes_of_an_evaluation_are_named_by_key(change, message, alone, root):
    changes = {**settings(alone, root), **change}
    config = cases.config_lib.from_config_dict(cases.tree_of("stage2", **changes))
    with pytest.raises(UserError, match=message):
        training_metric.make_metric(config, None, None, jax.make_mesh((1,), ("data",)))


def test_time_of_an_evaluation_is_no_time_of_a_step(monkeypatch):
    now = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    clock = metrics.Clock(10)
    clock.start()
    clock.tick(waited=0.0, tokens=1)
    clock.skip(9.0)
    clock.tick(waited=0.0, tokens=1)
    assert clock.read(2)["step_s"] == pytest.approx((10 + 1) / 2)


def test_wandb_gets_every_step_and_a_resumed_run_continues_it(tmp_path, monkeypatch):
    """Offline, so that nothing is sent; the files that it would send are read."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = cases.config_lib.Config(wandb="wings-tests")
    for steps in ((1, 2), (3,)):
        log = wandb_log.WandbLog(tmp_path, config)
        for step in steps:
            log.write(step, {"loss": 0.5 ** (step - 1)})
        log.close()

    found, ids = {}, set()
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for record in read_records(path.read_bytes()):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {item.nested_key[0]: item.value_json for item in record.history.item}
                found[int(items["_step"])] = float(items["loss"])
    assert found == {1: 1.0, 2: 0.5, 3: 0.25}
    assert ids == {json.loads((tmp_path / "wandb.json").read_text())["id"]}


def read_records(content: bytes) -> Iterator[Any]:
    """Yields the records of a short file of wandb: after 7 bytes, each one has a header of 7."""
    from wandb.proto import wandb_internal_pb2

    place = 7
    while place < len(content):
        _, size, _ = struct.unpack_from("<IHB", content, place)  # checksum, bytes, kind
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content[place + 7 : place + 7 + size])
        yield record
        place += 7 + size


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    """A directory of that name, which earlier runs write, is not the package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    message = r"config\.wandb: needs the package wandb: pip install 'wings_jax\[wandb\]'"
    with pytest.raises(UserError, match=message):
        wandb_log.check_installed()
