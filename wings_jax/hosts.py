"""Which job a process belongs to: address of process 0, number of processes, its own number.

A pure function of the command line and the environment. In this order, each value from the first
that has it: flags, JAX's variables, the variables of a scheduler (Open MPI, Slurm, Kubernetes).
On TPUs JAX reads the metadata of the machine, or what GKE sets, by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping

from wings_jax.errors import UserError

Environment = Mapping[str, str]

# Where no scheduler gives a number from which a port can be made.
_PORT = 55527
# With a job's number: one of the last 4096 ports, as JAX does, so that jobs do not collide.
_FIRST_PORT, _PORTS = 61440, 4096

ADVICE = (
    "set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, "
    "or give --coordinator_address, --num_processes and --process_id"
)


@dataclasses.dataclass(frozen=True)
class JobFlags:
    """What the command line gives of a job; '' and None are left to the environment.

    coordinator_address  host:port of process 0
    num_processes        of the job
    process_id           of this process, from 0
    """

    coordinator_address: str = ""
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class DistributedJob:
    """What `jax.distributed.initialize` needs.

    coordinator_address  host:port of process 0
    num_processes        of the job
    process_id           of this process, from 0
    local_device_ids     GPUs of this process where a machine runs several; None for all
    source               what the values are from, for the log
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None
    source: str


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """The environment variables of a scheduler; of several names the first that is set counts.

    name          for messages
    signs         any of them shows that this scheduler started the process
    address       returns host:port of process 0, '' where the variables do not have it
    count         number of processes
    number        of this process
    local_number  of this process among those of its machine
    machines      number of machines
    advice        what to do where one is missing
    """

    name: str
    signs: tuple[str, ...]
    address: Callable[[Environment], str]
    count: tuple[str, ...]
    number: tuple[str, ...]
    local_number: tuple[str, ...]
    machines: tuple[str, ...]
    advice: str


def open_mpi_address(environment: Environment) -> str:
    """Returns where the launcher of Open MPI 4 runs, which is the machine of process 0.

    >>> open_mpi_address({"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.8.0.1:34911"})
    '10.96.0.1:62624'
    """
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.match(r"(\d+).*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    if match is None:
        return ""

    # Numbers of jobs are multiples of 4096.
    host = match[2] or f"[{match[3]}]"
    return with_port(host, environment, job=int(match[1]) // _PORTS)


def slurm_address(environment: Environment) -> str:
    """Returns the first machine of the job step.

    >>> slurm_address({"SLURM_STEP_NODELIST": "node[001-003,7],gpu1", "SLURM_JOB_ID": "5000"})
    'node001:62344'
    """
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^\[,]*))?", nodes)
    job = environment.get("SLURM_JOB_ID", "")
    if match is None or not job.isdecimal():
        return ""
    return with_port("".join(part or "" for part in match.groups()), environment, job=int(job))


def jobset_address(environment: Environment) -> str:
    """Returns the name of the first pod of a JobSet.

    >>> jobset_address({"JOBSET_NAME": "wings", "REPLICATED_JOB_NAME": "slice-job"})
    'wings-slice-job-0-0.wings:55527'
    """
    name, replicated = (environment.get(key) for key in ("JOBSET_NAME", "REPLICATED_JOB_NAME"))
    if not name or not replicated:
        return ""
    return with_port(f"{name}-{replicated}-0-0.{name}", environment)


def with_port(address: str, environment: Environment, job: int | None = None) -> str:
    """Returns `address` with a port: its own, JAX_COORDINATOR_PORT, or one for the job's number."""
    if re.search(r"[^:]:\d+$", address) or not address:
        return address
    usual = _PORT if job is None else _FIRST_PORT + job % _PORTS
    return f"{address}:{environment.get('JAX_COORDINATOR_PORT') or usual}"


