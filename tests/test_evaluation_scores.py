"""Counting, intervals, tables, and the evaluation's command line on a random model."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import inference_cases as cases
import numpy as np
import pytest
from PIL import Image

from wings_jax import cli
from wings_jax.errors import UserError
from wings_jax.evaluation import iit, tasks
from wings_jax.evaluation.benchmarks import (
    answer_figure,
    command,
    embedded,
    extraction,
    judging,
    legacy,
    summary,
    tables,
)
from wings_jax.evaluation.benchmarks.results import BenchmarkResult
from wings_jax.evaluation.scoring import PairedScore, Score
from wings_jax.scenes import questions as kinds
from wings_jax.scenes import skills


def test_wilson_intervals_match_published_values():
    """Values of the closed form, computed by hand for 8/10, 0/10 and 10/10."""
    np.testing.assert_allclose(Score(8, 10).interval, (0.4901625, 0.9433178), atol=1e-6)
    np.testing.assert_allclose(Score(0, 10).interval, (0.0, 0.2775328), atol=1e-6)
    np.testing.assert_allclose(Score(10, 10).interval, (0.7224672, 1.0), atol=1e-6)
    assert Score(0, 0).interval == (0.0, 1.0)
    assert math.isnan(Score(0, 0).accuracy)


def test_paired_intervals_match_published_values():
    """Newcombe 1998, method 10, for 36, 12, 2, 0 of 50, and with before and after swapped."""
    gained = PairedScore(both=36, lost=2, gained=12, neither=0)
    assert gained.change == pytest.approx(0.2)
    np.testing.assert_allclose(gained.interval, (0.0569, 0.3404), atol=5e-5)
    lost = PairedScore(both=36, lost=12, gained=2, neither=0)
    np.testing.assert_allclose(lost.interval, (-0.3404, -0.0569), atol=5e-5)


def test_paired_intervals_are_narrow_where_few_answers_change():
    """Two equal scores: with the same answers right, and with independent ones."""
    same, mixed = PairedScore(50, 0, 0, 50), PairedScore(25, 25, 25, 25)
    assert same.change == mixed.change == 0
    assert same.interval[1] < mixed.interval[1] / 3
    assert PairedScore(10, 0, 0, 0).interval == pytest.approx((-0.2775, 0.2775), abs=1e-4)
    low, high = PairedScore(0, 100, 0, 0).interval
    assert low == -1 < high < -0.9
    for table in (PairedScore(3, 4, 5, 6), PairedScore(90, 9, 1, 0), PairedScore(1, 0, 0, 99)):
        assert table.interval[0] <= table.change <= table.interval[1]


def test_an_answer_is_right_only_if_it_is_exactly_the_true_one():
    assert extraction.are_equal_texts(" top left\n", "top left")
    for wrong in ("top", "Top left", "top left.", "", "top left top left"):
        assert not extraction.are_equal_texts(wrong, "top left")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small data set in the form of the scenes."""
    directory = tmp_path_factory.mktemp("scenes")
    (directory / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save(directory / "images" / "a.png")
    records = []
    for kind in kinds.KINDS:
        for setting, images in (("single", "a.png"), ("several", ["a.png", "a.png"])):
            markers = "<image>\n" * (1 if setting == "single" else 2)
            turns = [
                {"from": "human", "value": f"{markers}Which {kind}?"},
                {"from": "gpt", "value": "yes"},
            ]
            records.append(
                {
                    "id": f"{kind}-{setting}",
                    "image": images,
                    "conversations": turns,
                    "kinds": [kind],
                    "setting": setting,
                }
            )
    (directory / "test_images.json").write_text(json.dumps(records))
    records = [
        {
            "id": name,
            "conversations": [
                {"from": "human", "value": f"{name}?"},
                {"from": "gpt", "value": "no"},
            ],
            "kinds": [name],
            "setting": "text",
        }
        for name in skills.SKILLS
    ]
    (directory / "test_text.json").write_text(json.dumps(records))
    return directory


def score(name: str, root, answers: list[str]) -> BenchmarkResult:
    """Returns the result of given answers to an embedded task."""
    benchmark = embedded.EMBEDDED[name]
    _, data = embedded.read_embedded(benchmark, embedded.EmbeddedSources(root))
    task = command.make_task(benchmark, data, command.BenchmarkOptions(root))
    (one,) = task.passes
    lines = [
        judging.merge_entries(item, {one.key: judging.judge_generation(one, item, answer)})
        for item, answer in zip(data.items, answers, strict=True)
    ]
    scores = summary.score_protocols(benchmark, data.items, lines)
    provenance = {"items": len(lines), "skipped": {}}
    return BenchmarkResult("m", benchmark, provenance, lines, scores, 0.5, "runs/m", 7)


def test_every_question_counts_in_its_rows(root):
    result = score("scenes_images", root, ["yes"] * 2 * len(kinds.KINDS))
    rows = result.scores["generate"].groups
    plain = len(kinds.KINDS) - 1
    counts = {name: (mean.value, mean.count) for name, mean in rows.items()}
    assert counts["digit"] == (1.0, 1)
    assert counts["several"] == (1.0, plain)
    assert counts["all but sums"] == (1.0, 2 * plain)
    assert counts["sum"] == (1.0, 2)
    assert "interleaved" not in counts

    result = score("scenes_text", root, ["no"] + ["yes"] * (len(skills.SKILLS) - 1))
    rows = result.scores["generate"].groups
    replayed, never = rows["replayed in stage 2"], rows["never replayed"]
    assert replayed.count + never.count == rows["all text"].count == len(skills.SKILLS)
    assert replayed.count == len(skills.REPLAYED)
    assert rows["all text"].value == pytest.approx(1 / len(skills.SKILLS))
    assert tuple(rows) == result.benchmark.rows


def test_report_has_rows_and_the_keys_of_released_versions(root):
    count = len(skills.SKILLS)
    result = score("scenes_text", root, ["yes"] * count)
    other = dataclasses.replace(
        score("scenes_text", root, ["no"] * count), model="after", origin="runs/after", step=None
    )
    found = {"scenes_text": [result, other]}
    report = tables.report_to_dict(found)["models"]
    assert [model["origin"] for model in report] == ["runs/m", "runs/after"]
    row = report[0]["tasks"]["scenes_text"]["all text"]
    assert (row["right"], row["total"], row["accuracy"]) == (0, count, 0.0)
    assert row["interval95"] == pytest.approx([0.0, 0.299145], abs=1e-6)
    assert report[0]["seconds"] == {"scenes_text": 0.5}

    changes = legacy.changes_to_dict(found)
    first = next(iter(skills.SKILLS))
    change = changes["models"][0]["tasks"]["scenes_text"][first]
    assert (change["change"], change["lost"], change["gained"]) == (1.0, 0, 1)
    assert changes["before"] == {"name": "m", "origin": "runs/m"}
    text = tables.text_report(found)
    assert "= all text" in text
    assert "scenes_text generate*" in text


def test_the_figure_shows_right_and_wrong(root, tmp_path):
    count = 2 * len(kinds.KINDS)
    result = score("scenes_images", root, ["yes", "no"] * (count // 2))
    items = tasks.read_items(tasks.TASKS["scenes_images"], root)
    file = tmp_path / "new" / "answers.png"
    answer_figure.draw_answers(file, items, result.lines, count=6)
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    for color in (answer_figure.RIGHT_COLOR, answer_figure.WRONG_COLOR):
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(1).any()
    assert [path.name for path in file.parent.iterdir()] == ["answers.png"]


def evaluate(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "wings_jax.evaluate", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("program", ["evaluate", "forgetting.__main__"])
def test_help_needs_no_slow_imports(program):
    """A library is imported where it is used, so that --help answers at once."""
    slow = ("matplotlib", "transformers", "orbax", "tqdm")
    code = f"import sys, wings_jax.{program}; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_task_names_of_the_help_are_those_of_the_tasks():
    from wings_jax import evaluate  # the entry point, imported only to be run

    assert tuple(embedded.EMBEDDED) == evaluate.TASK_NAMES


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return cases.write_checkpoint(tmp_path_factory.mktemp("run") / "random")


def test_the_command_writes_a_report(workdir, root, tmp_path):
    out = tmp_path / "out"
    flags = ("--checkpoint", f"one={workdir}", f"two={workdir}", "--data-root", root)
    done = evaluate(*flags, "--out", out, "--limit", 3, "--figure", out / "some.png")
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "report.json").read_text())["models"]
    assert [model["name"] for model in found] == ["one", "two"]
    assert found[0]["tasks"] == found[1]["tasks"]
    lines = (out / "answers-one.jsonl").read_text().splitlines()
    assert len(lines) == 6
    keys = {"task", "rows", "id", "question", "truth", "answer", "right"}
    assert keys == set(json.loads(lines[0]))
    assert (out / "report.md").read_text().startswith("# Evaluation")
    assert (out / "report.png").stat().st_size > 1000
    assert (out / "some.png").stat().st_size > 1000
    assert len((out / "two" / "scenes_text.jsonl").read_text().splitlines()) == 3

    # Run again with other settings: results of embedded tasks are replaced.
    again = evaluate(*flags, "--out", out, "--limit", 2)
    assert again.returncode == 0, again.stderr
    assert len((out / "answers-one.jsonl").read_text().splitlines()) == 4
    assert "all text" in done.stdout


def test_forgetting_and_conversations_by_command(workdir, root, tmp_path, monkeypatch, capsys):
    from wings_jax import evaluate  # the entry point, imported only to be run

    flags = ["forgetting", "--base", f"old={workdir}", "--checkpoint", f"new={workdir}"]
    flags += ["--tasks", "iit,scenes_text", "--data-root", root, "--limit", "12", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, flags)])
    evaluate.main()
    output = capsys.readouterr().out
    assert "old -> new" in output
    assert "Interleaved conversations" in output
    found = json.loads((tmp_path / "forgetting.json").read_text())
    assert found["before"]["name"] == "old"
    (after,) = found["models"]
    assert list(after["tasks"]["iit"]) == list(iit.ROWS)
    for row in after["tasks"]["iit"].values():  # the same model: nothing is lost or gained
        assert (row["lost"], row["gained"], row["total"]) == (0, 0, 2)
    assert (tmp_path / "answers-old.jsonl").is_file()
    (pair,) = [name for name in found if " -> " in name]
    assert {change["row"] for change in found[pair] if "row" in change} >= set(iit.ROWS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["forgetting", "--base", "no/such", "--checkpoint", "RUN"], "--base: no/such holds no"),
        (["--checkpoint", "no/such"], "--checkpoint: no/such holds no checkpoint"),
        (["--checkpoint", "RUN", "--tasks", "scenes_image"], "no such task: 'scenes_image'"),
        (["--checkpoint", "RUN", "--data-root", "no/data"], "no/data/test_images.json"),
        (["--checkpoint", "RUN", "RUN"], "two models have the name 'random'"),
        (
            ["--checkpoint", "RUN", "--data-root", "ROOT", "--figure", "x.jpg"],
            "--figure: x.jpg does",
        ),
        (
            ["--checkpoint", "RUN", "--data-root", "ROOT", "--picture", "x.jpg"],
            "--figure: x.jpg does",
        ),
        (["--checkpoint", "RUN", "--data-root", "ROOT", "--out", "FILE/x"], "--out: cannot write"),
        (["--checkpoint", "RUN", "--limit", "0"], "--limit: 0 is less than 1"),
    ],
)
def test_user_errors_are_one_line(workdir, root, monkeypatch, capsys, flags, message):
    from wings_jax import evaluate  # the entry point, imported only to be run

    known = {"RUN": str(workdir), "ROOT": str(root), "FILE/x": f"{root}/test_text.json/x"}
    monkeypatch.setattr(sys, "argv", ["evaluate", *(known.get(flag, flag) for flag in flags)])
    with pytest.raises(SystemExit) as caught:
        cli.run_main("python -m wings_jax.evaluate", evaluate.main)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_records_without_their_keys_are_named(tmp_path):
    (tmp_path / "images").mkdir()
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    file = tmp_path / "test_text.json"
    file.write_text(json.dumps([{"id": "odd", "conversations": turns}]))
    with pytest.raises(UserError, match=r"odd: KeyError 'kinds'"):
        tasks.read_items(tasks.TASKS["scenes_text"], tmp_path)
    record = {"id": "new", "conversations": turns, "kinds": ["smell"], "setting": "single"}
    (tmp_path / "test_images.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=r"new: there are no questions of kind 'smell'"):
        tasks.read_items(tasks.TASKS["scenes_images"], tmp_path)
