"""Mistakes of users of `wings_jax.analyze laws`: one line, and nothing is written."""

from __future__ import annotations

import json

import analysis_cases
import pytest
import tiny_data
from analysis_cases import LONG, run_analyze
from PIL import Image

from wings_jax.analysis import probes, scores
from wings_jax.errors import UserError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return analysis_cases.write_model(tmp_path_factory.mktemp("run") / "random")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--checkpoint", "no/such"], "--checkpoint: no/such holds no checkpoint"),
        (["--checkpoint", "RUN", "RUN"], "two models have the name 'random'"),
        (["--checkpoint", "SHORT"], "--checkpoint other: the model has 2 layers"),
        (
            ["--checkpoint", "RUN", "--data", "TEXT"],
            "text.json: no sample can be measured: 1 x text",
        ),
        (["--checkpoint", "RUN", "--data", "no.json"], "data file no.json does not exist"),
        (["--checkpoint", "RUN", "--data", "BROKEN"], "broken.json, line 1, column 2"),
        (["--checkpoint", "RUN", "--images", "x"], "--images: goes with --data"),
        (["--checkpoint", "RUN", "--limit", "0"], "--limit: 0 is less than 1"),
        (["--checkpoint", "RUN", "--longest", "8"], "128 x too long"),
        (["--checkpoint", "RUN", "--scores", "no.json"], "--scores: no.json: No such file"),
        (["--checkpoint", "RUN", "--scores", "TEXT"], "is not a report of wings_jax.evaluate"),
        (["--checkpoint", "RUN", "--scores", "OTHER"], "is not a report of wings_jax.evaluate"),
        (["--checkpoint", "RUN", "--scores", "x=REPORT"], "has no model called 'x'"),
        (["--checkpoint", "RUN", "--scores", "REPORT"], "m has no score 'scenes_text/all text'"),
        (["--checkpoint", "RUN", "--mesh", "data"], "--mesh: 'data' is not AXIS=SIZE"),
        (["--checkpoint", "RUN", "--mesh", "data=3"], "mesh"),
        (["--checkpoint", "RUN", "--mesh", "data=1,tensor=8"], "tensor"),
        (["--checkpoint", "RUN", "--base", "no/such"], "--base: no/such"),
        (["--checkpoint", "RUN", "--base", "random=SHORT"], "two models have the name"),
        (["--checkpoint", "RUN", "--data", "a\udcff.json"], "--data: 'a\\udcff.json' is not UTF-8"),
        (["--checkpoint", "\udcff"], "--checkpoint: '\\udcff' is not UTF-8"),
        (["--checkpoint", "RUN", "--out", "TEXT"], "--out: cannot write to"),
    ],
)
def test_user_errors_are_one_line(workdir, tmp_path, monkeypatch, capsys, given, message):
    (tmp_path / "broken.json").write_text("[x")
    turns = tiny_data.turns(LONG, "yes")
    known = {
        "RUN": workdir,
        "OTHER": tiny_data.write_json(tmp_path / "other.json", {"models": [{"name": "m"}]}),
        "SHORT": workdir.with_name("other"),
        "BROKEN": tmp_path / "broken.json",
        "TEXT": tiny_data.write_json(tmp_path / "text.json", [{"conversations": turns}]),
        "REPORT": tiny_data.write_json(
            tmp_path / "report.json", {"models": [{"name": n, "tasks": {}} for n in "mn"]}
        ),
    }
    given = [str(known.get(flag, flag)) for flag in given]
    for name in ("REPORT", "SHORT"):
        given = [flag.replace(f"={name}", f"={known[name]}") for flag in given]
    out = [] if "--out" in given else ["--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as caught:
        run_analyze(monkeypatch, *given, *out)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


# --- files in other encodings, and values of other kinds ---------------------------------------


def report_of(**score: object) -> dict:
    rows = {"all text": {"accuracy": 0.5, "interval95": [0.4, 0.6], **score}}
    return {"models": [{"name": "random", "tasks": {"scenes_text": rows}}]}


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe{}",
        "{'a'}".encode("latin-1"),
        b"[]",
        b"7",
        b"null",
        b'{"models": 7}',
        b'{"models": [7]}',
        b'{"models": [{"name": "random", "tasks": 7}]}',
        b'{"models": [{"name": "random", "tasks": {"scenes_text": 7}}]}',
        b"[" * 100_000,
        json.dumps(report_of(accuracy=None)).encode(),
        json.dumps(report_of(accuracy="half")).encode(),
        json.dumps(report_of(interval95=None)).encode(),
        json.dumps(report_of(interval95=[0.4])).encode(),
        json.dumps(report_of(interval95=[0.4, "x"])).encode(),
        json.dumps(report_of(interval95=[0.4, float("nan")])).encode(),
    ],
)
def test_scores_of_another_format_are_refused(tmp_path, content):
    file = tmp_path / "report.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"report\.json is not a report of wings_jax\.evaluate"):
        scores.read_scores([str(file)], "scenes_text/all text")


