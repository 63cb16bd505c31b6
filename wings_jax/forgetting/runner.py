"""Runs what is not done yet, one command after the other, and tells how far it is.

A run that fails is named with its log, and the others go on. A stopped experiment goes on by the
same command: jobs that ended left a note, and a training that was cut off resumes by itself.
"""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from wings_jax import files, formatting
from wings_jax.errors import UserError
from wings_jax.forgetting import results
from wings_jax.forgetting.plan import ExperimentRun, Job


def go(
    runs: Sequence[ExperimentRun], show: Callable[[Mapping[str, str]], object]
) -> dict[str, str]:
    """Runs what is left. Returns run -> why it failed; `show` is called with that after each."""
    failed: dict[Job, str] = {}
    lost: dict[str, str] = {}
    with _stoppable():
        for run in runs:
            if run.file.exists():
                continue
            why = _finish(run, failed)
            if why:
                lost[run.name] = why
                print(f"FAILED {run.name}: {why}", flush=True)
            else:
                results.write_scores(run)
            show(lost)
            print(progress(runs), flush=True)
    return lost


def _finish(run: ExperimentRun, failed: dict[Job, str]) -> str:
    """Returns "" once all jobs of the run are done, or why they cannot be."""
    for job in run.jobs:
        if job.seconds is None and job not in failed:
            print(f"{run.name}: {job.kind} -> {job.log}", flush=True)
            why = execute(job)
            if why:
                failed[job] = why
        if job in failed:
            return failed[job]
    return ""


def execute(job: Job) -> str:
    """Runs a job, all that it says going to its log. Returns "" or why it failed.

    Raises:
      UserError: the log cannot be written.
    """
    started = time.perf_counter()
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        log = job.log.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {job.log}: cannot be written: {error.strerror}") from error
    began = log.tell()
    with log:
        # In a session of its own Ctrl-C does not reach it, so that a training is asked to save.
        # The folder's lock is handed on to it (`plan.claim`).
        process = subprocess.Popen(
            job.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            close_fds=False,
        )
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if status:
        return f"exit status {status}, see {job.log}: {_reason(job, began)}"
    seconds = time.perf_counter() - started
    note = {"command": list(job.command), "seconds": round(seconds, 1)}
    files.write_text(job.note, json.dumps(note, indent=1) + "\n")
    return ""


def _reason(job: Job, began: int) -> str:
    """Returns what a log says from byte `began` on: a mistake in one line, or its last line."""
    said = job.log.read_bytes()[began:].decode("utf-8", errors="replace").strip().splitlines()
    mistakes = [line for line in said if line.startswith("wings_jax.")]
    return (mistakes or said or ["(nothing)"])[-1]


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Makes SIGINT and SIGTERM end the experiment the orderly way as long as it is entered."""

    def stop(number: int, _: object) -> None:
        print("stopping; the same command goes on from here", flush=True)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress(runs: Sequence[ExperimentRun]) -> str:
    """Returns one line: runs done, what one took, and how long the others will take."""
    done = sum(run.file.exists() for run in runs)
    jobs = {job: job.seconds for run in runs for job in run.jobs}
    took = [seconds for seconds in jobs.values() if seconds is not None]
    line = f"{done} of {len(runs)} runs done"
    if not done or not took:
        return line
    left = remaining(jobs)
    line += f", {formatting.format_duration((sum(took) + left) / len(runs))} a run"
    return line + (f", ETA {formatting.format_duration(left)}" if done < len(runs) else "")


def remaining(jobs: dict[Job, float | None]) -> float:
    """Returns the seconds that jobs without a time will take, as others of their kind did."""
    by_kind: dict[str, list[float]] = {}
    for job, seconds in jobs.items():
        if seconds is not None:
            by_kind.setdefault(job.kind, []).append(seconds)
    any_kind = statistics.mean(s for some in by_kind.values() for s in some)
    means = {kind: statistics.mean(some) for kind, some in by_kind.items()}
    return sum(means.get(job.kind, any_kind) for job, s in jobs.items() if s is None)
