"""The recipe "Wings for an existing LLaVA" on a tiny one, and a start from another LLM or tower."""

from __future__ import annotations

import pathlib
import re

import llava_cases
import numpy as np
import pytest
import training_cases as cases
import weights_cases

import wings_jax
from wings_jax import checkpoint, tree
from wings_jax.errors import UserError
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams

FROM_CHECKPOINT = {"model__llm": "checkpoint", "model__vision": "checkpoint"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    """An imported LLaVA."""
    out = tmp_path_factory.mktemp("llava") / "base"
    weights_cases.run("import", "--llava", llava_cases.saved("llama_clip"), "--out", out)
    return out


def test_a_llava_gets_wings(base, tmp_path, capsys):
    """Both stages, an answer, and the formats that can hold the result."""
    options = {**FROM_CHECKPOINT, "data__sequence_length": 256, "steps": 1}
    cases.run(tmp_path / "stage1", "stage1", init_from=str(base), **options)
    cases.run(tmp_path / "stage2", "stage2", init_from=str(tmp_path / "stage1"), **options)

    before, after = checkpoint.load(base), checkpoint.load(tmp_path / "stage1")
    assert after.arch.decoder == before.arch.decoder
    assert after.arch.vision == before.arch.vision
    assert after.arch.learners == ("visual",)
    flat = tree.flatten(after.params)
    for path, array in tree.flatten(before.params).items():
        if not path.startswith("projector/"):
            np.testing.assert_array_equal(flat[path], array)

    model = wings_jax.load(tmp_path / "stage2")
    turns = [{"from": "human", "value": "<image>\nWhat is red?"}]
    image = np.zeros((20, 30, 3), np.uint8)
    assert model.generate(Request(turns, (image,), SamplingParams(max_new_tokens=2))).tokens

    capsys.readouterr()
    flags = ("--checkpoint", tmp_path / "stage2", "--format", "llava", "--out", tmp_path / "hf")
    with pytest.raises(SystemExit):
        weights_cases.run("export", *flags)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"no place for learners .*--format transformers or wings", line)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "config.model.llm: decoder ffn_size differs from the checkpoint's (48 -> 64), "),
        (
            {"model__llm": "checkpoint"},
            "config.model.vision: vision activation differs from the checkpoint's (quick_gelu -> ",
        ),
    ],
)
def test_another_llm_or_tower_than_the_checkpoints_is_named(base, changes, message, tmp_path):
    """Both values, and what to do; nothing is written."""
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        cases.set_up(tmp_path / "run", "stage1", init_from=str(base), **changes)
    assert "=checkpoint takes the checkpoint's own" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_checkpoints_llm_needs_a_checkpoint(tmp_path):
    message = "config.model.llm: 'checkpoint' is that of config.init_from: give --config.init_from"
    with pytest.raises(UserError, match=re.escape(message)):
        cases.set_up(tmp_path / "run", "stage1", **FROM_CHECKPOINT)
