"""Trains a stage.

    python -m wings_jax.train --config=configs/stage1.py[:preset] [--config.key=value ...]
                              [--workdir=DIR] [--distributed] [--debug]

`--distributed` joins the other hosts of a TPU pod, a Slurm or an Open MPI job; without any of
these, set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
A run that was stopped goes on when the same command is given again. Its workdir holds
`config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at the end, `summary.json`.
"""

from __future__ import annotations

import os
import pathlib
import sys

import jax
from absl import flags
from ml_collections import config_flags

from wings_jax import cli, config_files, formatting
from wings_jax import config as config_lib
from wings_jax.analysis import shift_metric
from wings_jax.errors import UserError
from wings_jax.training import loop, start

_CONFIG = config_flags.DEFINE_config_file("config", None, "File, and after ':' its preset.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; the config's by default.")
_DISTRIBUTED = flags.DEFINE_boolean("distributed", False, "Join the other hosts of this job.")
flags.DEFINE_boolean("debug", False, "Show the traceback of a user's mistake.")


def parse(argv: list[str]) -> list[str]:
    """Reads the flags; an unknown key, preset or file is the user's mistake, told in one line."""
    try:
        rest = flags.FLAGS(config_files.resolve_flags(argv))
        if _CONFIG.value is not None:
            _CONFIG.value.to_dict()  # what a missing file raises is kept until it is looked at
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        told = str(error).strip()
        if "Traceback" in told:  # ml_collections hands on a whole one: its last line tells
            told = told.splitlines()[-1].partition(": ")[2]
        raise UserError(" ".join(told.split())) from error


def join() -> None:
    """Makes this process one of the job's; what JAX cannot find out is told by the environment."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        jax.distributed.initialize()
        return
    try:
        count, number = (int(os.environ[f"JAX_{n}"]) for n in ("NUM_PROCESSES", "PROCESS_ID"))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"--distributed: JAX_COORDINATOR_ADDRESS needs JAX_NUM_PROCESSES and JAX_PROCESS_ID "
            f"beside it, as numbers: {error}"
        ) from error
    jax.distributed.initialize(address, count, number)


def main() -> None:
    """Trains what the flags say, and prints where everything is."""
    rest = parse(sys.argv)[1:]
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag")
    if _CONFIG.value is None:
        raise UserError("--config is missing: for instance --config=configs/stage1.py")
    if _DISTRIBUTED.value:
        join()
    config = config_lib.from_config_dict(_CONFIG.value)
    workdir = _WORKDIR.value or config.workdir
    for key, place in (("--workdir", workdir), ("config.init_from", config.init_from)):
        if "://" in place:
            raise UserError(f"{key}: {place} is no folder; mount the bucket and name its folder")
    run = start.set_up(config, pathlib.Path(workdir))
    metric = None
    if config.laws_every:
        metric = shift_metric.make_metric(config, run.arch, run.tokenizer, run.mesh)
    with jax.set_mesh(run.mesh):
        summary = loop.train(run, metric)
    if "last_loss" in summary:
        print(
            f"{summary['steps']} steps in {formatting.format_duration(summary['seconds'])}, "
            f"loss {summary['last_loss']:.4f}, accuracy {summary['last_accuracy']:.3f}, "
            f"{summary['last_tokens_per_s']:,.0f} tokens/s"
        )
    print(f"checkpoint, metrics and summary: {run.workdir}")


if __name__ == "__main__":
    cli.run_main("wings_jax.train", main)
