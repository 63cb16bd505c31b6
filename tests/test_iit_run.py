"""IIT from benchmarks: a manifest is built and asked, from the command line."""

from __future__ import annotations

import json

import inference_cases as cases
import pytest
from benchmark_files import write_iit_data

from wings_jax import evaluate
from wings_jax.errors import UserError
from wings_jax.evaluation.interleaved import report


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_iit_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Writes a random small model with room for three questions."""
    return cases.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", positions=1024)


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["wings evaluate", *map(str, arguments)])
    evaluate.main()


@pytest.mark.parametrize("history", ["gold", "model", "shuffled"])
def test_whole_run(history, root, model, monkeypatch, tmp_path, capsys):
    path = tmp_path / "iit.jsonl"
    common = ["iit", "build", "--data-root", root, "--out", path, "--anchors", 2]
    run(monkeypatch, *common, "--sources", "piqa,openbookqa,gsm8k,nlvr", "--embedder", "tfidf")
    out = tmp_path / "out"
    asked = ["iit", "--manifest", path, "--data-root", root, "--checkpoint", f"m={model}"]
    asked += ["--out", out, "--history", history, "--protocols", "letter", "--batch-size", 4]
    run(monkeypatch, *asked)
    printed = capsys.readouterr().out
    for setting in ("(T)", "(T,T)", "(T,T,T)", "(T,T,V)", "(T,V)", "(V)"):
        assert setting in printed
    assert "(T,T,V) - (V)" in printed

    lines = [json.loads(line) for line in (out / "m" / f"iit_{history}.jsonl").open()]
    assert len(lines) == 4 * 3
    assert all(line["credit"]["letter"] in (0, 1) for line in lines)
    assert not any("error" in line["ll"] for line in lines)
    changes = report.compare_settings(lines)
    assert [change.task for change in changes] == [
        "(T,T) - (T)",
        "(T,T,T) - (T)",
        "(T,V) - (V)",
        "(T,T,V) - (V)",
    ]
    assert all(change.count == 2 for change in changes)


def test_flags_that_do_not_belong_together(monkeypatch, tmp_path):
    for arguments, expected in (
        (["iit", "build", "--out", "x"], "--data-root is missing"),
        (["iit", "build", "--data-root", tmp_path], "--out is missing"),
        (["iit", "--seed", "1", "--checkpoint", "x"], "--seed: is for `iit build` only"),
        (["iit", "--history", "gold", "--checkpoint", "x"], "--history: needs --manifest"),
        (["--manifest", "x", "--checkpoint", "x"], "--manifest: is for `iit`"),
        (["language", "build", "--checkpoint", "x"], "build: is for `iit` only"),
        (["iit", "build", "--checkpoint", "x", "--data-root", "x", "--out", "x"], "--checkpoint:"),
    ):
        with pytest.raises(UserError) as caught:
            run(monkeypatch, *arguments)
        assert expected in str(caught.value)
    with pytest.raises(UserError, match="--anchors: 'many' is not a number"):
        evaluate.parse_anchors("many")