def test_scores_with_a_byte_order_mark_are_read(tmp_path):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report_of()), encoding="utf-8-sig")
    expected = {"random": (50.0, 40.0, 60.0)}
    assert scores.read_scores([str(file)], "scenes_text/all text") == expected


@pytest.mark.parametrize(("name", "reason"), [("x\0y", "null"), ("x" * 300, "too long")])
def test_scores_at_an_impossible_path_are_refused(name, reason):
    with pytest.raises(UserError, match=f"(?i)--scores: .*{reason}"):
        scores.read_scores([name], "scenes_text/all text")


def write_records(tmp_path, *records: dict):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    return tiny_data.write_json(tmp_path / "data.json", records)


def record(**changes: object) -> dict:
    turns = tiny_data.turns(LONG, "yes", f"<image>\n{LONG}", "no")
    return {"id": "good", "image": "a.png", "conversations": turns, **changes}


def test_data_with_a_byte_order_mark_are_measured(workdir, tmp_path, monkeypatch):
    file = write_records(tmp_path, record())
    file.write_text(file.read_text(), encoding="utf-8-sig")
    run_analyze(monkeypatch, "--checkpoint", workdir, "--data", file, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "laws.jsonl").read_text().count("\n") == 1


def test_bad_records_never_end_the_analysis(workdir, tmp_path, monkeypatch, capsys):
    bad = [
        record(id="\ud800"),
        record(image="a\0.png"),
        record(image="\ud800.png"),
        record(image=7),
        record(conversations=None),
        record(conversations=[{"from": "human", "value": "\ud800"}]),
        record(conversations=[{"from": "human", "value": None}]),
    ]
    file = tmp_path / "data.json"
    write_records(tmp_path)
    file.write_text(json.dumps([*bad, record()]))  # lone surrogates as \ud800
    run_analyze(monkeypatch, "--checkpoint", workdir, "--data", file, "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "laws_summary.json").read_text())
    (model,) = summary["models"]
    assert model["n_used"] + model["n_skipped"] == len(bad) + 1
    assert model["n_used"] >= 1
    assert "samples are skipped" in capsys.readouterr().out


def test_latin1_data_are_refused(workdir, tmp_path, monkeypatch, capsys):
    file = tmp_path / "data.json"
    file.write_bytes('[{"id": "é"}]'.encode("latin-1"))
    with pytest.raises(SystemExit) as caught:
        run_analyze(monkeypatch, "--checkpoint", workdir, "--data", file, "--out", tmp_path / "out")
    assert caught.value.code == 2
    assert "UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("parts", [("decoder",), ("vision", "decoder")])
def test_model_without_a_tower_or_projector_is_refused(tmp_path, monkeypatch, capsys, parts):
    model = analysis_cases.write_model(tmp_path / "llm", parts=parts)
    with pytest.raises(SystemExit) as caught:
        run_analyze(monkeypatch, "--checkpoint", model, "--out", tmp_path / "out")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--checkpoint llm: the model has no " in line


def test_batch_size_beyond_the_samples_adds_no_padding_rows(workdir, tmp_path, monkeypatch):
    rows = []
    batch_probes = probes.batch_probes

    def spy(probe_list, recipe, batch_size):
        rows.append(batch_size)
        return batch_probes(probe_list, recipe, batch_size)

    monkeypatch.setattr(probes, "batch_probes", spy)
    given = ("--checkpoint", workdir, "--limit", 3, "--batch-size", 10**9)
    run_analyze(monkeypatch, *given, "--out", tmp_path / "out")
    assert rows == [3]
