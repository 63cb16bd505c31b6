"""Runs of benchmarks: protocols, resuming, parts, comparison, and the mistakes of users."""

from __future__ import annotations

import json
import math

import inference_cases as cases
import numpy as np
import pytest
from benchmark_runs import SUBJECTS, contents, run, write_data
from language_cases import naive_nats

from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import (
    command,
    journals,
    paired,
    readers,
    runner,
)
from wings_jax.evaluation.benchmarks.options import BenchmarkOptions
from wings_jax.evaluation.benchmarks.record import Item
from wings_jax.evaluation.benchmarks.records import BENCHMARKS
from wings_jax.inference import jobs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return cases.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def run_mmlu(monkeypatch, root, checkpoint, out, *more: object) -> None:
    common = ["--tasks", "mmlu", "--data-root", root, "--out", out, "--shots", 2]
    common += ["--batch-size", 4, "--protocols", "ppl,ll,ll_bytes,letter"]
    run(monkeypatch, "--checkpoint", f"m={checkpoint}", *common, *more)


@pytest.fixture(scope="module")
def finished(root, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_mmlu(monkeypatch, root, checkpoint, out)
    return out


def test_reports_hold_scores_and_what_they_depend_on(finished):
    report = json.loads((finished / "report.json").read_text())
    (result,) = report["tasks"]["mmlu"]
    lines = [json.loads(line) for line in (finished / "m" / "mmlu.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    for protocol, score in result["scores"].items():
        credits = [line["credit"][protocol] for line in lines]
        assert score["micro"]["value"] == pytest.approx(np.mean(credits), abs=1e-6)
        assert set(score["groups"]) == set(SUBJECTS)
        low, high = score["micro"]["interval95"]
        assert low <= score["micro"]["value"] <= high
    provenance = result["provenance"]
    assert provenance["shots"] == 2
    assert len(provenance["data_sha256"]) == 64
    assert {"prompt_hash", "model_hash", "version"} <= set(provenance)
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "mmlu ppl*, macro" in (finished / "report.md").read_text()


def test_protocols_are_likelihoods_of_plain_text(tmp_path):
    """By hand: every option after the question, tokenized together; with and without it."""
    question, options = "Up is", ("top left", "red", "a star of seven", "no")
    choices = [{"text": text, "label": "ABCD"[n]} for n, text in enumerate(options)]
    record = {"id": "7", "question": {"stem": question, "choices": choices}, "answerKey": "C"}
    (tmp_path / "ARC" / "ARC-c").mkdir(parents=True)
    file = tmp_path / "ARC" / "ARC-c" / "ARC-Challenge-Test.jsonl"
    file.write_text(json.dumps(record) + "\n")

    benchmark = BENCHMARKS["arc_challenge"]
    task = command.make_task(
        benchmark, readers.read_data_set(benchmark, tmp_path), BenchmarkOptions(tmp_path)
    )
    generator, store = cases.generator(4), journals.MemoryStore()
    runner.run_task(generator, task, store, "")
    (line,) = runner.collect_lines(task, store.answers)

    params = cases.make(cases.with_vocabulary(cases.ARCHS["router"], len(cases.tokenizer())))[2]
    context = cases.tokenizer()(f"Question: {question}\nAnswer:").input_ids
    before = naive_nats(generator, params, context)
    sums, means = [], []
    for text in options:
        ids = cases.tokenizer()(f"Question: {question}\nAnswer: {text}").input_ids
        nats = naive_nats(generator, params, ids)
        sums.append(before - nats)
        means.append(-nats / len(ids))
    found = line["ppl"]["likelihoods"]
    np.testing.assert_allclose([option[0] for option in found], sums, atol=3e-3)
    np.testing.assert_allclose([-option[2] for option in found], [before] * 4, atol=3e-3)
    chosen = line["ppl"]["chosen"]
    assert chosen["ll"] == int(np.argmax(sums))
    assert chosen["ppl"] == int(np.argmax(means))
    assert chosen["ll_bytes"] == int(np.argmax(np.divide(sums, [len(text) for text in options])))


@pytest.mark.parametrize("after", [1, 9])
def test_resume_a_killed_run_equals_one_that_never_was(
    after, root, checkpoint, finished, tmp_path, monkeypatch
):
    add, added = jobs.Journal.add, []

    def add_some(journal, number, answer):
        if len(added) == after:
            raise KeyboardInterrupt
        added.append(number)
        add(journal, number, answer)

    with monkeypatch.context() as patch:
        patch.setattr(jobs.Journal, "add", add_some)
        with pytest.raises(KeyboardInterrupt):
            run_mmlu(patch, root, checkpoint, tmp_path)
    journal = tmp_path / "m" / "mmlu.jsonl.partial"
    assert len(journal.read_text().splitlines()) == 1 + after
    journal.write_text(journal.read_text()[:-9])  # cut off in the middle of a line
    run_mmlu(monkeypatch, root, checkpoint, tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_parts_of_several_processes_equal_one_run(
    root, checkpoint, finished, tmp_path, monkeypatch
):
    for part in ("0/2", "1/2"):
        run_mmlu(monkeypatch, root, checkpoint, tmp_path, "--shard", part)
    assert {path.suffix for path in (tmp_path / "m").iterdir()} == {".partial"}

    def refuse(*args, **options):
        raise AssertionError("everything was computed by the parts")

    monkeypatch.setattr(runner.likelihood.PromptScorer, "score_batch", refuse)
    run_mmlu(monkeypatch, root, checkpoint, tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_a_mesh_and_another_model_give_their_change(root, checkpoint, tmp_path, monkeypatch):
    """The same model on eight devices scores the same; the base of `forgetting` is the first."""
    arguments = ["--tasks", "mmlu", "--data-root", root, "--shots", 2, "--batch-size", 4]
    arguments += ["--protocols", "ll", "--mesh", "data=4,tensor=2", "--out", tmp_path]
    other = cases.write_checkpoint(tmp_path / "other", "plain")
    run(monkeypatch, "forgetting", "--base", other, "--checkpoint", f"m={checkpoint}", *arguments)
    (pair,) = json.loads((tmp_path / "forgetting.json").read_text()).items()
    assert pair[0] == "other -> m"
    (change,) = pair[1]
    assert (change["task"], change["protocol"], change["n"]) == ("mmlu", "ll", 12)
    assert "mmlu (ll)" in (tmp_path / "forgetting.md").read_text()

    lines = [json.loads(line) for line in (tmp_path / "m" / "mmlu.jsonl").read_text().splitlines()]
    run_mmlu(monkeypatch, root, checkpoint, tmp_path / "one", "--protocols", "ll")
    alone = (tmp_path / "one" / "m" / "mmlu.jsonl").read_text().splitlines()
    for sharded, line in zip(lines, map(json.loads, alone), strict=True):
        scores = [[o[0] for o in one["ll"]["likelihoods"]] for one in (sharded, line)]
        np.testing.assert_allclose(*scores, atol=2e-3)


def test_images_that_cannot_be_read_are_counted_never_guessed(
    root, checkpoint, tmp_path, monkeypatch, capsys
):
    arguments = ["--tasks", "ai2d", "--data-root", root, "--out", tmp_path, "--batch-size", 2]
    run(monkeypatch, "--checkpoint", f"m={checkpoint}", *arguments)
    lines = [json.loads(line) for line in (tmp_path / "m" / "ai2d.jsonl").read_text().splitlines()]
    assert [("error" in line["generate"]) for line in lines] == [False, False, False, True]
    assert set(lines[3]["credit"].values()) == {0.0}
    assert "ai2d: m: 1 items count as wrong:" in capsys.readouterr().out
    assert "generated" in lines[0]["generate"]


def test_mistakes_are_named_before_anything_is_computed(root, checkpoint, tmp_path, monkeypatch):
    text_only = cases.write_checkpoint(tmp_path / "llm", parts=("decoder",))
    common = ["--data-root", root, "--checkpoint"]
    for arguments, message in (
        (["--tasks", "piqa", *common, checkpoint], r"piqa: no files .* expected .*piqa"),
        (["--tasks", "mmlux", *common, checkpoint], r"'mmlux'; did you mean 'mmlu'"),
        (["--tasks", "mmlu", "--checkpoint", checkpoint], r"--data-root is missing"),
        (["--tasks", "ai2d", *common, text_only], r"ai2d: 4 items have images.* text-only"),
        (["--tasks", "mmlu", "--shots", 6, *common, checkpoint], r"6 shots .* has 5"),
        (["--tasks", "mmlu", "--shots", 5, *common, checkpoint], r"12 of 12 items do not fit"),
        (["--tasks", "mmlu", "--protocols", "no", *common, checkpoint], r"no protocol 'no'"),
        (["--tasks", "mmlu", "--shard", "2/2", "--out", tmp_path, *common, checkpoint], "2/2"),
        (["--suite", "all", *common, checkpoint], r"no suite 'all'"),
        (["--compare", tmp_path], r"two or more"),
        ([], r"--checkpoint is missing"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run(monkeypatch, *arguments)
        assert "\n" not in str(caught.value)


def test_a_result_of_other_settings_is_not_overwritten(root, checkpoint, finished, monkeypatch):
    before = contents(finished)
    with pytest.raises(UserError, match=r"of another run \(shots differs: 2 there, 1 now\)"):
        run_mmlu(monkeypatch, root, checkpoint, finished, "--shots", 1)
    assert contents(finished) == before


def test_a_suite_lists_what_is_missing(root, checkpoint, tmp_path, monkeypatch, capsys):
    text_only = cases.write_checkpoint(tmp_path / "llm", parts=("decoder",))
    arguments = [
        "--suite",
        "wings",
        "--data-root",
        root,
        "--shots",
        0,
        "--protocols",
        "ll,generate",
    ]
    run(monkeypatch, "--checkpoint", text_only, *arguments, "--limit", 4, "--batch-size", 4)
    printed = capsys.readouterr().out
    assert "mmlu ll" in printed
    assert "ai2d: 4 items have images" in printed
    assert "piqa: no files" in printed


def test_a_suite_lists_what_the_flags_do_not_suit(root, checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["--suite", "wings", "--data-root", root, "--protocols", "ppl", "--limit", 2]
    arguments += ["--batch-size", 4, "--shots", 1, "--out", tmp_path]
    run(monkeypatch, "--checkpoint", f"m={checkpoint}", *arguments)
    assert "--shots: ai2d has no split" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["tasks"]) == ["mmlu"]
    assert any(line.startswith("--shots: ai2d") for line in report["missing"])


def credit_line(number: int, credit: float) -> dict:
    return {"id": str(number), "credit": {"ll": credit}}


def test_mcnemar_is_the_exact_binomial_test():
    before = [credit_line(n, float(n < 30)) for n in range(60)]
    after = [credit_line(n, float(2 <= n < 42)) for n in range(60)]
    (change,) = paired.compare_lines("t", before, after)
    assert (change.lost, change.gained, change.count) == (2, 12, 60)
    tail = sum(math.comb(14, k) for k in range(3)) / 2**14
    assert change.p_value == pytest.approx(2 * tail)
    assert change.change == pytest.approx(10 / 60)
    low, high = change.interval
    assert 0 < low < 10 / 60 < high
    with pytest.raises(UserError, match="different items"):
        paired.compare_lines("t", before, after[:-1])


def test_changes_of_rows_are_in_the_order_of_reports():
    lines = [{**credit_line(n, 1.0), "rows": [row]} for n, row in enumerate("bab")]
    changes = paired.compare_lines("t", lines, lines, ("a", "b", "c"))
    assert [(change.row, change.count) for change in changes] == [("", 3), ("a", 1), ("b", 2)]


def text_lines(nats: list[float], tokens: int = 10) -> list[dict]:
    return [
        {"id": str(n), "perplexity": {"logprob": -value, "tokens": tokens, "bytes": 40}}
        for n, value in enumerate(nats)
    ]


def test_changes_of_plain_text_are_ratios_of_perplexities():
    nats = np.random.default_rng(0).uniform(20, 40, 50)
    before, after = text_lines(nats.tolist()), text_lines((nats + 1).tolist())
    (change,) = paired.compare_task("book", before, after)
    found = change.to_dict()

    # Every passage of 10 tokens has one nat more: the paired interval has no width.
    assert found["ratio"] == pytest.approx(math.exp(0.1), abs=1e-5)
    assert found["interval95"] == pytest.approx([math.exp(0.1)] * 2, abs=1e-5)
    assert found["before"] == pytest.approx(math.exp(nats.mean() / 10), rel=1e-5)
    bits = found["bits_per_byte_after"] - found["bits_per_byte_before"]
    assert bits == pytest.approx(1 / 40 / math.log(2), abs=1e-5)
    table = paired.text_changes({"a -> b": [change]})
    assert "1.1052 [1.1052, 1.1052]" in table
    assert "McNemar" not in table

    # Another tokenizer: only bits per byte can be compared.
    (change,) = paired.compare_task("book", before, text_lines(nats.tolist(), tokens=9))
    assert change.to_dict()["ratio"] is None
    assert "(other tokens)" in change.cells()
    with pytest.raises(UserError, match="different items"):
        paired.compare_task("book", before, after[:-1])


def test_compare_reads_finished_results(finished, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--compare", finished / "m", finished / "m", "--out", tmp_path)
    assert "mmlu (ppl)" in capsys.readouterr().out
    (changes,) = json.loads((tmp_path / "comparison.json").read_text()).values()
    assert {change["change"] for change in changes} == {0.0}
    with pytest.raises(UserError, match=r"did you mean .*m\?"):
        run(monkeypatch, "--compare", finished, finished / "m")


def test_limit_keeps_clusters_whole():
    items = [Item(str(n), "", cluster=str(n // 3)) for n in range(30)]
    data = readers.DataSet(items, (), (), "")
    limited = command.limit_items(data, 10)
    assert [int(item.id) for item in limited] == [0, 1, 2, 9, 10, 11, 18, 19, 20]
