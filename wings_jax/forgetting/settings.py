"""The settings that all runs of one output directory share, and the lock on that directory."""

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
from collections.abc import Iterator
from typing import Any

from wings_jax import files, formatting
from wings_jax.errors import UserError

SCENES = "runs/scenes"  # as in configs/base.py
SHIPPED = pathlib.Path(str(importlib.resources.files("wings_jax"))) / "assets" / "tiny"


@dataclasses.dataclass(frozen=True)
class ExperimentSettings:
    """What changes the numbers of a run; an output directory has runs of one choice of them."""

    # Name of the base, a key of `methods.BASES`.
    base: str
    # GGUF file of its LLM, "" where the LLM ships with the package.
    gguf: str
    # Whether it is the short form of the experiment; the table has a note on it.
    is_fast: bool
    # Steps of the last stage, None for the config's.
    steps: int | None
    # Steps of the first stage, None for the config's.
    stage1_steps: int | None
    # Questions of a task, None for all.
    limit: int | None
    # Directory of the embedded data set.
    data: str
    # Further `--config.key=value` of every training.
    overrides: tuple[str, ...] = ()
    # `--text` and `--choices` of `evaluate language`, with the user's files.
    language: tuple[str, ...] = ()
    # Digest of the data set's description and of the user's files.
    files: str = ""


def settings_to_dict(settings: ExperimentSettings) -> dict[str, Any]:
    """Returns the settings for JSON, with a digest of the weights that all runs start from."""
    llm = settings.gguf or _shipped_weights("llm")
    return {
        **dataclasses.asdict(settings),
        "overrides": list(settings.overrides),
        "language": list(settings.language),
        "weights": file_digest(llm, _shipped_weights("vision")),
    }


def describe_settings(settings: ExperimentSettings) -> str:
    """Returns steps, questions and overrides in words."""
    descriptions = []
    for stage, step_count in (("stage 1", settings.stage1_steps), ("stage 2", settings.steps)):
        steps = "as many steps as its config has" if step_count is None else f"{step_count} steps"
        descriptions.append(f"{steps} of {stage}")

    descriptions.append(f"{settings.limit or 'all'} questions of a task")
    descriptions += [f"every training with `{flag}`" for flag in settings.overrides]
    return ", ".join(descriptions)


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Raises UserError, naming `path`, if reading it in the block shows that it is damaged."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--out: {path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"--out: {path} is damaged or of another kind ({type(error).__name__}: {error}); "
            f"remove {path.parent}"
        ) from error


@contextlib.contextmanager
def lock_directory(out: pathlib.Path, settings: ExperimentSettings) -> Iterator[None]:
    """Writes the settings to `out` and locks it against other experiments inside the context.

    Commands that this process starts inherit the lock, and hold it until they have ended.

    Raises:
      UserError: `out` has runs of other settings or of another base, or other files; another
        experiment is running in it; or it cannot be written.
    """
    files.check_writable(out, "--out")
    settings_file, lock_file = out / "settings.json", out / ".lock"
    has_settings = not out.exists() or settings_file.exists()
    # A lock file alone is from an experiment that had not written its settings yet.
    if not has_settings and any(path != lock_file for path in out.iterdir()):
        raise UserError(f"--out: {out} exists and is not the output of an experiment")

    out.mkdir(parents=True, exist_ok=True)
    with lock_file.open("a", encoding="utf-8") as lock:
        try:
            # The system releases the lock when the last process that has it open ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--out: another experiment is running in {out}") from error

        os.set_inheritable(lock.fileno(), True)

        _write_settings(settings_file, settings_to_dict(settings))
        yield


def _write_settings(path: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes the settings, or raises UserError if other ones have been written before."""
    if not path.exists():
        files.write_text(path, formatting.json_text(settings))
        return

    try:
        # dict() refuses a list or a number.
        written = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"--out: {path} is damaged: {error}; remove {path.parent}") from error

    # Paths may differ: the digests compare the contents.
    changed = [
        f"{key}: {written.get(key)!r} -> {value!r}"
        for key, value in settings.items()
        if written.get(key) != value and key not in ("gguf", "data")
    ]
    if changed:
        raise UserError(
            f"--out: {path.parent} has runs of other settings ({'; '.join(changed)}): give "
            "another --out, or remove it"
        )


@functools.cache
def file_digest(*paths: str) -> str:
    """Returns the first 16 digits of the SHA-256 of files, one after the other.

    Raises:
      UserError: one of them cannot be read.
    """
    checksum = hashlib.sha256()
    for path in map(pathlib.Path, paths):
        try:
            checksum.update(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error

    return checksum.hexdigest()[:16]


def _shipped_weights(part: str) -> str:
    return str(SHIPPED / part / "model.safetensors")
