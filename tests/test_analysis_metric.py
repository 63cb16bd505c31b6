"""Attention shift as a metric of training."""

from __future__ import annotations

import dataclasses
import json
import sys

import hf_directories
import jax
import numpy as np
import pytest
import tiny_model
import training_cases
from absl import flags as absl_flags

from wings_jax import checkpoint, cli, errors, train
from wings_jax.analysis import laws, probes, shift_metric
from wings_jax.analysis.probes import Variant
from wings_jax.analysis.slot_classes import CLASSES, GROUPS
from wings_jax.model import hf_config, presets
from wings_jax.model.wings import Wings

IMAGE, ALL = CLASSES.index("image"), GROUPS.index("all")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A base like that of the training tests, with a layer more."""
    smaller = training_cases.folder() / "llm"
    shape = hf_config.decoder_from_hf(json.loads((smaller / "config.json").read_text()))
    shape = dataclasses.replace(shape, num_layers=3)
    params = tiny_model.init(Wings(presets.WingsArch(shape, tiny_model.VISION)), scale=0.05)
    path = tmp_path_factory.mktemp("base") / "llm"
    hf_directories.save_llm(params["decoder"], shape, path, tokenizer=smaller)
    return path


def run_train(monkeypatch, workdir, llm, **changes: object) -> list[dict]:
    """Trains stage 2 by its command on all devices and returns the lines of its metrics."""
    values = {
        "model.llm": llm,
        "model.vision": training_cases.folder() / "vision",
        "data.scenes": "",
        "data.sources.scenes.path": training_cases.folder() / "scenes/train_stage2.json",
        "data.sources.scenes.images": training_cases.folder() / "scenes/images",
        "init_from": "",
        "batch_size": 8,
        "steps": 5,
        **changes,
    }
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    stage = f"--config={training_cases.ROOT}/configs/stage2.py"
    monkeypatch.setattr(sys, "argv", ["train", stage, *arguments, f"--workdir={workdir}"])
    absl_flags.FLAGS.unparse_flags()
    for name in list(absl_flags.FLAGS):
        if name.startswith("config."):  # the overrides that an earlier command defined
            delattr(absl_flags.FLAGS, name)
    cli.run_main("wings_jax.train", train.main)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metric_logs_the_shift_and_leaves_training_unchanged(llm, tmp_path, monkeypatch):
    unmeasured = run_train(monkeypatch, tmp_path / "unmeasured", llm)
    measured = run_train(monkeypatch, tmp_path / "measured", llm, laws_every=2)
    for name in ("loss", "grad_norm", "accuracy"):
        assert [line[name] for line in measured] == [line[name] for line in unmeasured]
    expected, actual = (checkpoint.load(tmp_path / name) for name in ("unmeasured", "measured"))
    jax.tree.map(np.testing.assert_array_equal, actual.params, expected.params)
    scalars = {"laws/before", "laws/image", "laws/after", "laws/shift", "laws/shift_after"}
    assert [scalars <= set(line) for line in measured] == [True, True, False, True, True]
    assert not any(scalars & set(line) for line in unmeasured)
    recipe = probes.make_recipe(
        actual.config, actual.arch, actual.tokenizer, shift_metric.MAX_SLOTS
    )
    probe_list, _ = probes.read_probes(
        probes.embedded_samples(shift_metric.NUM_PROBES), recipe, Variant()
    )
    model, batches = Wings(actual.arch), probes.batch_probes(probe_list, recipe, 5)
    curves = laws.measure_batches(model, actual.params, batches).masses[:, :, ALL]
    assert measured[-1]["laws/shift"] == pytest.approx(
        laws.attention_shift(curves).mean(), abs=1e-3
    )
    assert measured[-1]["laws/image"] == pytest.approx(curves[..., IMAGE].mean(), abs=1e-5)


def test_metric_needs_three_layers(tmp_path):
    ready = training_cases.set_up(tmp_path / "run", laws_every=2)
    with pytest.raises(errors.UserError, match=r"config\.laws_every: the model has 2 layers"):
        shift_metric.make_metric(ready.config, ready.arch, ready.tokenizer, ready.mesh)
