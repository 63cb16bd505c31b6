"""A base of a few thousand parameters, a handful of scenes, and runs over them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import hf_directories
import jax
import tiny_model

from configs import stage1, stage2
from wings_jax import axes
from wings_jax import config as config_lib
from wings_jax.model import presets
from wings_jax.model.wings import Wings
from wings_jax.scenes import dataset
from wings_jax.training import loop, start
from wings_jax.weights import starting

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # `configs` is not in the installed package
    sys.path.insert(0, str(ROOT))

STAGES = {"stage1": stage1.get_config, "stage2": stage2.get_config}


@functools.cache
def folder(layers: int = 2) -> pathlib.Path:
    """Returns a directory with `llm` of so many layers, `vision` and `scenes`."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="wings-tests-"))
    tokenizer = starting.base_directory("tiny", "llm")
    vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]) + 3
    decoder = dataclasses.replace(
        tiny_model.DECODER, vocab_size=-(-vocabulary // 8) * 8, num_layers=layers
    )
    vision = dataclasses.replace(
        tiny_model.VISION, image_size=64, patch_size=16, num_layers=2, feature_layer=-1
    )
    params = tiny_model.init(Wings(presets.WingsArch(decoder, vision)), scale=0.05)
    hf_directories.save_llm(params["decoder"], decoder, root / "llm", tokenizer=tokenizer)
    hf_directories.save_vision(params["vision"], vision, root / "vision")
    dataset.write_scenes(root / "scenes", SETTINGS)
    return root


SETTINGS = dataset.SceneSettings(pictures=64, turns=2, replay=8, test_each=4)


def tree_of(stage: str, **changes) -> config_lib.Config:
    """Returns the tiny config configs/`stage`.py on the small base; `changes` dotted with `__`."""
    config = importlib.import_module(f"configs.{stage}").get_config()
    file = pathlib.Path(config.data.sources.scenes.path).name
    values = {
        "model__llm": str(folder() / "llm"),
        "model__vision": str(folder() / "vision"),
        "model__rank": 4,
        "data__scenes": "",
        "data__threads": 1,
        "data__sequence_length": 128,
        "data__sources__scenes__path": str(folder() / "scenes" / file),
        "data__sources__scenes__images": str(folder() / "scenes/images"),
        "batch_size": 8,
        "optimizer__name": "adamw",
        "steps": 5,
        "init_from": "",
        **changes,
    }
    with config.unlocked():
        for key, value in values.items():
            *path, leaf = key.split("__")
            functools.reduce(lambda node, name: node[name], path, config)[leaf] = value
        for group, rate in config.optimizer.learning_rates.items():
            config.optimizer.learning_rates[group] = 1e-3 if rate else 0.0
    return config


def run(
    workdir: pathlib.Path, stage: str = "stage2", *, devices: int = 1, **changes
) -> start.TrainingRun:
    """Trains and returns the finished run."""
    ready = set_up(workdir, stage, devices=devices, **changes)
    with jax.set_mesh(ready.mesh):
        loop.train(ready)
    return ready


def set_up(
    workdir: pathlib.Path, stage: str = "stage2", *, devices: int = 1, **changes
) -> start.TrainingRun:
    """Returns a run on the first `devices` devices."""
    config = config_lib.from_config_dict(tree_of(stage, **changes))
    with on_devices(devices):
        return start.set_up(config, workdir)


@contextlib.contextmanager
def on_devices(count: int) -> Iterator[None]:
    """Makes meshes of the first devices only, as long as it is entered."""
    make = axes.make_mesh
    axes.make_mesh = lambda shape: make(shape, jax.devices()[:count])
    try:
        yield
    finally:
        axes.make_mesh = make


def one_device(**variables: str) -> dict[str, str]:
    """Returns the environment of a child process that has one device, with these variables."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "host_platform_device_count" not in flag]
    return {**os.environ, "XLA_FLAGS": " ".join(kept), **variables}


def losses(workdir: pathlib.Path) -> list[float]:
    """Returns the loss of every step, as written."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def flat(ready: start.TrainingRun) -> dict:
    """Returns all parameters of a run on the host."""
    return {k: jax.device_get(v) for k, v in {**ready.state.frozen, **ready.state.trained}.items()}
