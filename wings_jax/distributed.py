"""Several processes as one job: joining it, and what its processes have to agree on.

All processes of a job run the same programs in the same order on the same requests, each on its
part of the arrays. So they have to agree on everything that decides what is computed: what one of
them alone knows, it shares (`share`, `together`), and what is on the devices of several, all of
them fetch together (`fetch`). In a job of one process, these do nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from wings_jax import hosts
from wings_jax.errors import LostHostError, UserError

MESH = "fsdp=-1"  # of a job whose command gives none: all devices share the parameters
HOST_TIMEOUT = 100  # seconds without a heartbeat, of commands that have no setting for it


def join_job(flags: hosts.JobFlags, timeout: int = HOST_TIMEOUT) -> None:
    """Makes this process one of the job's; before any code requests the devices of JAX.

    Args:
      flags: what the command line gives of the job; the rest is from the environment.
      timeout: seconds without a heartbeat of another process after which this one ends.

    Raises:
      UserError: the environment has no job, or a part of one.
    """
    job = hosts.find_job(flags, os.environ)

    # JAX knows TPU slices, and pods whose service account may ask the API of Kubernetes.
    if job is None:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=timeout)
        except ValueError as error:
            raise UserError(
                f"--distributed: no TPU slice, Slurm, Open MPI or Kubernetes job found ({error}); "
                f"{hosts.ADVICE}"
            ) from error
        _print_host()
        return

    # If the address is wrong, JAX ends the process after 5 minutes without naming it.
    name = f"host {job.process_id} of {job.num_processes}"
    _print(f"{name} joins {job.coordinator_address} ({job.source})")
    jax.distributed.initialize(
        job.coordinator_address,
        job.num_processes,
        job.process_id,
        local_device_ids=job.local_device_ids,
        cluster_detection_method="deactivate",  # else one task of a node would get one GPU
        heartbeat_timeout_seconds=timeout,
    )
    _print_host()


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_host() -> None:
    """Prints which machine a process number is, because JAX's messages have numbers only."""
    _print(
        f"host {jax.process_index()} of {jax.process_count()} is {socket.gethostname()}, process "
        f"{os.getpid()}, {jax.local_device_count()} of {jax.device_count()} devices"
    )


@contextlib.contextmanager
def lost_hosts(timeout: int = HOST_TIMEOUT, setting: str = "") -> Iterator[None]:
    """Turns the failure of a collective into one line; JAX's own one then names the process.

    Args:
      timeout: that of `join_job`.
      setting: the name of the setting that it comes from.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # Calling a step raises a ValueError that begins with XLA's status, its result the other.
        is_status = re.match("(UNKNOWN|UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED): ", str(error))
        if isinstance(error, ValueError) and not is_status:
            raise
        # An exhausted memory has its own message, and a single process has no other host.
        if is_alone() or "RESOURCE_EXHAUSTED" in str(error):
            raise

        reason = str(error).splitlines()[0][:200]
        named = f" ({setting})" if setting else ""
        raise LostHostError(
            f"host {jax.process_index()} of {jax.process_count()}: another host ended or cannot be "
            f"reached ({reason}); JAX names it within {timeout} s{named}. Start the same command "
            "on all hosts to resume"
        ) from error


def is_alone() -> bool:
    """Returns whether this process is the whole job; it does not create JAX's backends."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_first() -> bool:
    """Returns whether this process prints, writes and reads standard input."""
    return is_alone() or jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Returns the value of every process, which is what JSON can hold; all call it together."""
    if is_alone():
        return [value]

    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(content.size))
    rows = multihost_utils.process_allgather(_pad(content, int(sizes.max())))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def share(value: Any) -> Any:
    """Returns the value of the first process, as `gather`."""
    if is_alone():
        return value

    # Bytes that the other processes have in it are ignored.
    content = np.frombuffer(json.dumps(value if is_first() else None).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    padded = _pad(content[:size], size)
    return json.loads(multihost_utils.broadcast_one_to_all(padded)[:size].tobytes())


def _pad(content: np.ndarray, size: int) -> np.ndarray:
    """Returns u8[n]: the content, filled up to one of few sizes, as each one is compiled."""
    padded = np.zeros(1 << (size - 1).bit_length(), np.uint8)
    padded[: content.size] = content
    return padded


def check_same(value: Any, what: str) -> None:
    """Raises UserError if a process has another value, which is what JSON can hold."""
    if is_alone():
        return
    digests = gather(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())
    other = next((number for number, digest in enumerate(digests) if digest != digests[0]), 0)
    if other:
        raise UserError(f"--distributed: host {other} has other {what} than host 0")


def check_flags(flags: argparse.Namespace) -> None:
    """Raises UserError if a process has other flags, apart from those that name the job."""
    # Addresses of one host may be written in several ways, and its number is each host's own.
    of_job = {"distributed", *(field.name for field in dataclasses.fields(hosts.JobFlags))}
    own = {name: str(value) for name, value in vars(flags).items() if name not in of_job}

    first, *others = gather(own)
    for number, other in enumerate(others, 1):
        for name in first:
            if other[name] != first[name]:
                raise UserError(
                    f"--distributed: host {number} has other flags than host 0: "
                    f"{name} is {other[name]!r}, not {first[name]!r}"
                )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises in every process the UserError that one of them raises in the block."""
    if is_alone():
        yield
        return

    own = None
    try:
        yield
    except UserError as error:
        own = error
    messages = gather(str(own or ""))
    if own:
        raise own
    for number, message in enumerate(messages):
        if message:
            raise UserError(f"host {number}: {message}")


@contextlib.contextmanager
def first_writes() -> Iterator[Callable[[pathlib.Path], pathlib.Path]]:
    """Leaves the terminal to the first process; yields what returns where to write a path.

    On the other processes that is a directory of their own, which is deleted at the end; an error
    is printed after it.
    """
    if is_first():
        yield lambda path: path
        return

    with (
        tempfile.TemporaryDirectory(prefix="wings-") as directory,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        # The name of `..` is that of the directory it stands for.
        yield lambda path: pathlib.Path(directory) / path.resolve().name


def fetch(arrays: Any) -> Any:
    """Returns a tree of arrays as numpy arrays, whole on every process; all call it together."""

    def fetch_array(array: Any) -> np.ndarray:
        is_whole = not isinstance(array, jax.Array) or array.is_fully_addressable
        if is_whole or array.is_fully_replicated:
            return jax.device_get(array)
        return multihost_utils.process_allgather(array, tiled=True)

    # One transfer for all of them, where this process has all parts.
    return jax.device_get(arrays) if is_alone() else jax.tree.map(fetch_array, arrays)
