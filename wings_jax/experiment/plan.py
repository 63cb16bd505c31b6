"""Which commands have to be run for which row of the table, and what is shared among them.

OUT/settings.json               what all of its runs have in common
OUT/stage1/CONFIG/seed-0/       a first stage, shared by the methods that start from it
OUT/REGIME/METHOD/seed-0/       a run: the workdir of its training, and beside it
    train.log, evaluate.log, laws.log     what the commands said
    scores/, laws/                        what they found
    run.json                              what of it goes into the table
OUT/base/                       the same of the models before any training
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from wings_jax.errors import UserError
from wings_jax.evaluation import report
from wings_jax.experiment.methods import ALIGNMENT, BASE, METHODS, REGIMES, Regime

TASKS = "scenes_images,scenes_text,iit"
SCENES = "runs/scenes"  # as in configs/base.py


@dataclasses.dataclass(frozen=True)
class Settings:
    """What changes the numbers of a run; one folder holds runs of one choice.

    is_fast         the short form, which says so on its table
    steps           of the last stage, None for the config's
    stage1_steps    of the first, likewise
    limit           questions of a task, None for all
    data            folder of the embedded data set
    overrides       further `--config.key=value` of every training
    """

    is_fast: bool
    steps: int | None
    stage1_steps: int | None
    limit: int | None
    data: str
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Job:
    """One command. It is done when `folder` holds the note that it left.

    kind     "stage 1", "stage 2", "evaluate" or "laws"
    """

    kind: str
    folder: pathlib.Path
    command: tuple[str, ...]

    @property
    def log(self) -> pathlib.Path:
        """Returns where what it says goes."""
        return self.folder / f"{'train' if self.kind.startswith('stage') else self.kind}.log"

    @property
    def note(self) -> pathlib.Path:
        """Returns the file that says that it ended well."""
        return self.log.with_suffix(".done.json")

    @property
    def seconds(self) -> float | None:
        """Returns how long it took, None if it is not done."""
        try:
            return json.loads(self.note.read_text(encoding="utf-8"))["seconds"]
        except FileNotFoundError:
            return None


@dataclasses.dataclass(frozen=True)
class Run:
    """A method with a regime and a seed; its jobs in the order in which they must be run.

    regime  "" and seed 0 for the base, which is one and the same for all
    """

    method: str
    regime: str
    seed: int
    folder: pathlib.Path
    jobs: tuple[Job, ...]

    @property
    def name(self) -> str:
        """Returns how messages call it."""
        return f"{self.method}, {self.regime}, seed {self.seed}" if self.regime else self.method

    @property
    def file(self) -> pathlib.Path:
        """Returns the file of its scores, which is there when the run is done."""
        return self.folder / "run.json"


def runs(
    out: pathlib.Path,
    methods: Sequence[str],
    regimes: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
) -> list[Run]:
    """Returns all runs, seed after seed, so that an early look has every method in it."""
    found = [_run(out, BASE, "", 0, settings)] if BASE in methods else []
    return found + [
        _run(out, method, regime, seed, settings)
        for seed in seeds
        for regime in regimes
        for method in methods
        if method != BASE
    ]


def _run(out: pathlib.Path, name: str, regime: str, seed: int, settings: Settings) -> Run:
    method = METHODS[name]
    folder = out / regime / name / f"seed-{seed}" if regime else out / name
    jobs, before = [], ""
    if method.begins:
        first = out / "stage1" / method.begins / f"seed-{seed}"
        steps = settings.stage1_steps
        jobs.append(_train("stage 1", first, method.begins, ALIGNMENT, seed, steps, settings))
        before = str(first)
    steps = settings.steps if method.steps is None else method.steps
    sees = REGIMES[regime] if regime else ALIGNMENT
    jobs.append(_train("stage 2", folder, method.config, sees, seed, steps, settings, before))
    asked = ("--tasks", TASKS, "--data-root", settings.data, "--out", str(folder / "scores"))
    limit = ("--limit", str(settings.limit)) if settings.limit else ()
    jobs.append(
        _job("evaluate", folder, "evaluate", f"--checkpoint={name}={folder}", *asked, *limit)
    )
    where = ("--out", str(folder / "laws"))
    jobs.append(_job("laws", folder, "analyze", "laws", f"--checkpoint={name}={folder}", *where))
    return Run(name, regime, seed, folder, tuple(jobs))


def _train(
    kind: str,
    folder: pathlib.Path,
    config: str,
    sees: Regime,
    seed: int,
    steps: int | None,
    settings: Settings,
    before: str = "",
) -> Job:
    flags = [f"--config={sees.config.format(config)}", f"--workdir={folder}"]
    values = {"seed": seed, "init_from": before, "keep": 1}
    if settings.data != SCENES:
        values["data.scenes"] = ""  # it is there already, and may be of another size
    for source, file in sees.sources.items():
        values[f"data.sources.{source}.path"] = f"{settings.data}/{file}.json"
        values[f"data.sources.{source}.images"] = f"{settings.data}/images"
    if steps is not None:
        values["steps"] = steps
    flags += [f"--config.{key}={value}" for key, value in values.items()]
    return _job(kind, folder, "train", *flags, *settings.overrides)


def _job(kind: str, folder: pathlib.Path, program: str, *flags: str) -> Job:
    return Job(kind, folder, (sys.executable, "-m", f"wings_jax.{program}", *flags))


def claim(out: pathlib.Path, settings: Settings) -> None:
    """Notes the settings in `out`.

    Raises:
      UserError: it holds runs of other settings, or something else, or cannot be written.
    """
    report.check_writable(out, "--out")
    note, now = out / "settings.json", dataclasses.asdict(settings)
    now["overrides"] = list(settings.overrides)
    if note.exists():
        old = json.loads(note.read_text(encoding="utf-8"))
        changed = [
            f"{key}: {old.get(key)!r} -> {now[key]!r}" for key in now if old.get(key) != now[key]
        ]
        if changed:
            raise UserError(
                f"--out: {out} was made with other settings ({'; '.join(changed)}): give another "
                "--out, or remove it"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out: {out} exists and holds no experiment")
    report.write(note, json.dumps(now, indent=1) + "\n")
