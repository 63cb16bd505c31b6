"""Which commands have to be run for which row of the table, and what is shared among them.

OUT/settings.json               what all of its runs have in common
OUT/imported/                   the base as a checkpoint, where its LLM does not ship here
OUT/stage1/CONFIG/seed-0/       a first stage, shared by the methods that start from it
OUT/REGIME/METHOD/seed-0/       a run: the workdir of its training, and beside it
    train.log, evaluate.log, ...          what the commands said
    scores/, language/, laws/             what they found
    run.json                              what of it goes into the table
OUT/base/                       the same of the models before any training
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.resources
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from wings_jax import files
from wings_jax.errors import UserError
from wings_jax.forgetting import methods
from wings_jax.forgetting.methods import ALIGNMENT, BASE, BASES, REGIMES, Regime

SCENES = "runs/scenes"  # as in configs/base.py
SHIPPED = pathlib.Path(str(importlib.resources.files("wings_jax"))) / "assets" / "tiny"


@dataclasses.dataclass(frozen=True)
class ExperimentSettings:
    """What changes the numbers of a run; one folder holds runs of one choice.

    base            of `methods.BASES`
    gguf            file of its LLM, "" where that ships with the package
    is_fast         the short form, which says so on its table
    steps           of the last stage, None for the config's
    stage1_steps    of the first, likewise
    limit           questions of a task, None for all
    data            folder of the embedded data set
    overrides       further `--config.key=value` of every training
    language        flags of `evaluate language`: what the user supplies to be read and asked
    files           digest of the data set's note and of what the user supplies
    """

    base: str
    gguf: str
    is_fast: bool
    steps: int | None
    stage1_steps: int | None
    limit: int | None
    data: str
    overrides: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    files: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """One command. It is done when `folder` holds the note that it left.

    kind     "import", "stage 1", "stage 2", "evaluate", "language" or "laws"
    makes    what it puts there whole or not at all, and refuses to replace
    """

    kind: str
    folder: pathlib.Path
    command: tuple[str, ...]
    makes: pathlib.Path | None = None

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
            return 0.0 if self.makes and self.makes.exists() else None


@dataclasses.dataclass(frozen=True)
class ExperimentRun:
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
    settings: ExperimentSettings,
) -> list[ExperimentRun]:
    """Returns all runs, seed after seed, so that an early look has every method in it."""
    found = [_run(out, BASE, "", 0, settings)] if BASE in methods else []
    return found + [
        _run(out, method, regime, seed, settings)
        for seed in seeds
        for regime in regimes
        for method in methods
        if method != BASE
    ]


def _run(
    out: pathlib.Path, name: str, regime: str, seed: int, settings: ExperimentSettings
) -> ExperimentRun:
    method, base = methods.find(name), BASES[settings.base]
    folder = out / regime / name.replace("=", "-") / f"seed-{seed}" if regime else out / name
    jobs, before = [], ""
    if base.package:
        jobs.append(_import(out / "imported", settings.gguf))
        before = str(out / "imported" / "base")
    if method.begins:
        first = out / "stage1" / method.begins / f"seed-{seed}"
        steps = settings.stage1_steps
        jobs.append(
            _train("stage 1", first, method.begins, ALIGNMENT, seed, steps, settings, before)
        )
        before = str(first)
    steps = settings.steps if method.steps is None else method.steps
    sees, further = REGIMES[regime] if regime else ALIGNMENT, method.values
    jobs.append(
        _train("stage 2", folder, method.config, sees, seed, steps, settings, before, further)
    )
    asks = f"--checkpoint={name.split('@')[0]}={folder}"
    limit = ("--limit", str(settings.limit)) if settings.limit else ()
    about = ("--tasks", ",".join(base.tasks), "--data-root", settings.data)
    scores = ("--out", str(folder / "scores"), *limit)
    jobs.append(_job("evaluate", folder, "evaluate", asks, *about, *scores))
    if any(measure.task == "language" for measure in base.measures):
        told = (*settings.language, "--out", str(folder / "language"), *limit)
        jobs.append(_job("language", folder, "evaluate", "language", asks, *told))
    jobs.append(_job("laws", folder, "analyze", "laws", asks, "--out", str(folder / "laws")))
    return ExperimentRun(name, regime, seed, folder, tuple(jobs))


def _import(folder: pathlib.Path, gguf: str) -> Job:
    flags = (f"--gguf={gguf}", f"--vision={SHIPPED / 'vision'}", f"--out={folder / 'base'}")
    job = _job("import", folder, "convert", "import", *flags)
    return dataclasses.replace(job, makes=folder / "base")


def _train(
    kind: str,
    folder: pathlib.Path,
    config: str,
    sees: Regime,
    seed: int,
    steps: int | None,
    settings: ExperimentSettings,
    before: str,
    further: Sequence[str] = (),
) -> Job:
    preset = BASES[settings.base].preset
    flags = [f"--config={sees.config.format(config)}{preset}", f"--workdir={folder}"]
    values = {"seed": seed, "init_from": before, "max_checkpoints": 1}
    if settings.data != SCENES:
        values["data.scenes"] = ""  # it is there already, and may be of another size
    for source, file in sees.sources.items():
        values[f"data.sources.{source}.path"] = f"{settings.data}/{file}.json"
        values[f"data.sources.{source}.images"] = f"{settings.data}/images"
    if steps is not None:
        values["steps"] = steps
    flags += [f"--config.{key}={value}" for key, value in values.items()]
    flags += [*settings.overrides, *(f"--config.{value}" for value in further)]
    return _job(kind, folder, "train", *flags)


def _job(kind: str, folder: pathlib.Path, program: str, *flags: str) -> Job:
    return Job(kind, folder, (sys.executable, "-m", f"wings_jax.{program}", *flags))


@contextlib.contextmanager
def claim(out: pathlib.Path, settings: ExperimentSettings) -> Iterator[None]:
    """Notes the settings in `out`, which is this process's as long as the context lasts.

    Commands that it starts inherit the lock, and hold it until they have ended.

    Raises:
      UserError: it holds runs of other settings or of another base, or something else; another
        process is at work in it; or it cannot be written.
    """
    files.check_writable(out, "--out")
    note, lock = out / "settings.json", out / ".lock"
    if out.exists() and not note.exists() and any(path != lock for path in out.iterdir()):
        raise UserError(f"--out: {out} exists and holds no experiment")
    out.mkdir(parents=True, exist_ok=True)
    with lock.open("a", encoding="utf-8") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--out: another experiment is at work in {out}") from error
        os.set_inheritable(held.fileno(), True)
        _note(note, described(settings))
        yield


def _note(note: pathlib.Path, now: dict[str, Any]) -> None:
    """Writes the settings; where they are already, they must be the same ones."""
    if not note.exists():
        files.write_text(note, json.dumps(now, indent=1) + "\n")
        return
    try:
        old = dict(json.loads(note.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"--out: {note} is damaged: {error}; remove {note.parent}") from error
    changed = [
        f"{key}: {old.get(key)!r} -> {now[key]!r}"
        for key in now
        if old.get(key) != now[key] and key not in ("gguf", "data")  # wherever they lie
    ]
    if changed:
        raise UserError(
            f"--out: {note.parent} was made with other settings ({'; '.join(changed)}): give "
            "another --out, or remove it"
        )


def described(settings: ExperimentSettings) -> dict[str, Any]:
    """Returns the settings for JSON, with a digest of the weights that all runs start from."""
    lists = {name: list(getattr(settings, name)) for name in ("overrides", "language")}
    weights = digest(settings.gguf or _weights("llm"), _weights("vision"))
    return dataclasses.asdict(settings) | lists | {"weights": weights}


def told(settings: ExperimentSettings) -> str:
    """Returns what was chosen, in words."""
    chosen = [
        f"{'as many steps as its config has' if count is None else f'{count} steps'} of {stage}"
        for stage, count in (("stage 1", settings.stage1_steps), ("stage 2", settings.steps))
    ]
    chosen.append(f"{settings.limit or 'all'} questions of a task")
    chosen += [f"every training with `{flag}`" for flag in settings.overrides]
    return ", ".join(chosen)


@functools.cache
def digest(*files: str) -> str:
    """Returns what tells these files from others. Raises UserError if one cannot be read."""
    found = hashlib.sha256()
    for file in map(pathlib.Path, files):
        try:
            found.update(file.read_bytes())
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    return found.hexdigest()[:16]


def _weights(half: str) -> str:
    return str(SHIPPED / half / "model.safetensors")
