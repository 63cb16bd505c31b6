"""A run saved by version 0.1.0 still loads, answers and resumes.

`old_checkpoint.tar.xz` holds a workdir of that version with its tokenizer, data and config files:
stage 2 of a model of a few thousand parameters after 2 of 3 steps, saved with the keys `keep`,
`optimizer.kind`, `optimizer.clip` and `Semantics.lone_weight`. `expected.json` in it has what
that version computed: losses, sums of the final parameters and greedy tokens.
"""

from __future__ import annotations

import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest
import training_cases as cases

from wings_jax import checkpoint, serialization
from wings_jax import config as config_lib
from wings_jax.inference.generator import Generator
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model import presets
from wings_jax.training import arguments, loop, start

ARCHIVE = pathlib.Path(__file__).with_name("old_checkpoint.tar.xz")


@pytest.fixture
def expected(tmp_path, monkeypatch):
    """Unpacks the archive into the current directory, a new one, and returns what is expected."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return json.loads((tmp_path / "expected.json").read_text())


def test_old_checkpoint_loads(expected, caplog):
    serialization._warn_renamed.cache_clear()
    loaded = checkpoint.load("run")
    assert loaded.config.max_checkpoints == 3
    assert loaded.config.optimizer.name == "adamw"
    assert loaded.config.optimizer.max_grad_norm == 0.5
    assert loaded.arch.semantics == presets.PAPER
    warned = {line.split()[3]: line.split()[7].rstrip(";") for line in caplog.messages}
    assert warned == {"keep": "max_checkpoints", "kind": "name", "clip": "max_grad_norm"}


def test_old_checkpoint_generates_the_same_tokens(expected):
    loaded = checkpoint.load("run")
    sampling = SamplingParams(max_new_tokens=8)
    generator = Generator(
        loaded.arch, loaded.params, loaded.tokenizer, "chatml", rows=1, sampling=sampling
    )
    requests = [Request("What is 1?"), Request("What is 3?", ["image.png"])]
    answers = [list(map(int, answer.tokens)) for answer in generator.generate(requests)]
    assert answers == expected["greedy"]


def test_old_run_resumes_to_the_same_parameters(expected, capsys):
    config = config_lib.from_config_dict(arguments.parse(["--config=run/config.json"]).config)
    with cases.on_devices(1):
        run = start.set_up(config, pathlib.Path("run"))
    with jax.set_mesh(run.mesh):
        loop.train(run)
    assert "resuming from step 2, " in capsys.readouterr().out
    assert cases.losses(pathlib.Path("run")) == pytest.approx(expected["losses"], rel=1e-6)
    sums = {path: np.abs(value).sum() for path, value in cases.flat(run).items()}
    assert sums == pytest.approx(expected["sums"], rel=1e-5)
