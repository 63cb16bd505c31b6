"""Means, intervals, tables and plots of the experiment, from made-up scores."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import statistics

import pytest
from forgetting_cases import RUNS, SETTINGS, TINY, scored
from PIL import Image

from wings_jax.errors import UserError
from wings_jax.forgetting import estimates, plots, results, table
from wings_jax.forgetting.methods import IMAGES, NOT_REPLAYED, REGIMES
from wings_jax.forgetting.plan import ExperimentRun


def test_means_and_intervals_are_those_of_student():
    found = estimates.estimate_mean(results.select_runs(RUNS, "llava", "images"), IMAGES)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t with 2 degrees of freedom, sd 0.1
    assert (found.mean, found.runs) == (pytest.approx(0.6), 3)
    assert (found.low, found.high) == pytest.approx((0.6 - half, 0.6 + half))
    single = estimates.estimate_mean(results.select_runs(RUNS, "base", "replay"), IMAGES)
    assert (single.mean, single.low, single.high, single.runs) == (0.1, 0.0, 0.2, 1)
    assert estimates.estimate_mean([], IMAGES) == estimates.NO_ESTIMATE


def test_differences_are_paired_by_seed():
    """Wings has no seed 1; at 0 and 2 it is 0.4 and 0.0 better: mean 0.2, sd 0.2828."""
    found = estimates.estimate_difference(RUNS, "wings", "images", NOT_REPLAYED)
    half = 12.706204736174698 * math.sqrt(0.08) / math.sqrt(2)  # t with 1 degree of freedom
    assert (found.mean, found.runs) == (pytest.approx(0.2), 2)
    assert found.high - found.mean == pytest.approx(half)
    assert (
        estimates.estimate_difference(RUNS, "lora", "replay", NOT_REPLAYED) == estimates.NO_ESTIMATE
    )  # nothing to pair


def answered(directory: pathlib.Path, words: str, right: str) -> pathlib.Path:
    """Writes answers to questions that are a letter each, "1" for a right one."""
    (directory / "scores").mkdir(parents=True)
    lines = [
        {
            "task": NOT_REPLAYED.task,
            "rows": [NOT_REPLAYED.row],
            "question": w,
            "truth": "",
            "right": r == "1",
        }
        for w, r in zip(words, right, strict=True)
    ]
    lines.append({"task": IMAGES.task, "rows": [], "question": "", "truth": "", "right": True})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "scores" / "answers-some.jsonl").write_text(text)
    return directory


def difference_of(tmp_path, words: str, wings: list[str], llava: list[str], other: str = ""):
    runs = []
    for name, given in (("wings", wings), ("llava", llava)):
        for seed, right in enumerate(given):
            directory = tmp_path / f"{words}-{other}" / name / str(seed)
            asked = other if other and name == "llava" else words
            run = scored(name, seed, 0.5, right.count("1") / len(right))
            runs.append(dataclasses.replace(run, directory=answered(directory, asked, right)))
    return estimates.estimate_difference(runs, "wings", "images", NOT_REPLAYED)


def test_a_difference_has_an_interval_over_the_questions(tmp_path):
    """By question, in the mean over seeds, Wings is 1, 1/2, 0 and 0 better."""
    wings, llava = ["1110", "1010"], ["0010", "0010"]
    found = difference_of(tmp_path, "abcd", wings, llava)
    values = [1.0, 0.5, 0.0, 0.0]
    half = 1.959963984540054 * statistics.stdev(values) / 2
    assert found.mean == pytest.approx(0.375)
    assert found.questions == pytest.approx((0.375 - half, 0.375 + half))
    text = table.format_estimate(found, NOT_REPLAYED, sign="+")
    assert text == "+37.5 ±158.8 [-9.4, +84.4]"
    twice = difference_of(tmp_path, "aabb", wings, llava)  # two questions, each asked twice
    assert twice.questions[1] - twice.mean == pytest.approx(
        1.959963984540054 * math.sqrt((0.75**2 + 0.75**2) * 2) / 4
    )
    assert difference_of(tmp_path, "aaaa", wings, llava).questions is None  # nothing to compare
    assert difference_of(tmp_path, "abcd", wings, llava, "abce").questions is None
    assert (
        estimates.estimate_difference(RUNS, "wings", "images", NOT_REPLAYED).questions is None
    )  # no answers


def test_markdown_has_means_differences_and_settings():
    text = table.markdown_tables(RUNS, SETTINGS, {"prefix, images, seed 0": "exit status 2"})
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()[::-1]}
    columns = re.split(r" \| ", rows["LLaVA"].strip("| "))
    assert columns[:5] == ["LLaVA", "3", "60.0 ±24.8", "-", "60.0 ±65.7"]
    assert columns[-3:] == ["0.40 ±0.66", "1.00 ±0.00", "1,000"]
    assert rows["base, no training"].startswith("| base, no training | - | 10.0 [0.0, 20.0] | - ")
    assert "| Wings | +10.0 ±0.0 | - | +20.0 ±254.1 |" in text
    assert "- failed: prefix, images, seed 0: exit status 2" in text
    assert text.count("base, no training") == 2 * 3  # in both regimes, but not against LLaVA
    assert "fast form" not in text
    assert "nan" not in text
    assert "Here: as many steps as its config has of stage 1, " in text
    chosen = {"steps": 100, "stage1_steps": 300, "limit": 30}
    flag = "--config.model.rank=8"
    fast = dataclasses.replace(SETTINGS, is_fast=True, overrides=(flag,), **chosen)
    text = table.markdown_tables(RUNS, fast, {})
    assert "**This is the fast form**" in text
    assert "Here: 300 steps of stage 1, 100 steps of stage 2, 30 questions of a task, every" in text
    assert f"every training with `{flag}`." in text


def test_json_and_plots_are_complete(tmp_path):
    table.write_table(tmp_path, RUNS, SETTINGS, {})
    found = json.loads((tmp_path / "forgetting.json").read_text())
    row = found["table"]["images"]["llava"]["scores"]["laws"]["shift"]
    assert (row["mean"], row["over"], row["seeds"]) == (0.4, "seeds", 3)
    base = found["table"]["images"]["base"]["scores"]
    assert base["laws"]["shift"]["over"] == "probes"
    assert base["scenes_text"][NOT_REPLAYED.row]["over"] == "questions"
    assert base["laws"]["shift_after"]["over"] is None  # it has no interval
    assert [run["method"] for run in found["runs"]] == [run.method for run in RUNS]
    paths = plots.write_plots(tmp_path, RUNS, TINY, "")
    assert {path.name for path in paths} == {
        "shift.png",
        *(f"accuracy-{regime}.png" for regime in REGIMES),
        *(f"interleaved-{regime}.png" for regime in REGIMES),
    }
    for path in paths:
        assert len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 20
    assert plots.write_plots(tmp_path, [], TINY, "") == []


def test_the_base_alone_gives_a_table_and_a_plot(tmp_path):
    text = table.markdown_tables(RUNS[:1], SETTINGS, {"llava, images, seed 0": ""})
    assert "Runs without scores so far: 1." in text
    assert text.count("| base, no training |") == 3
    (path,) = plots.write_plots(tmp_path, RUNS[:1], TINY, "")
    assert path.name == "accuracy-images.png"


def test_runs_are_read_in_the_order_of_the_table(tmp_path):
    for run in RUNS[::-1]:
        place = f"{run.regime}/{run.method}/seed-{run.seed}" if run.regime else run.method
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "run.json").write_text(json.dumps(run.to_dict()))
    assert results.read_scores(tmp_path) == RUNS
    assert all(run.directory for run in results.read_scores(tmp_path))
    assert results.read_scores(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"models": []}', '{"method": "wings"}', "[" * 100_000, "\ud800"],
)
def test_a_damaged_file_of_scores_is_named(tmp_path, content):
    path = tmp_path / "images" / "wings" / "seed-0" / "run.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=rf"^--out: {path} is damaged .*remove {path.parent}"):
        results.read_scores(tmp_path)


@pytest.mark.parametrize("file", ["scores/report.json", "laws/laws_summary.json"])
@pytest.mark.parametrize("content", ["{", '{"models": []}', '{"models": [{}]}', '{"models": [3]}'])
def test_reports_of_another_kind_are_named(tmp_path, file, content):
    run = ExperimentRun("wings", "images", 0, tmp_path, ())
    good = {"tasks": {}}
    shift = {"shift": {}, "variant": {}, "n_used": 1, "n_skipped": 0}
    shift["shift_by_rows"] = {"after": {"n_used": 1}}
    for name, model in (("scores/report.json", good), ("laws/laws_summary.json", shift)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps({"models": [model]}))
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=rf"^--out: {tmp_path / file} is damaged"):
        results.write_scores(run)


@pytest.mark.parametrize("line", ["{", "[]", '{"task": "scenes_text", "rows": ["never replayed"]}'])
def test_a_damaged_file_of_answers_is_named(tmp_path, line):
    directory = answered(tmp_path, "ab", "10")
    (path,) = (directory / "scores").iterdir()
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(UserError, match=rf"^--out: {path} is damaged"):
        estimates.read_graded(directory, NOT_REPLAYED.task, NOT_REPLAYED.row)
