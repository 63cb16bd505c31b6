"""Which run a workdir belongs to: the config in `WORKDIR/config.json`."""

from __future__ import annotations

import json
import os
import pathlib

import jax

from wings_jax import checkpoint, files
from wings_jax import config as config_lib
from wings_jax.errors import UserError

CONFIG_FILE = "config.json"


def check_workdir(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Checks that a workdir can be written and has no checkpoint of another config.

    A workdir without a checkpoint has nothing to lose: its config may differ.

    Raises:
      UserError: naming `--workdir`, and every key that differs with both values.
    """
    files.check_writable(workdir, "--workdir")
    checkpoints = workdir / checkpoint.SUBDIRECTORY
    if checkpoints.exists() and not (checkpoints.is_dir() and os.access(checkpoints, os.W_OK)):
        raise UserError(f"--workdir: {checkpoints} is not a directory that can be written to")

    path = workdir / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else None
    except OSError as error:
        raise UserError(f"--workdir: cannot read {path}: {error.strerror}") from error
    if text is None or checkpoint.newest_step(workdir) is None:
        return

    earlier = config_lib.from_dict(config_lib.Config, json.loads(text), str(path))
    changed = config_lib.differences(earlier, config)
    if changed:
        raise UserError(
            f"--workdir: {workdir} holds a run of another config ({'; '.join(changed[:4])}): "
            "give another --workdir, or remove it"
        )


def claim_workdir(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Creates the workdir and writes the config into it, on the first host."""
    if jax.process_index():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir: cannot write to {workdir}: {error.strerror}") from error
    files.write_json(workdir / CONFIG_FILE, config_lib.to_dict(config))