SCHEDULERS: tuple[Scheduler, ...] = (
    Scheduler(
        "Open MPI",
        signs=("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri"),
        address=open_mpi_address,
        count=("OMPI_COMM_WORLD_SIZE",),
        number=("OMPI_COMM_WORLD_RANK",),
        local_number=("OMPI_COMM_WORLD_LOCAL_RANK",),
        machines=(),
        advice="Open MPI 5 does not tell where process 0 runs: "
        "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT with the first host",
    ),
    Scheduler(
        "Slurm",
        signs=("SLURM_JOB_ID",),
        address=slurm_address,
        count=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        number=("SLURM_PROCID",),
        local_number=("SLURM_LOCALID",),
        machines=("SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
        advice="start the command with srun, which sets it for each task",
    ),
    Scheduler(
        "Kubernetes",
        signs=("JOBSET_NAME", "JOB_COMPLETION_INDEX"),
        address=jobset_address,
        count=("NNODES", "JAX_PROCESS_COUNT"),
        number=("NODE_RANK", "JOB_COMPLETION_INDEX"),
        local_number=(),
        machines=(),
        advice="the pod needs JOBSET_NAME and REPLICATED_JOB_NAME (or JAX_COORDINATOR_ADDRESS), "
        "NNODES and JOB_COMPLETION_INDEX",
    ),
)
# What GKE sets on a TPU host: JAX reads it.
_TPU_HOSTS, _TPU_NUMBER = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"), "TPU_WORKER_ID"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a job, which have the names that they have in training."""
    group = parser.add_argument_group("a model over several hosts, the same command on each")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of a TPU slice, Slurm, Open MPI or Kubernetes job, or of "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )
    group.add_argument("--coordinator_address", default="", metavar="HOST:PORT")
    group.add_argument("--num_processes", type=int, metavar="N")
    group.add_argument("--process_id", type=int, metavar="K")


def read_flags(flags: argparse.Namespace) -> JobFlags | None:
    """Returns what the flags of `add_flags` give of a job; None where none is asked for."""
    job = JobFlags(flags.coordinator_address, flags.num_processes, flags.process_id)
    return job if flags.distributed or job != JobFlags() else None


def find_job(flags: JobFlags, environment: Environment) -> DistributedJob | None:
    """Returns the job of this process; None where JAX has to find it (TPUs, or nothing is set).

    Raises:
      UserError: a value is missing while others are set, is not a number, or is out of range.
    """
    scheduler = find_scheduler(environment)
    address = flags.coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS", "")
    count = _first(flags.num_processes, ("JAX_NUM_PROCESSES",), environment)
    number = _first(flags.process_id, ("JAX_PROCESS_ID",), environment)

    # What is given explicitly has precedence; without any of it JAX knows TPUs by itself.
    given = bool(address) or count is not None or number is not None
    if not given and (scheduler is None or _is_left_to_jax(scheduler, environment)):
        check_tpu(environment)
        return None

    source = "flags and JAX_* variables" if given else ""
    if scheduler is not None:
        address = address or scheduler.address(environment)
        count = _first(count, scheduler.count, environment)
        number = _first(number, scheduler.number, environment)
        source = " and ".join(part for part in (source, scheduler.name) if part)

    address = with_port(address, environment)
    if not address or count is None or number is None:
        raise UserError(_missing(address, count, number, scheduler))
    if not 0 <= number < count:
        raise UserError(f"--distributed: process {number} of {count}: numbers are 0 to {count - 1}")
    return DistributedJob(address, count, number, local_gpus(scheduler, count, environment), source)


def find_scheduler(environment: Environment) -> Scheduler | None:
    """Returns the scheduler that started this process; Kubernetes not on its TPU hosts."""
    for scheduler in SCHEDULERS:
        if any(environment.get(sign) for sign in scheduler.signs):
            is_tpu = any(environment.get(name) for name in _TPU_HOSTS)
            return None if scheduler.name == "Kubernetes" and is_tpu else scheduler
    return None


def _is_left_to_jax(scheduler: Scheduler, environment: Environment) -> bool:
    """Returns whether a pod has no variables of its job: JAX then asks the API of Kubernetes."""
    names = (*scheduler.count, "JOBSET_NAME")
    return scheduler.name == "Kubernetes" and not any(environment.get(name) for name in names)


def check_tpu(environment: Environment) -> None:
    """Raises UserError if a TPU host has the names of the hosts but not its own number."""
    hosts = next((name for name in _TPU_HOSTS if environment.get(name)), "")
    if hosts and not environment.get(_TPU_NUMBER, "").isdecimal():
        raise UserError(
            f"--distributed: {hosts} is set, and {_TPU_NUMBER} is "
            f"{environment.get(_TPU_NUMBER)!r} instead of this host's number"
        )


def local_gpus(
    scheduler: Scheduler | None, count: int, environment: Environment
) -> tuple[int, ...] | None:
    """Returns the GPU of a process that shares its machine with others; None for all GPUs.

    It is the one with its local number, unless the scheduler shows it a single GPU anyway.
    """
    # JAX reads the variable itself.
    if scheduler is None or environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None

    local = _first(None, scheduler.local_number, environment)
    machines = _first(None, scheduler.machines, environment)
    local_count = _first(None, ("OMPI_COMM_WORLD_LOCAL_SIZE",), environment)
    if machines:
        local_count = -(-count // machines)

    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    is_bound = bool(visible) and "," not in visible
    return None if local is None or local_count in (None, 1) or is_bound else (local,)


def _first(given: int | None, names: tuple[str, ...], environment: Environment) -> int | None:
    """Returns the given number, or that of the first variable that is set."""
    name = next((name for name in names if environment.get(name)), "")
    if given is not None or not name:
        return given
    if not environment[name].isdecimal():
        raise UserError(f"--distributed: {name}={environment[name]!r} is not a number")
    return int(environment[name])


def _missing(
    address: str, count: int | None, number: int | None, scheduler: Scheduler | None
) -> str:
    """Returns the line that names what is not set."""
    values = {
        "the address of process 0": address or None,
        "the number of processes": count,
        "the number of this process": number,
    }
    missing = ", ".join(name for name, value in values.items() if value is None)
    if scheduler is None:
        return f"--distributed: not set: {missing}; {ADVICE}"

    # The names of the scheduler's variables, as far as there are any.
    variables = {"the number of processes": scheduler.count[0]}
    variables["the number of this process"] = scheduler.number[-1]
    named = [f"{name} ({variables[name]})" for name in variables if values[name] is None]
    named += [] if address else ["the address of process 0"]
    return f"--distributed: {scheduler.name}: not set: {', '.join(named)}; {scheduler.advice}"
