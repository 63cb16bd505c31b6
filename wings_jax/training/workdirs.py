"""Which run a workdir belongs to: its config, its data, and its steps.

config.json   the config
data.json     path and digest of every data file
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from wings_jax import checkpoint, files, serialization
from wings_jax import config as config_lib
from wings_jax.data import settings
from wings_jax.errors import UserError

CONFIG_FILE, DATA_FILE = "config.json", "data.json"


def list_steps(workdir: pathlib.Path, damaged: Sequence[pathlib.Path] = ()) -> list[pathlib.Path]:
    """Returns the steps that a run can be resumed from, oldest first; `damaged` ones left out."""
    return [step for step in checkpoint.list_steps(workdir) if step not in damaged]


def set_aside(damaged: Sequence[pathlib.Path]) -> None:
    """Renames damaged steps to STEP.damaged, so that the resumed run can save them again."""
    # One host renames, and the others wait for it.
    if jax.process_index() == 0:
        for step in damaged:
            step.rename(step.with_name(f"{step.name}.damaged"))

    if damaged and jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged")


def check_workdir(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Checks that a workdir can be written and has no checkpoint of another config or other data.

    A workdir without a checkpoint has nothing to lose: its config may differ.

    Raises:
      UserError: naming `--workdir`, and every key that differs with both values.
    """
    files.check_writable(workdir, "--workdir")
    checkpoints = workdir / checkpoint.SUBDIRECTORY
    is_local = not files.is_url(workdir)
    if is_local and checkpoints.exists() and not _is_writable_directory(checkpoints):
        raise UserError(f"--workdir: {checkpoints} is not a directory that can be written to")

    # Read in any case: a file that cannot be read cannot be replaced either.
    earlier_config = _read_json(workdir / CONFIG_FILE)
    earlier_data = _read_json(workdir / DATA_FILE)
    if not checkpoint.list_steps(workdir):
        return

    # Only keys that change the numbers of the run matter.
    if earlier_config is not None:
        key = str(workdir / CONFIG_FILE)
        earlier = serialization.from_dict(config_lib.Config, earlier_config, key)
        changed = config_lib.differences(earlier, config)
        if changed:
            raise UserError(
                f"--workdir: {workdir} holds a run of another config ({'; '.join(changed[:4])}): "
                "give another --workdir, or remove it"
            )

    # Content counts, not where the files are.
    if earlier_data is not None and not config.accept_changed_data:
        _check_data(earlier_data, fingerprint_data(config.data))


def _is_writable_directory(path: pathlib.Path) -> bool:
    return path.is_dir() and os.access(path, os.W_OK)


def _read_json(path: pathlib.Path) -> Any:
    """Returns what a file of the workdir holds; None if it does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except OSError as error:
        raise UserError(f"--workdir: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--workdir: {path} is not JSON: {error}") from error


def fingerprint_data(data: settings.DataConfig) -> dict[str, dict[str, str]]:
    """Returns path and digest of every source, by name.

    The digest is of a file's content, or of the names and sizes of a directory's files and the
    content of its notes. Copied or moved files keep theirs; images have no part in it.
    """
    fingerprints = {}
    for name, source in data.sources.items():
        path = files.absolute_path(source.path)
        fingerprints[name] = {"path": str(path), "digest": _digest(path)}
    return fingerprints


def _digest(path: pathlib.Path) -> str:
    """Returns a short hash of a file or directory; '' if it cannot be read."""
    digest = hashlib.blake2b(digest_size=8)

    try:
        if not path.is_dir():
            with path.open("rb") as file:
                return hashlib.file_digest(file, lambda: digest).hexdigest()

        # Names and sizes of a directory's files; content of its notes only.
        for file_path in files.list_files(path):
            digest.update(f"{file_path.relative_to(path)} {files.size_of(file_path)}\n".encode())
            if file_path.suffix == ".json":
                digest.update(file_path.read_bytes())
    except OSError:  # opening the data reports it, by name
        return ""

    return digest.hexdigest()


def _check_data(
    earlier: Mapping[str, Mapping[str, str]], current: Mapping[str, Mapping[str, str]]
) -> None:
    """Raises UserError naming the first source whose content is not what the run started with."""
    for name in sorted(earlier.keys() & current.keys()):
        # Sources are compared by name; a new one is a change of the config.
        before, now = earlier[name], current[name]
        if before["digest"] != now["digest"]:
            raise UserError(
                f"config.data.sources.{name}: {now['path']} (digest {now['digest']}) is not the "
                f"data that the run started with, {before['path']} (digest {before['digest']}): "
                "restore it, give another --workdir, or continue with "
                "--config.accept_changed_data=true"
            )


def claim_workdir(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Creates the workdir and writes the config and the data's digests, on the first host."""
    if jax.process_index():
        return

    try:
        if not files.is_url(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir: cannot write to {workdir}: {error.strerror}") from error

    files.write_json(workdir / CONFIG_FILE, serialization.to_dict(config))
    files.write_json(workdir / DATA_FILE, fingerprint_data(config.data))
