"""Workdirs, checkpoints and outputs in a bucket (gs://), against an emulator on this machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import training_cases as cases
from gcs_server import serve_bucket
from test_train_mistakes import command

from wings_jax import files
from wings_jax.errors import UserError

STEPS = 4


def run(environment, *arguments) -> subprocess.CompletedProcess:
    """Runs a command of the package in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cases.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


# In a process of its own: gcsfs keeps threads and connections. LOSE is a step that is removed.
READ = """
import json, sys
from wings_jax import files
workdir, lose = files.as_path(sys.argv[1]), sys.argv[2]
names = sorted(path.name for path in workdir.iterdir())
lines = (workdir / "metrics.jsonl").read_text().splitlines()
if lose:
    (workdir / "checkpoints" / lose).rmtree()
print(json.dumps({"names": names, "losses": [json.loads(line)["loss"] for line in lines]}))
"""


@pytest.mark.slow
def test_run_in_a_bucket_resumes_bitwise(tmp_path):
    """The newest step is lost after the run; the same command goes on from the one before."""
    changes = {"steps": str(STEPS), "checkpoint_every": "2", "batch_size": "4"}
    with serve_bucket("bucket") as environment:
        workdir = "gs://bucket/runs/one"
        arguments = [*command(tmp_path, **changes)[:-1], f"--workdir={workdir}"]
        first = run(environment, "wings_jax.train", *arguments)
        assert first.returncode == 0, first.stderr
        before = read(environment, workdir, str(STEPS))
        written = {"config.json", "data.json", "metrics.jsonl", "summary.json"}
        assert set(before["names"]) >= {*written, "checkpoints", "tensorboard"}
        assert len(before["losses"]) == STEPS

        again = run(environment, "wings_jax.train", *arguments)
        assert again.returncode == 0, again.stderr
        assert "resuming from step 2" in again.stdout
        assert read(environment, workdir, "")["losses"] == before["losses"]

        answer = ("--checkpoint", workdir, "--prompt", "What?", "--max-new-tokens", "2")
        answered = run(environment, "wings_jax.generate", *answer)
        assert answered.returncode == 0, answered.stderr


def read(environment, workdir: str, lose: str) -> dict:
    """Returns the names and losses of a workdir, and removes a step."""
    done = subprocess.run(
        [sys.executable, "-c", READ, workdir, lose],
        cwd=cases.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_buckets_that_do_not_exist_are_named(tmp_path):
    with serve_bucket("bucket") as environment:
        arguments = [*command(tmp_path)[:-1], "--workdir=gs://missing/run"]
        done = run(environment, "wings_jax.train", *arguments)
    message = "--workdir: the bucket gs://missing does not exist, or it may not be read"
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"python -m wings_jax.train: {message}"


def test_urls_of_another_kind_are_refused():
    with pytest.raises(UserError, match="--workdir: s3://b/run: only local paths and gs:// are"):
        files.check_bucket("s3://b/run", "--workdir")
