"""Kills training runs at random moments, resumes them, and compares them with one left alone.

    python benchmarks/survival.py [--mode one|two|bucket] [--kills 30] [--seed 0] [--out FILE.json]

    one      one process, workdir on the disk
    two      two processes on this machine that form one job; one or both of them are killed
    bucket   one process, workdir in an emulated bucket (needs gcsfs and gcp-storage-emulator)

Each trial is a run of 12 steps of the tiny model with a checkpoint every 3 steps. It gets SIGKILL
at a random time within its moment, and the same command is given again:

    data      from the start of the process to the first line of the run
    compile   from there to the first step; the compilation cache is empty
    step      at a random step
    save      within a second after a save has begun
    resume    at a random step, and once more at a random time of the next start

A trial passes if the resumed run ends with status 0, loss, accuracy and gradient norm of every step
are bitwise those of the run that was left alone, and so are the checksums of the last checkpoint.
Printed is a table; the exit status is 1 if a trial fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import socketserver
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from survival_job import ROOT, Bucket, Disk, Job, Workdir

MOMENTS = ("data", "compile", "step", "save", "resume")
STEPS, SAVE_EVERY = 12, 3
SAVE_SECONDS = 1.0
COMPARED = ("loss", "accuracy", "grad_norm")
# Seconds after which the other process of a job notices that one is gone.
HOST_TIMEOUT = 10


def main() -> None:
    """Prints the table of one mode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=("one", "two", "bucket"), default="one")
    parser.add_argument("--kills", type=int, default=30, help="trials, default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--moments", default=",".join(MOMENTS), help="default %(default)s")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE.json")
    parser.add_argument(
        "--keep", type=pathlib.Path, metavar="DIR", help="keep failed workdirs here"
    )
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="wings-survival-") as directory:
        rows = run_trials(arguments, pathlib.Path(directory))

    print(format_table(rows))
    passed = sum(row["passed"] for row in rows)
    print(f"\n{passed} of {len(rows)} trials passed (mode {arguments.mode}, seed {arguments.seed})")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(passed < len(rows))


def run_trials(arguments: argparse.Namespace, root: pathlib.Path) -> list[dict[str, Any]]:
    """Returns one row per trial."""
    from wings_jax.scenes import dataset

    scenes = dataset.write_scenes(
        root / "scenes", dataset.SceneSettings(pictures=64, turns=2, replay=8, test_each=4)
    )
    with open_mode(arguments.mode, root) as (environment, make_workdir):
        trials = Trials(
            command=train_command(scenes),
            processes=2 if arguments.mode == "two" else 1,
            environment=environment,
            cache=root / "compiled",
        )
        trials.run_reference(make_workdir("alone"))

        rng = random.Random(arguments.seed)
        moments = arguments.moments.split(",")
        rows = []
        for number in range(arguments.kills):
            workdir = make_workdir(f"trial{number}")
            row = {"trial": number} | trials.run(moments[number % len(moments)], workdir, rng)
            rows.append(row)
            print(f"{len(rows)}/{arguments.kills} {describe(row)}", file=sys.stderr, flush=True)

            if not row["passed"] and arguments.keep:
                workdir.copy(arguments.keep / f"trial{number}")
            workdir.remove()
    return rows


@contextlib.contextmanager
def open_mode(mode: str, root: pathlib.Path) -> Iterator[tuple[dict[str, str], Any]]:
    """Yields the environment of the runs, and what makes the workdir of a name."""
    if mode != "bucket":
        yield dict(os.environ), lambda name: Disk(root / name)
        return

    # A killed process breaks its connections, of which the server would print a traceback each.
    socketserver.BaseServer.handle_error = lambda *_: None
    # The emulator that the tests use.
    sys.path.insert(0, str(ROOT / "tests"))
    from gcs_server import serve_bucket

    with serve_bucket("bucket") as environment:
        url = environment["STORAGE_EMULATOR_HOST"]
        yield environment, lambda name: Bucket(url, "bucket", name)


def train_command(scenes: pathlib.Path) -> list[str]:
    """Returns the command of a run without its workdir."""
    changes = {
        "data.scenes": "",
        "data.sources.scenes.path": scenes / "train_stage1.json",
        "data.sources.scenes.images": scenes / "images",
        "data.packing": "true",
        "data.sequence_length": 128,
        "batch_size": 4,
        "steps": STEPS,
        "checkpoint_every": SAVE_EVERY,
        "log_every": 1,
        "host_timeout": HOST_TIMEOUT,
    }
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    return ["-m", "wings_jax.train", f"--config={ROOT}/configs/stage1.py", *flags]


