"""Which job a process belongs to, by its flags and environment variables."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import training_cases as cases
from test_train_mistakes import command, fails

from wings_jax import distributed, hosts
from wings_jax.errors import UserError
from wings_jax.hosts import DistributedJob as Job
from wings_jax.hosts import JobFlags
from wings_jax.training import arguments

SLURM = {
    "SLURM_JOB_ID": "81234",
    "SLURM_STEP_NODELIST": "gpu[007,011-014]",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d::2]:43370",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
# As xpk sets them for GPUs: the address without its port.
JOBSET = {
    "JOBSET_NAME": "wings",
    "REPLICATED_JOB_NAME": "slice-job",
    "JAX_COORDINATOR_ADDRESS": "wings-slice-job-0-0.wings",
    "JAX_COORDINATOR_PORT": "6002",
    "NNODES": "2",
    "NODE_RANK": "1",
    "JOB_COMPLETION_INDEX": "1",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("flags", "environment", "job"),
    [
        (JobFlags("h:7", 4, 2), {}, Job("h:7", 4, 2, None, "flags and JAX_* variables")),
        (JobFlags(), JAX, Job("a:1", 2, 0, None, "flags and JAX_* variables")),
        (JobFlags(process_id=1), JAX, Job("a:1", 2, 1, None, "flags and JAX_* variables")),
        (JobFlags(), SLURM, Job("gpu007:64850", 4, 3, None, "Slurm")),
        (
            JobFlags("h:7"),
            SLURM,
            Job("h:7", 4, 3, None, "flags and JAX_* variables and Slurm"),
        ),
        (JobFlags(), OPEN_MPI, Job("[fe80::b9b:ac5d:9cf0:b858]:62880", 8, 5, (1,), "Open MPI")),
        # mpirun inside of a Slurm job: the processes are those of mpirun.
        (
            JobFlags(),
            {**SLURM, **OPEN_MPI, "JAX_LOCAL_DEVICE_IDS": "0,1"},
            Job("[fe80::b9b:ac5d:9cf0:b858]:62880", 8, 5, None, "Open MPI"),
        ),
        (
            JobFlags(),
            JOBSET,
            Job(
                "wings-slice-job-0-0.wings:6002",
                2,
                1,
                None,
                "flags and JAX_* variables and Kubernetes",
            ),
        ),
        (
            JobFlags(),
            {k: v for k, v in JOBSET.items() if not k.startswith("JAX")},
            Job("wings-slice-job-0-0.wings:55527", 2, 1, None, "Kubernetes"),
        ),
    ],
)
def test_job_is_found(flags, environment, job):
    assert hosts.find_job(flags, environment) == job


@pytest.mark.parametrize(
    "environment", [{}, TPU, {**JOBSET, **TPU, "JAX_COORDINATOR_ADDRESS": ""}, {"HOME": "/"}]
)
def test_what_jax_detects_is_left_to_it(environment):
    assert hosts.find_job(JobFlags(), environment) is None


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({}, (3,)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (3,)),
        ({"CUDA_VISIBLE_DEVICES": "3"}, None),  # --gpus-per-task=1 shows each task only its own
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        ({"SLURM_STEP_NUM_NODES": "16"}, None),  # a task per node has all its GPUs
    ],
)
def test_tasks_of_one_machine_share_its_gpus(changes, gpus):
    tasks = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "3"}
    assert hosts.find_job(JobFlags(), {**SLURM, **tasks, **changes}).local_device_ids == gpus


@pytest.mark.parametrize("environment", [SLURM, OPEN_MPI], ids=["Slurm", "Open MPI"])
def test_addresses_are_those_of_jax(environment, monkeypatch):
    from jax._src.clusters import OmpiCluster, SlurmCluster

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cluster = SlurmCluster if environment is SLURM else OmpiCluster
    theirs = cluster.get_coordinator_address(5, None)
    ours = hosts.find_job(JobFlags(), environment).coordinator_address
    assert ours.replace("[", "").replace("]", "") == theirs


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (without(JAX, "JAX_PROCESS_ID"), "not set: the number of this process; set JAX_COORD"),
        (without(JAX, "JAX_COORDINATOR_ADDRESS"), "not set: the address of process 0; set JAX_"),
        ({**JAX, "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' is not a number"),
        ({**JAX, "JAX_PROCESS_ID": "2"}, "process 2 of 2: numbers are 0 to 1"),
        (
            without(SLURM, "SLURM_STEP_NODELIST", "SLURM_PROCID"),
            "Slurm: not set: the number of this process (SLURM_PROCID), the address of process 0; "
            "start the command with srun",
        ),
        (
            without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"),
            "Open MPI: not set: the address of process 0; Open MPI 5 does not",
        ),
        (
            without(JOBSET, "NNODES"),
            "Kubernetes: not set: the number of processes (NNODES); the pod needs",
        ),
        (without(TPU, "TPU_WORKER_ID"), "TPU_WORKER_HOSTNAMES is set, and TPU_WORKER_ID is None"),
    ],
)
def test_half_set_variables_are_one_line(environment, message):
    with pytest.raises(UserError) as raised:
        hosts.find_job(JobFlags(), environment)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_flags_of_a_job_ask_for_it():
    config = f"--config={cases.ROOT}/configs/stage1.py"
    options = arguments.parse([config, "--num_processes=2", "--process_id", "1"])
    assert options.distributed
    assert options.job == JobFlags("", 2, 1)
    assert not arguments.parse([config]).distributed


def test_job_is_joined_with_the_heartbeat_timeout_of_the_config(monkeypatch):
    calls = []
    monkeypatch.setattr(
        distributed.jax.distributed, "initialize", lambda *a, **k: calls.append((a, k))
    )
    for name in ("SLURM_JOB_ID", "JOBSET_NAME", "OMPI_COMM_WORLD_SIZE", *JAX):
        monkeypatch.delenv(name, raising=False)
    distributed.join_job(JobFlags("h:7", 2, 1), 17)
    ((positional, named),) = calls
    assert positional == ("h:7", 2, 1)
    assert named["heartbeat_timeout_seconds"] == 17
    assert named["cluster_detection_method"] == "deactivate"

    distributed.join_job(JobFlags(), 17)
    assert calls[1] == ((), {"heartbeat_timeout_seconds": 17})


def test_no_job_is_one_line(tmp_path, capsys, monkeypatch):
    for name in (*SLURM, *OPEN_MPI, *JOBSET, *JAX, *TPU):
        monkeypatch.delenv(name, raising=False)

    def find_nothing(**named):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", find_nothing)
    line = fails([*command(tmp_path / "run"), "--distributed"], capsys, monkeypatch)
    assert "--distributed: no TPU slice, Slurm, Open MPI or Kubernetes job found" in line
    assert not (tmp_path / "run").exists()


def test_hosts_need_no_jax():
    """`--help` and mistakes in variables come before the seconds of its import."""
    program = "import sys; import wings_jax.hosts; assert 'jax' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(cases.ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
