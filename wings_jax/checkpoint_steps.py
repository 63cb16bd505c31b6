"""The steps of a workdir, WORKDIR/checkpoints/STEP: how they are found, and damaged ones.

Wherever a checkpoint is asked for, a workdir means its newest step, and the directory of a step
means that step. A damaged step is a `DamagedCheckpointError`, which names the step before it. The
arrays and JSON of a step are read by `checkpoint.py`.
"""

from __future__ import annotations

import functools
import logging
import pathlib
import re
import sys
from typing import Any

from wings_jax import files
from wings_jax.errors import UserError

SUBDIRECTORY = "checkpoints"
COMMITTED = "commit_success.txt"  # the file that orbax writes into a step at the end
# Files that hold weights in other formats, which have to be imported first.
OTHER_FORMATS = (".safetensors", ".bin", ".pth", ".gguf")


def _number(step: pathlib.Path) -> int:
    return int(step.name) if step.name.isdigit() else -1


class DamagedCheckpointError(UserError):
    """A step that cannot be read, or whose values are not those that were saved."""

    def __init__(self, step: pathlib.Path, reason: str):
        """The message names the step before, if there is one."""
        steps = list_steps(step.parent.parent)
        before = [other for other in steps if _number(other) < _number(step)]
        advice = f"the one before is {before[-1]}" if before else "there is none before it"
        super().__init__(f"{step}: the checkpoint is damaged ({reason}); {advice}")
        self.step, self.reason = step, reason


class ReadErrors:
    """Context manager: what cannot be read is a DamagedCheckpointError of this step."""

    def __init__(self, step: pathlib.Path):
        self._step = step

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if kind is None or isinstance(error, UserError):
            return

        # For an array that cannot be decoded, orbax raises `Exception` itself; JSON with other keys
        # becomes objects without the attributes that it takes.
        expected: tuple[type[BaseException], ...] = (OSError, ValueError, KeyError)
        if _is_of_orbax(error):
            expected = (*expected, AttributeError, TypeError)
        if kind is Exception or issubclass(kind, expected):
            _silence_failed_reads()
            lines = str(error).partition(". See ")[0].splitlines() or [kind.__name__]
            raise DamagedCheckpointError(self._step, f"cannot be read: {lines[0][:200]}") from error


def _is_of_orbax(error: BaseException | None) -> bool:
    """Returns whether orbax raised an error itself, not code that it calls or that calls it."""
    frame = error.__traceback__ if error else None
    while frame and frame.tb_next:
        frame = frame.tb_next
    return frame is not None and "orbax" in pathlib.Path(frame.tb_frame.f_code.co_filename).parts


@functools.cache  # once per process
def _silence_failed_reads() -> None:
    """Hides what is printed of a failed read beside the error that it raises.

    The reads of the other arrays fail after it, or are never awaited: orbax does not take their
    errors, and Python then prints a traceback for each.
    """
    never_retrieved = "exception was never retrieved"
    logging.getLogger("asyncio").addFilter(
        lambda record: never_retrieved not in record.getMessage()
    )
    show_unraisable = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith("Encountered error while reading array"):
            show_unraisable(unraisable)

    sys.unraisablehook = hook


def list_steps(workdir: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns the directories of a workdir's steps, oldest first, without unfinished saves."""
    directory = files.absolute_path(workdir) / SUBDIRECTORY
    entries = directory.iterdir() if directory.is_dir() else ()
    steps = [entry for entry in entries if entry.name.isdigit()]

    # On a disk an unfinished save has another name; a bucket has no renaming, but this last file.
    if files.is_url(workdir):
        steps = [step for step in steps if (step / COMMITTED).exists()]
    return sorted(steps, key=_number)


def newest_step(directory: str | pathlib.Path) -> pathlib.Path | None:
    """Returns the newest step of a workdir, or `directory` itself if it is a step.

    Raises:
      DamagedCheckpointError: the newest step is not complete.
    """
    path = files.absolute_path(directory)
    if (path / "params").is_dir() and (path / "meta").is_dir():
        return path

    # Not a step, so a workdir.
    steps = list_steps(path)
    if not steps:
        return None
    check_complete(steps[-1])
    return steps[-1]


def check_complete(step: pathlib.Path) -> None:
    """Raises DamagedCheckpointError if an item that every checkpoint has does not exist."""
    for item in ("params", "meta", "tokenizer"):
        if not (step / item).is_dir():
            raise DamagedCheckpointError(step, f"{item} does not exist")


def find_step(directory: str | pathlib.Path, *, flag: str) -> pathlib.Path:
    """Returns `newest_step(directory)`. Raises UserError naming `flag` when there is none."""
    files.check_bucket(directory, flag)
    step = newest_step(directory)
    if step is not None:
        return step

    # A directory of weights in another format, or a name on the hub, gets a hint.
    path = files.absolute_path(directory)
    entries = [path] if path.is_file() else list(path.iterdir()) if path.is_dir() else []
    hint = ""
    if any(entry.suffix in OTHER_FORMATS for entry in entries):
        hint = " of wings_jax; import it first: python -m wings_jax.convert import"
    elif not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(directory)):
        command = f"python -m wings_jax.convert import --llm {directory} --out DIR"
        hint = f"; if it is on the Hugging Face hub, import it first: {command} (or --wings)"
    raise UserError(f"{flag}: {directory} holds no checkpoint{hint}")
