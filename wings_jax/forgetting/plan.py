"""The commands of every run of the experiment, and which of them runs share.

OUT/settings.json               the settings of all its runs
OUT/imported/                   the base as a checkpoint, where its LLM does not ship here
OUT/stage1/CONFIG/seed-0/       a first stage, shared by the methods that start from it
OUT/REGIME/METHOD/seed-0/       a run: the workdir of its training, with
    train.log, evaluate.log, ...          the output of its commands
    scores/, language/, laws/             their results
    run.json                              the scores that go into the table
OUT/base/                       the same of the models before any training
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from wings_jax.forgetting import methods
from wings_jax.forgetting.methods import ALIGNMENT, BASE, BASES, REGIMES, Regime
from wings_jax.forgetting.settings import SCENES, SHIPPED, ExperimentSettings, reading


@dataclasses.dataclass(frozen=True)
class Job:
    """One command. It is done when its `done_file` exists."""

    # "import", "stage 1", "stage 2", "evaluate", "language" or "laws".
    kind: str
    # Directory of its log and its `done_file`.
    directory: pathlib.Path
    # Program and arguments.
    command: tuple[str, ...]
    # What the command writes atomically and refuses to replace: it is done if this exists.
    output: pathlib.Path | None = None

    @property
    def log(self) -> pathlib.Path:
        """Returns the file of its stdout and stderr."""
        name = "train" if self.kind.startswith("stage") else self.kind
        return self.directory / f"{name}.log"

    @property
    def done_file(self) -> pathlib.Path:
        """Returns the file that is written when the command has succeeded."""
        return self.log.with_suffix(".done.json")

    @property
    def seconds(self) -> float | None:
        """Returns the wall-clock seconds that it took, None if it is not done."""
        if not self.done_file.exists():
            return 0.0 if self.output and self.output.exists() else None
        with reading(self.done_file):
            return float(json.loads(self.done_file.read_text(encoding="utf-8"))["seconds"])


@dataclasses.dataclass(frozen=True)
class ExperimentRun:
    """A method with a regime and a seed."""

    # Method or variant.
    method: str
    # Name of the regime; "" for the base, which is the same under all.
    regime: str
    # Seed of its trainings, 0 for the base.
    seed: int
    # Workdir of its last stage, with the results in it.
    directory: pathlib.Path
    # Its commands, in the order in which they are run.
    jobs: tuple[Job, ...]

    @property
    def name(self) -> str:
        """Returns its name in messages."""
        return f"{self.method}, {self.regime}, seed {self.seed}" if self.regime else self.method

    @property
    def scores_file(self) -> pathlib.Path:
        """Returns the file of its scores, which exists when the run is done."""
        return self.directory / "run.json"


def plan_runs(
    out: pathlib.Path,
    method_names: Sequence[str],
    regimes: Sequence[str],
    seeds: Sequence[int],
    settings: ExperimentSettings,
) -> list[ExperimentRun]:
    """Returns all runs, seed after seed, so that an early table has every method in it."""
    # The base needs one run only: it has no seed and no second stage.
    runs = [plan_run(out, BASE, "", 0, settings)] if BASE in method_names else []
    return runs + [
        plan_run(out, method, regime, seed, settings)
        for seed in seeds
        for regime in regimes
        for method in method_names
        if method != BASE
    ]


def plan_run(
    out: pathlib.Path, name: str, regime: str, seed: int, settings: ExperimentSettings
) -> ExperimentRun:
    """Returns the run of a method: its stages, and the commands that score the last one."""
    method_directory = name.replace("=", "-")  # checkpoints are given as NAME=DIR
    directory = out / regime / method_directory / f"seed-{seed}" if regime else out / name

    training = _training_jobs(out, directory, name, regime, seed, settings)
    scoring = _scoring_jobs(directory, name, settings)
    return ExperimentRun(name, regime, seed, directory, (*training, *scoring))


def _training_jobs(
    out: pathlib.Path,
    directory: pathlib.Path,
    name: str,
    regime: str,
    seed: int,
    settings: ExperimentSettings,
) -> list[Job]:
    """Returns the import of the base, the first and the last stage, where they are needed."""
    method, base = methods.find_method(name), BASES[settings.base]
    # Each job starts from the result of the one before it.
    jobs, init_from = [], ""

    if base.package:
        jobs.append(_import_job(out / "imported", settings.gguf))
        init_from = str(jobs[-1].output)

    # The first stage is in a directory of its config: methods share it.
    if method.first_stage:
        first_job = _train_job(
            "stage 1",
            out / "stage1" / method.first_stage / f"seed-{seed}",
            method.first_stage,
            ALIGNMENT,
            {"seed": seed, "init_from": init_from, "steps": settings.stage1_steps},
            settings,
        )
        jobs.append(first_job)
        init_from = str(first_job.directory)

    # The last stage starts from the first, or from the base.
    steps = settings.steps if method.steps is None else method.steps
    last_job = _train_job(
        "stage 2",
        directory,
        method.config,
        REGIMES[regime] if regime else ALIGNMENT,
        {"seed": seed, "init_from": init_from, "steps": steps},
        settings,
        method.overrides,
    )
    return [*jobs, last_job]


def _scoring_jobs(directory: pathlib.Path, name: str, settings: ExperimentSettings) -> list[Job]:
    """Returns the commands that measure the checkpoint of a last stage."""
    base = BASES[settings.base]
    # The name is that of the method, without the changes of a variant.
    checkpoint = f"--checkpoint={name.split('@')[0]}={directory}"
    limit = ("--limit", str(settings.limit)) if settings.limit else ()

    task_flags = ("--tasks", ",".join(base.tasks), "--data-root", settings.data)
    outputs = ("--out", str(directory / "scores"), *limit)
    jobs = [_job("evaluate", directory, "evaluate", checkpoint, *task_flags, *outputs)]

    if any(measure.task == "language" for measure in base.measures):
        outputs = (*settings.language, "--out", str(directory / "language"), *limit)
        jobs.append(_job("language", directory, "evaluate", "language", checkpoint, *outputs))

    # --limit is for questions; the probes are those of the default.
    outputs = ("--out", str(directory / "laws"))
    jobs.append(_job("laws", directory, "analyze", "laws", checkpoint, *outputs))
    return jobs


def _import_job(directory: pathlib.Path, gguf: str) -> Job:
    output = directory / "base"
    flags = (f"--gguf={gguf}", f"--vision={SHIPPED / 'vision'}", f"--out={output}")
    job = _job("import", directory, "convert", "import", *flags)
    return dataclasses.replace(job, output=output)


def _train_job(
    kind: str,
    directory: pathlib.Path,
    config: str,
    regime: Regime,
    values: dict[str, int | str | None],
    settings: ExperimentSettings,
    overrides: Sequence[str] = (),
) -> Job:
    """Returns a training of a config; a value None leaves the config's."""
    preset = BASES[settings.base].preset
    # Only the newest checkpoint of each run is on the disk.
    values = {"max_checkpoints": 1, **values}

    if settings.data != SCENES:
        values["data.scenes"] = ""  # it exists already, and may have another size
    for source, file in regime.sources.items():
        values[f"data.sources.{source}.path"] = f"{settings.data}/{file}.json"
        values[f"data.sources.{source}.images"] = f"{settings.data}/images"

    flags = [f"--config={regime.config.format(config)}{preset}", f"--workdir={directory}"]
    flags += [f"--config.{key}={value}" for key, value in values.items() if value is not None]
    flags += [*settings.overrides, *(f"--config.{override}" for override in overrides)]
    return _job(kind, directory, "train", *flags)


def _job(kind: str, directory: pathlib.Path, program: str, *flags: str) -> Job:
    return Job(kind, directory, (sys.executable, "-m", f"wings_jax.{program}", *flags))
