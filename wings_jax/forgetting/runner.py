"""Runs the jobs that are not done yet, one after the other, and prints the progress.

A run that fails is reported with its log, and the other runs continue. A stopped experiment is
resumed by the same command: jobs that have ended left a file, and a training resumes from its last
checkpoint.
"""

from __future__ import annotations

import contextlib
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from wings_jax import files, formatting
from wings_jax.errors import UserError
from wings_jax.forgetting import results
from wings_jax.forgetting.plan import ExperimentRun, Job

# A line of a log that is the message of a UserError (`cli.run_main`).
USER_ERROR = re.compile(r"^(python -m )?wings_jax\.\S+: ")
# What JAX prints below a traceback.
JAX_FOOTER = re.compile(r"^(-+$|For simplicity, JAX has removed)")


def run_all(
    runs: Sequence[ExperimentRun], update: Callable[[Mapping[str, str]], object]
) -> dict[str, str]:
    """Runs what is not done. Returns name of a run -> reason of its failure.

    `update` is called with that after each run.
    """
    failed_jobs: dict[Job, str] = {}
    failed_runs: dict[str, str] = {}

    with _stop_on_signals():
        for run in runs:
            if run.scores_file.exists():
                continue

            # One failed run does not stop the others.
            reason = _finish_run(run, failed_jobs) or _gather_scores(run)
            if reason:
                failed_runs[run.name] = reason
                print(f"FAILED {run.name}: {reason}", flush=True)

            update(failed_runs)
            print(format_progress(runs), flush=True)
    return failed_runs


def _finish_run(run: ExperimentRun, failed_jobs: dict[Job, str]) -> str:
    """Returns "" when all jobs of the run are done, or the reason why one failed.

    A shared job is tried once; `failed_jobs` collects those that failed.
    """
    for job in run.jobs:
        if job.seconds is None and job not in failed_jobs:
            print(f"{run.name}: {job.kind} -> {job.log}", flush=True)
            reason = execute_job(job)
            if reason:
                failed_jobs[job] = reason
        if job in failed_jobs:
            return failed_jobs[job]
    return ""


def _gather_scores(run: ExperimentRun) -> str:
    """Returns "" when the scores of the run are written, or the reason why they cannot be."""
    try:
        results.write_scores(run)
    except UserError as error:
        return str(error)
    return ""


def execute_job(job: Job) -> str:
    """Runs a job with its output appended to its log. Returns "" or the reason of its failure.

    Raises:
      UserError: the log cannot be written.
    """
    started = time.perf_counter()
    try:
        job.directory.mkdir(parents=True, exist_ok=True)
        log = job.log.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {job.log}: cannot be written: {error.strerror}") from error

    log_start = log.tell()
    with log:
        # In another session it does not get Ctrl-C: `terminate` asks a training to save.
        # The open lock of the output directory is inherited (`settings.lock_directory`).
        process = subprocess.Popen(
            job.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            close_fds=False,
        )
        try:
            status = process.wait()
        finally:  # a signal ended the waiting: the job may save, and ends too
            if process.poll() is None:
                process.terminate()
                process.wait()

    if status:
        return f"exit status {status}, see {job.log}: {_failure_line(job, log_start)}"

    seconds = round(time.perf_counter() - started, 1)
    done_record = {"command": list(job.command), "seconds": seconds}
    files.write_text(job.done_file, formatting.json_text(done_record))
    return ""


def _failure_line(job: Job, log_start: int) -> str:
    """Returns the message of a UserError in the log from byte `log_start` on, or its last line."""
    # The log also has the output of earlier tries.
    lines = job.log.read_bytes()[log_start:].decode("utf-8", errors="replace").strip().splitlines()
    messages = [line for line in lines if USER_ERROR.match(line)]
    others = [line for line in lines if not JAX_FOOTER.match(line)]
    return (messages or others or ["(no output)"])[-1]


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise SystemExit inside the context, so that jobs are ended."""

    def stop(number: int, _: object) -> None:
        print("stopping; the same command resumes", flush=True)
        raise SystemExit(128 + number)

    # The handlers of before are restored at the end.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def format_progress(runs: Sequence[ExperimentRun]) -> str:
    """Returns one line: runs that are done, seconds per run, and the time for the others."""
    done_count = sum(run.scores_file.exists() for run in runs)
    line = f"{done_count} of {len(runs)} runs done"

    # A shared job counts once.
    seconds_by_job = {job: job.seconds for run in runs for job in run.jobs}
    known_seconds = [seconds for seconds in seconds_by_job.values() if seconds is not None]
    if not done_count or not known_seconds:
        return line

    remaining = remaining_seconds(seconds_by_job)
    line += f", {formatting.format_duration((sum(known_seconds) + remaining) / len(runs))} a run"
    if done_count < len(runs):
        line += f", ETA {formatting.format_duration(remaining)}"
    return line


def remaining_seconds(seconds_by_job: Mapping[Job, float | None]) -> float:
    """Returns the seconds of the jobs that are not done, estimated by others of their kind."""
    by_kind: dict[str, list[float]] = {}
    for job, seconds in seconds_by_job.items():
        if seconds is not None:
            by_kind.setdefault(job.kind, []).append(seconds)

    # A kind of job that has never been run takes the mean of all jobs.
    kind_means = {kind: statistics.mean(known_seconds) for kind, known_seconds in by_kind.items()}
    overall = statistics.mean(
        seconds for known_seconds in by_kind.values() for seconds in known_seconds
    )
    waiting = [job for job, seconds in seconds_by_job.items() if seconds is None]
    return sum(kind_means.get(job.kind, overall) for job in waiting)
