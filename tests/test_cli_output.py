"""What every command prints beside its output: warnings in one form, nothing for a closed pipe."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from wings_jax import cli

WARNING = "import logging; logging.warning('sample %s is skipped: %s', 's1', 'no image')"


def run_program(body: str, **options) -> subprocess.Popen:
    """Starts a program whose `main` has this body, as an entry point runs it."""
    script = f"from wings_jax import cli\ndef main():\n    {body}\ncli.run_main('wings x', main)"
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_closed_pipe_ends_a_command_quietly():
    """As `wings ... | head`: while printing, and where all output is still in the buffer."""
    for body in (
        "[print(number) for number in range(10**6)]",
        "import time; print('x'); time.sleep(0.5)",
    ):
        process = run_program(body)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == cli.PIPE_CLOSED
        assert errors == ""


def test_other_pipes_that_break_are_errors():
    process = run_program("raise BrokenPipeError('a worker ended')")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "a worker ended" in errors


def test_warnings_have_the_form_of_errors():
    process = run_program(WARNING)
    _, errors = process.communicate()
    assert process.returncode == 0
    assert errors == "wings x: sample s1 is skipped: no image\n"


TEMPORARY = """
import resource, jax, jax.numpy as jnp
from wings_jax import process
process.run_in_caller_thread()
process.keep_freed_memory()

# A temporary array of 64 MiB, by rows.
rows = lambda x: jax.lax.scan(lambda carry, _: (carry + 1, x * carry), 0.0, length=4096)[1]
run = jax.jit(lambda x: rows(x).sum())
faults = []
for _ in range(4):
    jax.block_until_ready(run(jnp.ones(4096)))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[3] - faults[2])
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has mallopt")
def test_memory_of_a_cpu_program_is_reused_by_its_next_call():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    faults = subprocess.check_output([sys.executable, "-c", TEMPORARY], text=True, env=environment)
    assert int(faults) < 2**26 // 4096 // 10
