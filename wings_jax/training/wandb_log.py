"""Metrics in Weights & Biases, beside the files of the run: `config.wandb`, an optional package."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from wings_jax import config as config_lib
from wings_jax import files, serialization
from wings_jax.errors import UserError

RUN_FILE = "wandb.json"  # in the workdir: the run's id, so that a resumed run continues it


def check_installed() -> None:
    """Raises UserError if the package is not installed."""
    # A directory `wandb` of an earlier run in the current one is not the package.
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:
        raise UserError("config.wandb: needs the package wandb: pip install 'wings_jax[wandb]'")


class WandbLog:
    """Sends the scalars of each step to a project, or stores them with WANDB_MODE=offline.

    Everything that the package itself reads (WANDB_API_KEY, WANDB_MODE, WANDB_ENTITY, ...) works.
    Its files are in WORKDIR/wandb, or in ./wandb if the workdir is in a bucket.

    Args:
      workdir: of the run; its name is the name of the run in the project.
      config: of the run; its leaves are the run's config.

    Raises:
      UserError: the package refuses the run, for instance without an API key.
    """

    def __init__(self, workdir: pathlib.Path, config: config_lib.Config):
        check_installed()
        import wandb  # optional, and takes a second

        path = workdir / RUN_FILE
        if not path.exists():
            files.write_json(path, {"id": uuid.uuid4().hex})
        run_id = json.loads(path.read_text(encoding="utf-8"))["id"]

        try:
            self._run: Any = wandb.init(
                project=config.wandb,
                id=run_id,
                resume="allow",
                name=workdir.name,
                dir=None if files.is_url(workdir) else os.fspath(workdir),
                config=serialization.flatten(serialization.to_dict(config)),
            )
        except wandb.errors.Error as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"config.wandb: {config.wandb}: {reason[:300]}") from error

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs the scalars of a step. Of a resumed run, steps that are there already stay."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Waits until everything is sent or stored."""
        self._run.finish()