class Trials:
    """Trials of one mode, which are compared with the run that was left alone.

    Args:
      command: arguments of Python without the workdir.
      processes: how many form a job.
      environment: variables of the processes.
      cache: directory of compiled programs.
    """

    def __init__(
        self,
        command: list[str],
        processes: int,
        environment: dict[str, str],
        cache: pathlib.Path,
    ):
        self._command, self._processes = command, processes
        self._environment, self._cache = environment, cache

    def run_reference(self, workdir: Workdir) -> None:
        """Runs without a kill, twice: the second time measures a start with a full cache."""
        for _ in range(2):
            workdir.remove()
            job = self._start(workdir, self._cache)
            job.wait_for("config.model|fresh")
            self._set_up_seconds = job.seconds
            job.wait_for(r"step +1/")
            self._compile_seconds = job.seconds - self._set_up_seconds

            status = job.finish()
            if any(status):
                raise SystemExit(f"the run that is left alone failed:\n{job.output}")
        self._curve, self._sums = read_curve(workdir), workdir.read_checksums(STEPS)
        print(
            f"left alone: first line after {self._set_up_seconds:.1f} s, first step "
            f"{self._compile_seconds:.1f} s later, {job.seconds:.1f} s in all",
            file=sys.stderr,
        )

    def run(self, moment: str, workdir: Workdir, rng: random.Random) -> dict[str, Any]:
        """Returns the row of one trial."""
        began = time.monotonic()
        # A run that is killed while it compiles may be writing into the cache.
        cache = self._cache
        if moment == "compile":
            cache = cache.with_name("compiled-cold")
            shutil.rmtree(cache, ignore_errors=True)

        kill_at = [self._draw("step" if moment == "resume" else moment, rng)]
        if moment == "resume":
            kill_at.append(("", rng.uniform(0, self._set_up_seconds + self._compile_seconds)))

        killed, has_hung = [], False
        for line, delay in kill_at:
            job = self._start(workdir, cache)
            if line:
                job.wait_for(line)
            job.sleep(delay)
            killed.append(job.kill(rng) + workdir.describe_save())
            has_hung |= job.hung

        job = self._start(workdir, cache)
        status = job.finish()
        resumed = re.search(r"resuming from step (\d+)", job.output)
        faults = self._find_faults(workdir, status)
        faults += ["the other process did not end"] if has_hung else []
        return {
            "moment": moment,
            "killed": ", then ".join(killed),
            "resumed_from": int(resumed[1]) if resumed else 0,
            "passed": not faults,
            "faults": faults,
            "left": workdir.list_unfinished(),
            "seconds": round(time.monotonic() - began, 1),
            "output": "" if not faults else job.output[-3000:],
        }

    def _draw(self, moment: str, rng: random.Random) -> tuple[str, float]:
        """Returns the line to wait for, and the seconds after it."""
        if moment == "data":
            return "", rng.uniform(0, self._set_up_seconds)
        if moment == "compile":
            return "config.model|fresh", rng.uniform(0, self._compile_seconds)

        # The line of a step comes before its save.
        saving = range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)
        if moment == "save":
            return rf"step +{rng.choice(saving)}/", rng.uniform(0, SAVE_SECONDS)
        step = rng.choice([step for step in range(1, STEPS) if step not in saving])
        return rf"step +{step}/", rng.uniform(0, 0.2)

    def _start(self, workdir: Workdir, cache: pathlib.Path) -> Job:
        environment = {
            **self._environment,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        arguments = [*self._command, f"--workdir={workdir}"]
        return Job(arguments, self._processes, environment)

    def _find_faults(self, workdir: Workdir, status: list[int]) -> list[str]:
        """Returns what differs from the run that was left alone."""
        if any(status):
            return [f"exit status {status}"]

        faults = []
        curve = read_curve(workdir)
        if [row["step"] for row in curve] != [row["step"] for row in self._curve]:
            faults.append(f"metrics have the steps {[row['step'] for row in curve]}")
        elif curve != self._curve:
            differing = [a["step"] for a, b in zip(curve, self._curve, strict=True) if a != b]
            faults.append(f"metrics differ at the steps {differing}")

        if workdir.read_checksums(STEPS) != self._sums:
            faults.append("the last checkpoint differs")
        return faults


def read_curve(workdir: Workdir) -> list[dict[str, Any]]:
    """Returns step and compared metrics of every line."""
    rows = [json.loads(line) for line in workdir.read_text("metrics.jsonl").splitlines()]
    return [{key: row[key] for key in ("step", *COMPARED)} for row in rows]


def describe(row: dict[str, Any]) -> str:
    """Returns one line for a trial."""
    result = "same" if row["passed"] else "; ".join(row["faults"])
    left = f"; left: {', '.join(row['left'])}" if row["left"] else ""
    resumed = f"resumed from step {row['resumed_from']}"
    return f"{row['moment']}: {row['killed']}; {resumed}: {result} ({row['seconds']} s){left}"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table."""
    lines = [
        "| trial | moment | killed | resumed from step | result | seconds |",
        "|---:|---|---|---:|---|---:|",
    ]
    for row in rows:
        result = "same" if row["passed"] else "; ".join(row["faults"])
        cells = (row["trial"], row["moment"], row["killed"], row["resumed_from"], result)
        lines.append(f"| {' | '.join(map(str, cells))} | {row['seconds']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
