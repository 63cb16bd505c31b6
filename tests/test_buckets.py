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
        timeout=600,
    )


@pytest.mark.slow
def test_run_in_a_bucket_resumes_bitwise(tmp_path):
    """The newest step is lost after the run; the same command goes on from the one before."""
    changes = {"steps": str(STEPS), "checkpoint_every": "2", "batch_size": "4"}
    with serve_bucket("bucket") as environment:
        bucket = remote_files(environment)
        workdir = "gs://bucket/runs/one"
        arguments = [*command(tmp_path, **changes)[:-1], f"--workdir={workdir}"]
        first = run(environment, "wings_jax.train", *arguments)
        assert first.returncode == 0, first.stderr

        names = {path.split("/")[3] for path in bucket.find("bucket/runs/one")}
        written = {"config.json", "data.json", "metrics.jsonl", "summary.json"}
        assert names >= {*written, "checkpoints", "tensorboard"}
        expected = losses(bucket)
        assert len(expected) == STEPS

        bucket.rm(f"bucket/runs/one/checkpoints/{STEPS}", recursive=True)
        again = run(environment, "wings_jax.train", *arguments)
        assert again.returncode == 0, again.stderr
        assert "resuming from step 2" in again.stdout
        assert losses(bucket) == expected

        answer = ("--checkpoint", workdir, "--prompt", "What?", "--max-new-tokens", "2")
        answered = run(environment, "wings_jax.generate", *answer)
        assert answered.returncode == 0, answered.stderr


def remote_files(environment):
    """Returns the emulator's bucket as a file system."""
    import gcsfs

    return gcsfs.GCSFileSystem(
        endpoint_url=environment["STORAGE_EMULATOR_HOST"], token="anon", use_listings_cache=False
    )


def losses(bucket) -> list[float]:
    """Returns the loss of every step, as written in the bucket."""
    lines = bucket.cat("bucket/runs/one/metrics.jsonl").decode().splitlines()
    return [json.loads(line)["loss"] for line in lines]


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
