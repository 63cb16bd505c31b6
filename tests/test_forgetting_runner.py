"""Running the jobs of the experiment: resumed, stopped, failed; and the lock on its directory."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys

import pytest
import training_cases as cases
from forgetting_cases import SETTINGS

from wings_jax.errors import UserError
from wings_jax.forgetting import results, runner, settings
from wings_jax.forgetting.plan import ExperimentRun, Job
from wings_jax.forgetting.settings import ExperimentSettings, lock_directory


def fake_run(
    directory: pathlib.Path, name: str, *codes: str, shared: Job | None = None
) -> ExperimentRun:
    jobs = [shared] if shared else []
    for number, code in enumerate(codes):
        job = Job("evaluate", directory / name / str(number), (sys.executable, "-c", code))
        jobs.append(job)
    return ExperimentRun(name, "images", 0, directory / name, tuple(jobs))


@pytest.fixture
def written(monkeypatch):
    """The names of the runs whose scores were gathered."""
    names = []

    def write_scores(run: ExperimentRun) -> None:
        names.append(run.method)
        run.scores_file.write_text("{}")

    monkeypatch.setattr(results, "write_scores", write_scores)
    return names


def test_finished_jobs_are_not_repeated(tmp_path, written):
    add = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    runs = [fake_run(tmp_path, "one", add, add), fake_run(tmp_path, "two", add)]
    seen = []
    assert runner.run_all(runs, seen.append) == {}
    assert runner.run_all(runs, seen.append) == {}
    assert (tmp_path / "count").read_text() == "xxx"
    assert written == ["one", "two"]
    assert len(seen) == 2
    (tmp_path / "one" / "run.json").unlink()  # stopped before the scores were gathered
    runner.run_all(runs, seen.append)
    assert (tmp_path / "count").read_text() == "xxx"
    assert written == ["one", "two", "one"]


def test_failed_runs_are_reported_and_retried(tmp_path, written, capsys):
    switch = tmp_path / "switch"
    code = f"import os, sys; print('the reason'); sys.exit(not os.path.exists({str(switch)!r}))"
    shared = Job("stage 1", tmp_path / "first", (sys.executable, "-c", code))
    runs = [fake_run(tmp_path, name, "pass", shared=shared) for name in ("one", "two")]
    runs.append(fake_run(tmp_path, "three", "pass"))
    failed = runner.run_all(runs, lambda lost: None)
    assert list(failed) == ["one, images, seed 0", "two, images, seed 0"]
    assert set(failed.values()) == {f"exit status 1, see {shared.log}: the reason"}
    assert shared.log.read_text() == "the reason\n"  # once, though two runs need it
    assert written == ["three"]
    assert f"FAILED one, images, seed 0: exit status 1, see {shared.log}" in capsys.readouterr().out
    switch.touch()
    assert runner.run_all(runs, lambda lost: None) == {}
    assert written == ["three", "one", "two"]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("a\nwings_jax.train: --workdir: no\nb", "wings_jax.train: --workdir: no"),
        ("a\npython -m wings_jax.train: no\nb", "python -m wings_jax.train: no"),
        ("KeyError: 'a'\n--------\nFor simplicity, JAX has removed its", "KeyError: 'a'"),
        ("", "(no output)"),
    ],
)
def test_the_reason_of_a_failure_is_its_message(tmp_path, output, reason):
    code = f"import sys; print({output!r}); sys.exit(2)"
    job = Job("evaluate", tmp_path, (sys.executable, "-c", code))
    assert runner.execute_job(job) == f"exit status 2, see {job.log}: {reason}"


def test_unreadable_results_fail_their_run_only(tmp_path, monkeypatch):
    gathered = []

    def write_scores(run: ExperimentRun) -> None:
        if run.method == "one":
            raise UserError("--out: one is damaged")
        gathered.append(run.method)
        run.scores_file.write_text("{}")

    monkeypatch.setattr(results, "write_scores", write_scores)
    runs = [fake_run(tmp_path, name, "pass") for name in ("one", "two")]
    failed = runner.run_all(runs, lambda lost: None)
    assert failed == {"one, images, seed 0": "--out: one is damaged"}
    assert gathered == ["two"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"seconds": null}'])
def test_a_damaged_done_file_is_named(tmp_path, content):
    job = Job("evaluate", tmp_path, ("x",))
    job.done_file.write_text(content)
    with pytest.raises(UserError, match=rf"^--out: {job.done_file} is damaged"):
        _ = job.seconds


def test_sigterm_ends_the_running_command(tmp_path, written):
    """The child process gets SIGTERM too, may save, and its job is not done."""
    saved = tmp_path / "saved"
    code = (
        "import os, pathlib, signal, sys, time\n"
        f"save = lambda *_: (pathlib.Path({str(saved)!r}).touch(), sys.exit(143))\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    run = fake_run(tmp_path, "one", code)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        runner.run_all([run], lambda lost: None)
    assert caught.value.code == 143
    assert saved.exists()
    assert run.jobs[0].seconds is None
    assert written == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_progress_counts_runs_and_estimates_the_rest(tmp_path):
    runs = [fake_run(tmp_path, name, "pass") for name in ("one", "two", "three")]
    training = Job("stage 2", tmp_path / "four", ("x",))
    runs.append(ExperimentRun("four", "images", 0, tmp_path / "four", (*runs[3:], training)))
    assert runner.format_progress(runs) == "0 of 4 runs done"
    for run, seconds in zip(runs[:2], (20, 40), strict=True):
        (job,) = run.jobs
        job.directory.mkdir(parents=True)
        job.done_file.write_text(json.dumps({"seconds": seconds}))
        run.scores_file.write_text("{}")
    # 60 s for 2 runs; left are one like them, 30 s, and one of a kind not seen, 30 s as well
    assert runner.format_progress(runs) == "2 of 4 runs done, 0:30 a run, ETA 1:00"
    training.directory.mkdir()
    training.done_file.write_text(
        json.dumps({"seconds": 70})
    )  # of a run that is not done: 160 s in all
    assert runner.format_progress(runs) == "2 of 4 runs done, 0:40 a run, ETA 0:30"


def test_settings_of_an_output_directory_never_change(tmp_path, monkeypatch):
    new = tmp_path / "new"
    for _ in range(2):
        with lock_directory(new, SETTINGS):
            assert (new / "settings.json").is_file()
    other = dataclasses.replace(SETTINGS, is_fast=True, steps=100)
    refused = {
        r"other settings \(is_fast: False -> True; steps: None": (new, other),
        "exists and is not the output of an experiment": (cases.ROOT / "configs", SETTINGS),
        "--out: cannot write to": (tmp_path / "file" / "out", SETTINGS),
    }
    (tmp_path / "file").touch()
    for message, (out, wanted) in refused.items():
        with pytest.raises(UserError, match=message), lock_directory(out, wanted):
            pass
    (tmp_path / "another.safetensors").write_text("weights of another base")
    with monkeypatch.context() as patch:
        patch.setattr(
            settings, "_shipped_weights", lambda part: str(tmp_path / "another.safetensors")
        )
        message = r"other settings \(weights: "
        with pytest.raises(UserError, match=message), lock_directory(new, SETTINGS):
            pass
    (new / "settings.json").write_text("{")
    with (
        pytest.raises(UserError, match=r"settings\.json is damaged"),
        lock_directory(new, SETTINGS),
    ):
        pass


def test_settings_include_the_contents_of_the_data(tmp_path):
    def settings_with(pictures: int) -> ExperimentSettings:
        (tmp_path / "scenes.json").write_text(json.dumps({"pictures": pictures}))
        settings.file_digest.cache_clear()
        return dataclasses.replace(
            SETTINGS, files=settings.file_digest(str(tmp_path / "scenes.json"))
        )

    with lock_directory(tmp_path / "out", settings_with(6)):
        pass
    other = settings_with(7)
    with (
        pytest.raises(UserError, match=r"settings \(files: "),
        lock_directory(tmp_path / "out", other),
    ):
        pass


def test_lock_excludes_a_second_experiment(tmp_path):
    with (
        lock_directory(tmp_path, SETTINGS),
        pytest.raises(UserError, match="another experiment is running in"),
        lock_directory(tmp_path, SETTINGS),
    ):
        pass
    with lock_directory(tmp_path, SETTINGS):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)  # as the runner starts them
    with pytest.raises(UserError, match="another experiment"), lock_directory(tmp_path, SETTINGS):
        pass
    child.kill()
    child.wait()
    with lock_directory(tmp_path, SETTINGS):
        pass
