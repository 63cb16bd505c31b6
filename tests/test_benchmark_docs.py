"""The table of data sets in docs/evaluation.md is equal to the declarations."""

from __future__ import annotations

import pathlib
import tomllib

import pytest

from wings_jax.evaluation.benchmarks import catalog
from wings_jax.evaluation.benchmarks.record import PROTOCOLS
from wings_jax.evaluation.benchmarks.records import BENCHMARKS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_documented(name):
    benchmark = BENCHMARKS[name]
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    assert f"| {benchmark.source} | {benchmark.license} |" in row
    assert f"| {benchmark.headline}, {benchmark.shots.count} shots" in row
    for pattern in benchmark.files:
        assert pattern.form in row or pattern.split != benchmark.split
    assert benchmark.notes in PAGE
    assert name in catalog.text_catalog()


def test_protocols_and_the_suite_are_documented():
    for protocol in PROTOCOLS:
        assert f"`{protocol}`" in PAGE
    assert len(catalog.find_suite("wings")) == 24


def test_the_entry_point_of_lm_eval_names_a_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["wings"].partition(":")
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert f'@register_model("wings")\nclass {name}(' in source
    assert "lm-eval" in project["optional-dependencies"]
