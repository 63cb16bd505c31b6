"""A disk that takes no more: the command ends with one line, and it ends.

A limit on the size of files is the full disk of these tests; it needs no privileges.
"""

from __future__ import annotations

import pathlib
import resource
import subprocess
import sys
import tarfile

import pytest
import training_cases as cases

ARCHIVE = pathlib.Path(__file__).with_name("old_checkpoint.tar.xz")
LIMIT = 12_000  # bytes; enough for the tokenizer, too small for a checkpoint or many metrics


def train(directory: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
    """Trains the small model of `old_checkpoint.tar.xz` in a process that has the limit."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    no_cache = {"PYTHONPATH": str(cases.ROOT), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    program = [sys.executable, "-m", "wings_jax.train"]
    fixed = ["--config=run/config.json", "--config.init_from=run", "--workdir=new"]
    return subprocess.run(
        [*program, *fixed, *flags],
        cwd=directory,
        env=cases.one_device(**no_cache),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT)),
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "/new/checkpoints: cannot be written: [Errno 27] File too large"),
        (
            ["--config.steps=60", "--config.checkpoint_every=60"],
            "new: metrics cannot be written: File too large",
        ),
    ],
    ids=["checkpoint", "metrics"],
)
def test_full_disk_ends_the_process_with_one_line(flags, message, tmp_path):
    done = train(tmp_path, *flags)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING:")]
    assert len(errors) == 1, done.stderr
    line = errors[0]
    assert line.startswith("python -m wings_jax.train: --workdir: ")
    assert line.endswith(message)
