"""Processes as a cluster runs them: two that train together, and one that gets SIGTERM."""

from __future__ import annotations

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest
import training_cases as cases
from test_train_mistakes import command

STEPS = 4


def start(
    arguments: list[str],
    module: str = "wings_jax.train",
    directory: pathlib.Path = cases.ROOT,
    **environment: str,
) -> subprocess.Popen:
    """Starts a command, that of training by default, in a directory with these variables."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=directory,
        env=cases.one_device(PYTHONPATH=str(cases.ROOT), **environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    """Returns a port without a listener."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def job(
    arguments: list[str],
    processes: int,
    devices: int,
    module: str = "wings_jax.train",
    directories: Sequence[pathlib.Path] = (),
) -> list[subprocess.Popen]:
    """Starts the command in some processes that form one job, each with some devices.

    Args:
      directories: where each process is started; none for that of the repository.
    """
    address = f"localhost:{free_port()}"
    return [
        start(
            [*arguments, "--distributed"],
            module,
            directories[number] if directories else cases.ROOT,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(processes),
            JAX_PROCESS_ID=str(number),
            JAX_NUM_CPU_DEVICES=str(devices),
        )
        for number in range(processes)
    ]


def options(workdir: pathlib.Path, **changes: str) -> list[str]:
    """Returns the arguments of a short run over a mesh of four devices."""
    usual = {"batch_size": "8", "mesh__fsdp": "2", "steps": str(STEPS), "log_every": "1"}
    return command(workdir, **{**usual, **changes})


def wait_for(path: pathlib.Path, processes: list[subprocess.Popen], seconds: int = 300) -> None:
    """Returns when the file has content; fails if a process ends before."""
    until = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        ended = [p for p in processes if p.poll() is not None]
        assert not ended, ended[0].communicate()[0]
        assert time.monotonic() < until, f"no {path} after {seconds} s"
        time.sleep(0.2)


@pytest.mark.slow
def test_distributed_two_processes_equal_one(tmp_path):
    """Every other batch is text only: the processes must agree on the program of each step.

    Two steps are evaluated, which has to give the same numbers too.
    """
    replay = str(cases.folder() / "scenes/train_replay.json")
    changes = {
        "data__sources__replay__path": replay,
        "data__text_share": "0.5",
        "data__batch_by_modality": "true",
        "eval__every": "2",
        "eval__tasks": "scenes_text",
        "eval__data_root": str(cases.folder() / "scenes"),
        "eval__limit": "6",
        "eval__batch_size": "4",
    }
    together = job(options(tmp_path / "two", **changes), processes=2, devices=2)
    outputs = [process.communicate(timeout=600)[0] for process in together]
    assert [process.returncode for process in together] == [0, 0], outputs
    alone = start(options(tmp_path / "one", **changes), JAX_NUM_CPU_DEVICES="4")
    outputs = alone.communicate(timeout=600)[0]
    assert alone.returncode == 0, outputs
    two, one = (cases.losses(tmp_path / name) for name in ("two", "one"))
    assert len(two) == STEPS
    np.testing.assert_allclose(two, one, atol=1e-5)
    two, one = (accuracies(tmp_path / name) for name in ("two", "one"))
    assert list(one) == [2, 4]
    assert two == one


def accuracies(workdir: pathlib.Path) -> dict[int, float]:
    """Returns step -> accuracy of its evaluation."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    name = "eval/scenes_text/accuracy"
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.slow
def test_distributed_hosts_that_would_share_rows_are_refused(tmp_path):
    """The batch would be half as large, and the halves of a tensor would be of other rows."""
    shape = {"mesh__data": "1", "mesh__fsdp": "1", "mesh__tensor": "2"}
    together = job(options(tmp_path / "run", **shape), processes=2, devices=1)
    outputs = [process.communicate(timeout=300)[0] for process in together]
    assert [process.returncode for process in together] == [2, 2], outputs
    assert "of a batch of 8 rows the hosts would hold 8, 8," in outputs[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_the_same_command_resumes(tmp_path, processes):
    arguments = options(tmp_path / "run", steps="2000", checkpoint_every="5000")
    if processes == 1:
        running = [start(arguments, JAX_NUM_CPU_DEVICES="4")]
    else:
        running = job(arguments, processes, devices=2)
    wait_for(tmp_path / "run/metrics.jsonl", running)
    for _ in range(2 if processes == 1 else 1):  # the second one finds the first being handled
        running[-1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [143] * processes, outputs
    saved = [int(step.name) for step in (tmp_path / "run/checkpoints").iterdir()]
    assert len(saved) == 1
    again = start(
        options(tmp_path / "run", steps="2000", checkpoint_every="5000"), JAX_NUM_CPU_DEVICES="4"
    )
    for line in again.stdout:
        if "resuming from step" in line:
            break
    again.kill()
    again.communicate()
    assert f"resuming from step {saved[0]}" in line


@pytest.mark.slow
def test_host_that_dies_ends_the_others_with_its_name(tmp_path):
    arguments = options(tmp_path / "run", steps="100000", host_timeout="10")
    running = job(arguments, processes=2, devices=1)
    wait_for(tmp_path / "run/metrics.jsonl", running)
    running[1].kill()
    output = running[0].communicate(timeout=120)[0]
    assert running[0].returncode != 0
    assert "host 0 of 2 is " in output
    assert "host 0 of 2: another host ended or cannot be reached" in output
    assert "Task 1 heartbeat timeout" in output
