"""Counting, intervals, tables, and the evaluation's command line on a random model."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import inference_cases as cases
import numpy as np
import pytest
from PIL import Image

from wings_jax.data import questions as kinds
from wings_jax.data import skills
from wings_jax.errors import UserError
from wings_jax.evaluation import picture, report, scoring, tasks
from wings_jax.evaluation.scoring import Score


def test_wilson_intervals_are_the_published_ones():
    """Values of the closed form, computed by hand for 8/10, 0/10 and 10/10."""
    np.testing.assert_allclose(Score(8, 10).interval, (0.4901625, 0.9433178), atol=1e-6)
    np.testing.assert_allclose(Score(0, 10).interval, (0.0, 0.2775328), atol=1e-6)
    np.testing.assert_allclose(Score(10, 10).interval, (0.7224672, 1.0), atol=1e-6)
    assert Score(0, 0).interval == (0.0, 1.0)
    assert math.isnan(Score(0, 0).accuracy)


def test_an_answer_is_right_only_if_it_is_exactly_the_true_one():
    assert scoring.is_right(" top left\n", "top left")
    for wrong in ("top", "Top left", "top left.", "", "top left top left"):
        assert not scoring.is_right(wrong, "top left")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small data set in the form of the scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "images" / "a.png")
    records = []
    for kind in kinds.KINDS:
        for setting, images in (("single", "a.png"), ("several", ["a.png", "a.png"])):
            marks = "<image>\n" * (1 if setting == "single" else 2)
            turns = [
                {"from": "human", "value": f"{marks}Which {kind}?"},
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
    (folder / "test_images.json").write_text(json.dumps(records))
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
    (folder / "test_text.json").write_text(json.dumps(records))
    return folder


def test_every_question_counts_in_its_rows(root):
    task = tasks.TASKS["scenes_images"]
    asked = tasks.read(task, root)
    scores = scoring.count(task, asked, ["yes"] * len(asked))
    plain = len(kinds.KINDS) - 1
    assert scores["digit"] == Score(1, 1)
    assert scores["several"] == Score(plain, plain)
    assert scores["all but sums"] == Score(2 * plain, 2 * plain)
    assert scores["sum"] == Score(2, 2)
    assert "interleaved" not in scores
    task = tasks.TASKS["scenes_text"]
    asked = tasks.read(task, root)
    scores = scoring.count(task, asked, ["no"] + ["yes"] * (len(asked) - 1))
    replayed, never = scores["replayed in stage 2"], scores["never replayed"]
    assert replayed.total + never.total == scores["all text"].total == len(asked)
    assert replayed.total == len(skills.REPLAYED)
    assert scores["all text"].right == 1
    assert set(scores) == set(task.rows)


def test_a_limit_spreads_over_the_file(root):
    asked = tasks.read(tasks.TASKS["scenes_images"], root, limit=4)
    assert len(asked) == 4
    assert len({question.labels[0] for question in asked}) > 1


def test_tables_stand_side_by_side(root):
    task = tasks.TASKS["scenes_text"]
    asked = {"scenes_text": tasks.read(task, root)}
    results = [
        report.Result(
            name,
            f"runs/{name}",
            step,
            {"scenes_text": answers},
            {"scenes_text": scoring.count(task, asked["scenes_text"], answers)},
            {"scenes_text": 0.5},
        )
        for name, step, answers in (
            ("before", None, ["no"] * len(skills.SKILLS)),
            ("after", 7, ["yes"] * len(skills.SKILLS)),
        )
    ]
    text = report.as_text(results)
    assert "before" in text.splitlines()[1]
    assert "100.0 [" in text
    markdown = report.as_markdown(results)
    assert "| **all text** | **9** | **100.0 [70.1, 100.0]** | **0.0 [0.0, 29.9]** |" in markdown
    found = report.as_json(results)["models"][1]["tasks"]["scenes_text"]["all text"]
    assert (found["right"], found["total"], found["accuracy"]) == (0, 9, 0.0)
    assert found["interval95"] == pytest.approx([0.0, 0.299145], abs=1e-6)


def test_the_picture_shows_right_and_wrong(root, tmp_path):
    asked = tasks.read(tasks.TASKS["scenes_images"], root)
    answers = ["yes", "no"] * (len(asked) // 2)
    file = tmp_path / "new" / "answers.png"
    picture.draw(file, asked, answers, count=6)
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    for colour in (picture.RIGHT, picture.WRONG):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(1).any()
    assert [path.name for path in file.parent.iterdir()] == ["answers.png"]


def evaluate(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "wings_jax.evaluate", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return cases.write_checkpoint(tmp_path_factory.mktemp("run") / "random")


def test_the_command_writes_a_report(workdir, root, tmp_path):
    out = tmp_path / "out"
    flags = ("--checkpoint", f"one={workdir}", f"two={workdir}", "--data-root", root)
    done = evaluate(*flags, "--out", out, "--limit", 3, "--picture", out / "some.png")
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "report.json").read_text())["models"]
    assert [model["name"] for model in found] == ["one", "two"]
    assert found[0]["tasks"] == found[1]["tasks"]
    lines = (out / "answers-one.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert {"task", "id", "question", "truth", "answer", "right"} == set(json.loads(lines[0]))
    assert (out / "report.md").read_text().startswith("# Evaluation")
    assert (out / "some.png").stat().st_size > 1000
    assert "all text" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "no/such"], "--checkpoint: no/such holds no checkpoint"),
        (["--checkpoint", "RUN", "--tasks", "scenes_image"], "no such task: 'scenes_image'"),
        (["--checkpoint", "RUN", "--data-root", "no/data"], "no/data/test_images.json"),
        (["--checkpoint", "RUN", "RUN"], "two are called 'random'"),
        (["--checkpoint", "RUN", "--data-root", "ROOT", "--picture", "x.jpg"], "x.jpg"),
        (["--checkpoint", "RUN", "--data-root", "ROOT", "--out", "FILE/x"], "--out: cannot write"),
        (["--checkpoint", "RUN", "--limit", "0"], "--limit: 0 is less than 1"),
    ],
)
def test_a_mistake_is_one_line(workdir, root, monkeypatch, capsys, flags, message):
    from wings_jax import errors, evaluate  # the entry point, imported only to be run

    known = {"RUN": str(workdir), "ROOT": str(root), "FILE/x": f"{root}/test_text.json/x"}
    monkeypatch.setattr(sys, "argv", ["evaluate", *(known.get(flag, flag) for flag in flags)])
    with pytest.raises(SystemExit) as caught:
        errors.entry("wings_jax.evaluate", evaluate.main)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_record_without_its_keys_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    file = tmp_path / "test_text.json"
    file.write_text(json.dumps([{"id": "odd", "conversations": turns}]))
    with pytest.raises(UserError, match=r"odd: KeyError 'kinds'"):
        tasks.read(tasks.TASKS["scenes_text"], tmp_path)
