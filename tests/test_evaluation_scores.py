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

from wings_jax import cli
from wings_jax.errors import UserError
from wings_jax.evaluation import answer_figure, comparison, iit, report, scoring, tasks
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
    assert scoring.is_right(" top left\n", "top left")
    for wrong in ("top", "Top left", "top left.", "", "top left top left"):
        assert not scoring.is_right(wrong, "top left")


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


def test_every_question_counts_in_its_rows(root):
    task = tasks.TASKS["scenes_images"]
    asked = tasks.read_questions(task, root)
    scores = scoring.score_answers(task, asked, ["yes"] * len(asked))
    plain = len(kinds.KINDS) - 1
    assert scores["digit"] == Score(1, 1)
    assert scores["several"] == Score(plain, plain)
    assert scores["all but sums"] == Score(2 * plain, 2 * plain)
    assert scores["sum"] == Score(2, 2)
    assert "interleaved" not in scores
    task = tasks.TASKS["scenes_text"]
    asked = tasks.read_questions(task, root)
    scores = scoring.score_answers(task, asked, ["no"] + ["yes"] * (len(asked) - 1))
    replayed, never = scores["replayed in stage 2"], scores["never replayed"]
    assert replayed.total + never.total == scores["all text"].total == len(asked)
    assert replayed.total == len(skills.REPLAYED)
    assert scores["all text"].right == 1
    assert set(scores) == set(task.rows)


def test_a_limit_spreads_over_the_file(root):
    asked = tasks.read_questions(tasks.TASKS["scenes_images"], root, limit=4)
    assert len(asked) == 4
    assert len({question.labels[0] for question in asked}) > 1


def test_tables_stand_side_by_side(root):
    task = tasks.TASKS["scenes_text"]
    asked = {"scenes_text": tasks.read_questions(task, root)}
    results = [
        report.TaskResult(
            name,
            f"runs/{name}",
            step,
            {"scenes_text": answers},
            {"scenes_text": scoring.score_answers(task, asked["scenes_text"], answers)},
            {"scenes_text": 0.5},
        )
        for name, step, answers in (
            ("before", None, ["no"] * len(skills.SKILLS)),
            ("after", 7, ["yes"] * len(skills.SKILLS)),
        )
    ]
    text = report.text_report(results)
    assert "before" in text.splitlines()[1]
    assert "100.0 [" in text
    markdown = report.markdown_report(results)
    assert "| **all text** | **9** | **100.0 [70.1, 100.0]** | **0.0 [0.0, 29.9]** |" in markdown
    found = report.report_to_dict(results)["models"][1]["tasks"]["scenes_text"]["all text"]
    assert (found["right"], found["total"], found["accuracy"]) == (0, 9, 0.0)
    assert found["interval95"] == pytest.approx([0.0, 0.299145], abs=1e-6)


def test_forgetting_is_counted_question_by_question(root, tmp_path):
    task = tasks.TASKS["scenes_text"]
    asked = {"scenes_text": tasks.read_questions(task, root)}
    count = len(skills.SKILLS)
    before, after = (
        report.TaskResult(name, f"runs/{name}", 1, {"scenes_text": answers}, {}, {})
        for name, answers in (
            ("before", ["no"] * (count - 1) + ["yes"]),
            ("after", ["yes"] + ["no"] * (count - 1)),
        )
    )
    changes = comparison.compare_answers(asked, before, after)
    rows = changes["scenes_text"]
    first, *_, last = skills.SKILLS
    assert rows[first] == PairedScore(0, 1, 0, 0)
    assert rows[last] == PairedScore(0, 0, 1, 0)
    assert rows["all text"] == PairedScore(count - 2, 1, 1, 0)
    assert "+0.0 [" in comparison.text_comparison(before, after, changes).splitlines()[-1]
    comparison.write_comparison(tmp_path, before, [(after, changes)])
    found = json.loads((tmp_path / "forgetting.json").read_text())["models"][0]["tasks"]
    assert found["scenes_text"][first]["change"] == -1.0
    assert (tmp_path / "forgetting.md").read_text().count("| **all text** |") == 1


def test_the_figure_shows_right_and_wrong(root, tmp_path):
    asked = tasks.read_questions(tasks.TASKS["scenes_images"], root)
    answers = ["yes", "no"] * (len(asked) // 2)
    file = tmp_path / "new" / "answers.png"
    answer_figure.draw_answers(file, asked, answers, count=6)
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

    assert tuple(tasks.TASKS) == evaluate.TASK_NAMES


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
    assert (out / "some.png").stat().st_size > 1000
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
        tasks.read_questions(tasks.TASKS["scenes_text"], tmp_path)
    record = {"id": "new", "conversations": turns, "kinds": ["smell"], "setting": "single"}
    (tmp_path / "test_images.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=r"new: there are no questions of kind 'smell'"):
        tasks.read_questions(tasks.TASKS["scenes_images"], tmp_path)
