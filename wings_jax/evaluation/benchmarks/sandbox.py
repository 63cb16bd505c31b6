"""Runs generated Python with its tests in a process of its own, which can do little else.

The process has limits of time, memory, CPU, open files and processes, an empty directory, no
environment, and a hook that refuses sockets, other processes and every change of files
(`sandbox_child`). Where the system allows it has no network at all and a process table of its own
(Linux namespaces, by `unshare`), so that nothing it started can outlive it. This holds against
mistakes of a model, not against an attacker: do not run code that somebody wrote to break out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")
SECONDS = 10  # OpenCompass' limit
MEMORY = 1 << 30  # bytes of address space
PROBE_SECONDS = 10
# Ways to have no network and a process table of one's own: as root, and as any other user.
NAMESPACES = (
    ("--net", "--pid", "--fork", "--kill-child"),
    ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"),
)


@dataclasses.dataclass(frozen=True)
class CodeOutcome:
    """The outcome of a program."""

    # Whether every test passed.
    passed: bool
    # "" if it passed, else one line: "timeout", "memory", "process", "file", "network", "wrong"
    # (a test failed), "syntax", "error" (an exception), "exit" or "crash", and the details.
    reason: str


def run_tests(
    code: str,
    tests: Sequence[str],
    setup: str = "",
    *,
    seconds: int = SECONDS,
    memory: int = MEMORY,
) -> CodeOutcome:
    """Returns whether code passes tests, which are statements that raise if it does not.

    Args:
      setup: what the tests need besides; runs after the code.
      seconds: limit of the time on the clock.
      memory: limit of the address space in bytes.

    >>> run_tests("def double(x): return 2 * x", ["assert double(2) == 4"]).passed
    True
    """
    token = secrets.token_hex(16)  # code that ends early cannot claim that it passed
    program = {
        "token": token,
        "setup": setup,
        "code": code,
        "tests": list(tests),
        "limits": {"seconds": seconds, "memory": memory},
    }

    # -I: without the user's environment and packages; -B: without bytecode files.
    command = [*namespace_command(), sys.executable, "-I", "-B", str(CHILD)]
    with tempfile.TemporaryDirectory(prefix="sandbox-") as directory:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(_encode(program), timeout=seconds)
        except subprocess.TimeoutExpired:
            return CodeOutcome(False, f"timeout: still running after {seconds} s")
        finally:
            # In every case, as the code may have started processes.
            _kill_group(process)

    return _read_outcome(output, token, process.returncode)


def _encode(program: dict) -> bytes:
    return json.dumps(program).encode("utf-8", "surrogatepass")


def _kill_group(process: subprocess.Popen) -> None:
    """Ends a process and what it started, and closes its pipes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()


def _read_outcome(output: bytes, token: str, status: int) -> CodeOutcome:
    """Returns the outcome that the child wrote, or what its exit status means."""
    # The token marks the child's own line: the code that it runs does not get it.
    try:
        result = json.loads(output.splitlines()[-1])
        is_own = result["token"] == token
    except (IndexError, ValueError, KeyError, TypeError):
        is_own = False

    if is_own:
        return CodeOutcome(not result["reason"], result["reason"])

    # A signal is a negative status, or 128 plus its number where another process reports it.
    number = -status if status < 0 else status - 128
    if number == signal.SIGXCPU or number == signal.SIGKILL:
        return CodeOutcome(False, "timeout: out of CPU time")
    if number > 0:
        return CodeOutcome(False, f"crash: signal {number}")
    return CodeOutcome(False, "exit: ended before the tests were done")


@functools.cache
def namespace_command() -> tuple[str, ...]:
    """Returns the command that starts others without a network, () where there is none."""
    program = shutil.which("unshare")
    if not program:
        return ()

    # A kernel or a container may forbid namespaces, so that each way is tried.
    for flags in NAMESPACES:
        command = (program, *flags)

        try:
            subprocess.run(
                [*command, sys.executable, "-I", "-S", "-c", ""],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=PROBE_SECONDS,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return command
    return ()
