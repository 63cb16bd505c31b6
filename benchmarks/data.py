"""Samples per second of the data path alone, and of training.

    python benchmarks/data.py [--config=configs/stage2.py] [--steps=60] [--workdir=runs/stage2]

The second number is read from the workdir's metrics.jsonl where there is one.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
import time

import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone

from wings_jax import checkpoint
from wings_jax import config as config_lib
from wings_jax.training import start
from wings_jax.weights import starting

_CONFIG = flags.DEFINE_string("config", "configs/stage2.py", "A config file.")
_STEPS = flags.DEFINE_integer("steps", 60, "Batches to read.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/stage2", "A run with the same config.")


def main(_: list[str]) -> None:
    """Prints both rates and their ratio."""
    spec = importlib.util.spec_from_file_location("config", _CONFIG.value)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = config_lib.from_config_dict(module.get_config())

    arch = starting.resolve_arch(config.model)
    tokenizer = checkpoint.open_tokenizer(starting.tokenizer_files(config, None))
    loader = start.open_data(config, arch, tokenizer, pathlib.Path(_WORKDIR.value))

    # The first batches fill the buffers and are not timed.
    batches = loader.iterate()
    for _ in range(5):
        next(batches)
    began = time.perf_counter()
    for _ in range(_STEPS.value):
        next(batches)
    rate = _STEPS.value * config.batch_size / (time.perf_counter() - began)
    batches.close()
    print(f"data alone: {rate:,.0f} samples/s")

    lines = pathlib.Path(_WORKDIR.value, "metrics.jsonl")
    if lines.is_file():
        steps = [json.loads(line)["step_s"] for line in lines.read_text().splitlines()]
        used = config.batch_size / float(np.median(steps[len(steps) // 2 :]))
        print(f"training:   {used:,.0f} samples/s, {rate / used:.1f} times less")


if __name__ == "__main__":
    app.run(main)
