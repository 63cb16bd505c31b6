"""Workdirs, checkpoints and outputs in a bucket (gs://), against an emulator on this machine."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pyarrow
import pytest
import tiny_data
import training_cases as cases
from gcs_server import serve_bucket
from pyarrow import parquet
from test_train_mistakes import command

from wings_jax import checkpoint_steps, files
from wings_jax.errors import UserError
from wings_jax.training import metrics

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
    """The newest step is lost after the run; the same command goes on from the one before.

    The data and their images are in the bucket too.
    """
    data = "gs://bucket/data"
    changes = {
        "steps": str(STEPS),
        "checkpoint_every": "2",
        "batch_size": "4",
        "data__sources__scenes__path": f"{data}/train_stage1.json",
        "data__sources__scenes__images": f"{data}/images",
    }
    with serve_bucket("bucket") as environment:
        uploaded = execute(environment, UPLOAD, cases.folder() / "scenes")
        assert uploaded.returncode == 0, uploaded.stderr
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
    done = execute(environment, READ, workdir, lose)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def local_bucket(tmp_path, monkeypatch) -> pathlib.Path:
    """The directory that gs://bucket is, without a server."""

    def as_path(path, flag: str = "") -> pathlib.Path:
        return tmp_path / str(path).removeprefix("gs://bucket/")

    monkeypatch.setattr(files, "as_path", as_path)
    return tmp_path


def test_metrics_are_in_the_bucket_before_a_checkpoint(local_bucket):
    """A killed run would else resume after steps that have no line."""
    writer = metrics.MetricsWriter("gs://bucket/run", start=0)
    (local_bucket / "run/tensorboard").mkdir(parents=True)
    writer.write(1, {"loss": 0.5})
    lines = local_bucket / "run/metrics.jsonl"
    assert not lines.exists()
    writer.sync()
    assert json.loads(lines.read_text()) == {"step": 1, "loss": 0.5}
    writer.close()


def test_unfinished_saves_in_a_bucket_are_no_steps(local_bucket):
    """A save in a bucket has its name from the start, and its last file at the end."""
    for step in ("2", "4"):
        (local_bucket / "run/checkpoints" / step / "params").mkdir(parents=True)
    (local_bucket / "run/checkpoints/2" / checkpoint_steps.COMMITTED).touch()
    steps = checkpoint_steps.list_steps("gs://bucket/run")
    assert [step.name for step in steps] == ["2"]


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


# Opens data in the bucket and prints its samples and the bytes of their images.
OPEN = """
import json, sys
from wings_jax.data import images, settings, sources
from wings_jax.training import workdirs
for path in sys.argv[2:]:
    source = sources.open_source(path, images=sys.argv[1])
    kept = [source[index] for index in range(len(source))]
    print(json.dumps([[s.id, list(s.conversations), [len(images.image_bytes(i)) for i in s.images]]
                      for s in kept]))
    data = settings.DataConfig(sources={"a": settings.SourceConfig(path)})
    digest = workdirs.fingerprint_data(data)["a"]["digest"]
    assert digest
    print(source.fingerprint, digest, file=sys.stderr)
"""

# Copies a local directory into the bucket.
UPLOAD = """
import pathlib, sys
from wings_jax import files
root = pathlib.Path(sys.argv[1])
for path in root.rglob("*"):
    if path.is_file():
        files.upload(path, f"gs://bucket/data/{path.relative_to(root)}")
"""


@pytest.mark.slow
def test_data_and_images_in_a_bucket_equal_local_ones(tmp_path):
    """A JSON file, a table and prepared shards, written to the bucket and read from there."""
    records = tiny_data.write_records(tmp_path, 9)
    tiny_data.write_json(tmp_path / "x.json", records)
    rows = [{**record, "image": record.get("image", [])} for record in records]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")

    with serve_bucket("bucket") as environment:
        uploaded = execute(environment, UPLOAD, tmp_path)
        assert uploaded.returncode == 0, uploaded.stderr

        prepare = ("wings_jax.data.prepare", "gs://bucket/data/x.json", "--shards", "2")
        written = run(environment, *prepare, "--out", "gs://bucket/out")
        assert written.returncode == 0, written.stderr
        again = run(environment, *prepare, "--out", "gs://bucket/out")
        assert "--out gs://bucket/out exists" in again.stderr
        verified = run(environment, "wings_jax.data.prepare", "--verify", "gs://bucket/out")
        assert "9 samples in 2 shards are as they were written" in verified.stdout, verified.stderr

        paths = [f"gs://bucket/{name}" for name in ("data/x.json", "data/x.parquet", "out")]
        opened = execute(environment, OPEN, "gs://bucket/data", *paths)
        assert opened.returncode == 0, opened.stderr
        twice = execute(environment, OPEN, "gs://bucket/data", *paths)
        assert twice.stderr == opened.stderr  # the fingerprints, which caches depend on
        missing = execute(environment, OPEN, "gs://bucket/data", "gs://bucket/data/no.json")

    local = execute(environment, OPEN, tmp_path, tmp_path / "x.json")
    assert [json.loads(line) for line in opened.stdout.splitlines()] == [
        json.loads(local.stdout.splitlines()[-1])
    ] * 3
    assert "data file gs://bucket/data/no.json does not exist" in missing.stderr
    # The digest of the content is that of the local file.
    assert opened.stderr.splitlines()[0].split()[-1] == local.stderr.split()[-1]


def execute(environment, program: str, *arguments) -> subprocess.CompletedProcess:
    """Runs a program text in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=cases.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
