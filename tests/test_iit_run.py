"""Small models asked from the command line: manifests of IIT, open questions of MMMU."""

from __future__ import annotations

import json

import inference_cases as cases
import pytest
from benchmark_files import png, write_iit_data, write_parquet

from wings_jax import evaluate
from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import runner
from wings_jax.evaluation.interleaved import report


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_iit_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Writes a random small model with positions for three questions."""
    return cases.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", positions=1024)


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["wings evaluate", *map(str, arguments)])
    evaluate.main()


@pytest.mark.parametrize("history", ["gold", "model"])
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


def test_a_text_only_model_is_refused_before_it_answers_anything(root, monkeypatch, tmp_path):
    text_only = cases.write_checkpoint(tmp_path / "llm", parts=("decoder",), positions=1024)
    path = tmp_path / "iit.jsonl"
    common = ["iit", "build", "--data-root", root, "--out", path, "--anchors", 2]
    run(monkeypatch, *common, "--sources", "piqa,openbookqa,gsm8k,nlvr", "--embedder", "tfidf")

    def refuse(*args, **options):
        raise AssertionError("an answer was computed")

    monkeypatch.setattr(runner, "run_task", refuse)
    asked = ["iit", "--manifest", path, "--data-root", root, "--checkpoint", text_only]
    with pytest.raises(UserError, match="items have images, and the model llm is text-only"):
        run(monkeypatch, *asked, "--history", "model")


def test_open_questions_are_generated_and_not_compared(model, monkeypatch, tmp_path):
    """MMMU has questions without options, which a likelihood protocol leaves out."""
    rows = [
        {
            "id": f"validation_Math_{number}",
            "question": "<image 1> Red?",
            "options": str(options),
            "answer": answer,
            "image_1": {"bytes": png(), "path": "x.png"},
        }
        for number, (options, answer) in enumerate(((["yes", "no"], "A"), ([], "['4', 'four']")))
    ]
    write_parquet(tmp_path, "MMMU/Math/validation-0.parquet", rows)
    out = tmp_path / "out"
    asked = ["--tasks", "mmmu", "--data-root", tmp_path, "--checkpoint", f"m={model}", "--out", out]
    run(monkeypatch, *asked, "--protocols", "letter,generate", "--batch-size", 4)
    lines = [json.loads(line) for line in (out / "m" / "mmmu.jsonl").open()]
    assert lines[0]["credit"]["letter"] in (0, 1)
    assert lines[1]["credit"]["letter"] is None
    assert lines[1]["credit"]["generate"] == 0
    scores = json.loads((out / "m" / "mmmu.json").read_text())["scores"]
    assert (scores["letter"]["micro"]["n"], scores["generate"]["micro"]["n"]) == (1, 2)


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
