"""The experiment on text-only forgetting: what is compared, what is shared, resumed and counted."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys

import jax
import pytest
import training_cases as cases
from PIL import Image

from configs import replay
from wings_jax import cli
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.evaluation import everyday, iit, tasks
from wings_jax.forgetting import __main__ as forgetting
from wings_jax.forgetting import methods, plan, plots, results, runner, table
from wings_jax.forgetting.methods import BASES, METHODS, NEVER, PICTURES, REGIMES, SHIFT
from wings_jax.forgetting.plan import ExperimentRun, Job
from wings_jax.forgetting.results import Scored
from wings_jax.scenes import drawings, skills

SETTINGS = plan.ExperimentSettings("tiny", "", False, None, None, None, "runs/scenes")
TINY = BASES["tiny"]
OUT = pathlib.Path("out")


def read_config(name: str, preset: str = "tiny") -> config_lib.Config:
    return config_lib.from_config_dict(
        importlib.import_module(f"configs.{name}").get_config(preset)
    )


# ---- what is compared ----


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_what_its_config_trains(name):
    method = METHODS[name]
    config = read_config(method.config)
    rates = config.optimizer.learning_rates
    trained = {group for group, rate in rates.items() if rate > 0}
    assert set(method.trains) == (set() if method.steps == 0 else trained)
    assert pathlib.Path(config.init_from).name == method.begins
    if method.begins:
        assert not read_config(method.begins).init_from


def test_every_config_is_a_method_or_the_stage_before_one():
    used = {name for m in METHODS.values() for name in (m.config, m.begins) if name}
    files = {path.stem for path in (cases.ROOT / "configs").glob("*.py")}
    assert files - {"base", "replay"} == used
    assert {methods.BASE, methods.REFERENCE} <= set(METHODS)
    assert len({method.colour for method in METHODS.values()}) == len(METHODS)


# What of the model a method changes of Wings, and which may train what they share at other rates.
PARTS = {"learners", "router"}
CHANGES = {
    "llava": PARTS,
    "lora": PARTS | {"lora_rank", "lora_alpha"},
    "prefix": PARTS | {"prefix_length"},
    "visual_only": PARTS,
    "textual_only": PARTS,
    "no_router": {"router"},
    "gain2": {"gain"},
    "wings": set(),
    "frozen_llm": PARTS,
    "lr_smaller": set(),
    "lr_larger": set(),
}
OWN_RATES = ("frozen_llm", "lr_smaller", "lr_larger")


@pytest.mark.parametrize("preset", [base.preset[1:] or "tiny" for base in BASES.values()])
@pytest.mark.parametrize("name", [name for name in METHODS if name != methods.BASE])
def test_methods_differ_in_nothing_but_the_method(name, preset):
    """Data, steps, batch, optimizer, and the rates of what both train are those of Wings."""
    names = (METHODS[name].config, "stage2")
    mine, wings = (config_lib.to_dict(read_config(name, preset)) for name in names)
    model, of_wings = mine.pop("model"), wings.pop("model")
    assert {key for key in model if model[key] != of_wings[key]} <= CHANGES[name]
    mine_rates, rates = (config["optimizer"].pop("learning_rates") for config in (mine, wings))
    both = {group for group in rates if rates[group] and mine_rates.get(group)}
    assert "projector" in both
    if name not in OWN_RATES:
        assert {group: mine_rates[group] for group in both} == {g: rates[g] for g in both}
    for config in (mine, wings):
        del config["optimizer"]["groups"]
        for key in ("stage", "workdir", "init_from"):
            del config[key]
    assert mine == wings


@pytest.mark.parametrize("name", [m.config for m in METHODS.values() if m.begins])
def test_replay_adds_text_and_changes_nothing_else(name):
    plain, mixed = read_config(name), config_lib.from_config_dict(replay.get_config(name))
    assert set(plain.data.sources) == set(REGIMES["images"].sources)
    assert set(mixed.data.sources) == set(REGIMES["replay"].sources)
    for source, file in REGIMES["replay"].sources.items():
        assert pathlib.Path(mixed.data.sources[source].path).name == f"{file}.json"
    keys = {difference.split(":")[0] for difference in config_lib.differences(plain, mixed)}
    keys = {key for key in keys if not key.startswith("data.sources.")}
    assert keys <= {"stage", "data.sequence_length"}


def test_replay_is_of_stages():
    for name in ("nothing", "base", "replay"):
        with pytest.raises(ValueError, match="is no stage"):
            replay.get_config(name)


# ---- the plan ----


def stages(runs: list[ExperimentRun], kind: str) -> list[Job]:
    return [job for run in runs for job in run.jobs if job.kind == kind]


def test_first_stages_are_shared():
    runs = plan.runs(OUT, tuple(METHODS), tuple(REGIMES), (0, 1), SETTINGS)
    assert len(runs) == 1 + (len(METHODS) - 1) * len(REGIMES) * 2
    first = set(stages(runs, "stage 1"))
    assert {job.folder for job in first} == {
        OUT / "stage1" / name / f"seed-{seed}"
        for name in ("stage1", "llava_stage1")
        for seed in (0, 1)
    }
    assert len(first) == 4  # equal where the folder is
    last = stages(runs, "stage 2")
    assert len({job.folder for job in last}) == len(last) == len(runs)
    for run in runs:
        if METHODS[run.method].begins:
            before, training = run.jobs[:2]
            assert f"--config.init_from={before.folder}" in training.command
            assert f"--config.seed={run.seed}" in before.command
            assert f"--config.seed={run.seed}" in training.command
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)  # a table early


def test_settings_reach_the_commands():
    settings = dataclasses.replace(
        SETTINGS,
        is_fast=True,
        steps=7,
        stage1_steps=9,
        limit=30,
        data="my/scenes",
        overrides=("--config.batch_size=4",),
    )
    base, run = plan.runs(OUT, ("base", "lora"), ("replay",), (3,), settings)
    assert "--config.steps=0" in base.jobs[0].command
    before, training, evaluation, laws = run.jobs
    assert "--config.steps=9" in before.command
    assert "--config=configs/replay.py:lora" in training.command
    assert "--config.steps=7" in training.command
    assert "--config.data.sources.replay.path=my/scenes/train_replay.json" in training.command
    for job in (base.jobs[0], before, training):
        assert "--config.batch_size=4" in job.command
    assert " ".join(evaluation.command).endswith(
        "--data-root my/scenes --out out/replay/lora/seed-3/scores --limit 30"
    )
    assert f"--checkpoint=lora={run.folder}" in laws.command
    plain = plan.runs(OUT, ("lora",), ("images",), (0,), SETTINGS)[0].jobs[1].command
    assert not any(word.startswith(("--config.steps", "--config.data.scenes")) for word in plain)


def test_a_variant_changes_its_last_stage_only():
    name = "wings@optimizer.learning_rates.llm=5e-4@steps=9"
    (run,) = plan.runs(OUT, (name,), ("images",), (0,), dataclasses.replace(SETTINGS, steps=7))
    first, last, evaluation, _ = run.jobs
    (plain,) = plan.runs(OUT, ("wings",), ("images",), (0,), dataclasses.replace(SETTINGS, steps=7))
    assert first == plain.jobs[0]
    assert set(last.command) - set(plain.jobs[1].command) == {
        f"--workdir={run.folder}",
        "--config.steps=9",
        "--config.optimizer.learning_rates.llm=5e-4",
    }
    assert "=" not in str(run.folder)  # NAME=DIR is how a checkpoint is given
    assert f"--checkpoint=wings={run.folder}" in evaluation.command
    method = methods.find(name)
    assert (method.title, method.config) == ("Wings; llm 5e-4, steps 9", "stage2")
    assert method.colour != METHODS["wings"].colour
    rate = "wings@optimizer.learning_rates.llm="
    assert methods.find(f"{rate}1.5e-3").title == "Wings; llm 1.5e-3"
    assert len({methods.find(f"{rate}{n}e-4").colour for n in range(1, 10)}) == 9
    assert methods.chosen_methods(f"{name},wings,llava", "--methods") == ("llava", "wings", name)


def test_a_variants_value_may_be_a_tuple():
    name = "frozen_llm@model.learner_layers=(0, 2)"
    assert methods.chosen_methods(f"llava,{name}", "--methods") == ("llava", name)


def test_a_variant_has_its_own_row():
    name = "wings@optimizer.learning_rates.llm=5e-4"
    runs = [*RUNS, dataclasses.replace(RUNS[4], method=name)]
    rows = table.main_cells(runs, "images", TINY)
    assert [row[0] for row in rows[1:]] == [
        "base, no training",
        "LLaVA",
        "Wings",
        "Wings; llm 5e-4",
    ]


def test_a_real_llm_is_imported_once_and_its_text_asked_by_likelihood():
    mine = ("--text", "my.txt")
    settings = dataclasses.replace(
        SETTINGS, base="smollm2", gguf="model.gguf", limit=5, language=mine
    )
    base, wings = plan.runs(OUT, ("base", "wings"), ("images",), (0,), settings)
    kinds = ["import", "stage 1", "stage 2", "evaluate", "language", "laws"]
    assert [job.kind for job in wings.jobs] == kinds
    assert [job.kind for job in base.jobs] == [kinds[0], *kinds[2:]]
    assert base.jobs[0] == wings.jobs[0]
    assert dataclasses.replace(base.jobs[0], makes=cases.ROOT).seconds == 0  # is there, as a whole
    assert base.jobs[0].seconds is None
    assert "--gguf=model.gguf" in wings.jobs[0].command
    imported = f"--config.init_from={OUT / 'imported' / 'base'}"
    assert imported in base.jobs[1].command
    assert imported in wings.jobs[1].command
    assert "--config=configs/stage2.py:smollm2_scenes" in wings.jobs[2].command
    assert " ".join(wings.jobs[4].command).endswith(
        f"evaluate language --checkpoint=wings={wings.folder} --text my.txt "
        f"--out {wings.folder}/language --limit 5"
    )


def test_perplexity_and_choices_are_columns_of_a_real_llm(tmp_path):
    found = {
        "perplexity": {"value": 31.2, "interval95": [30.0, 32.5], "passages": 9},
        "choices": {everyday.ALL: {"accuracy": 0.75, "interval95": [0.7, 0.8], "total": 4}},
    }
    (tmp_path / "language.json").write_text(json.dumps({"models": [found]}))
    scores = dict(RUNS[1].scores) | dict(results._language(tmp_path))
    base, llava = (dataclasses.replace(run, scores=scores) for run in RUNS[:2])
    header, *rows = table.main_cells([base, llava], "images", BASES["smollm2"])
    assert header[4:6] == ["perplexity of English", "multiple choice"]
    assert [row[4:6] for row in rows] == [["31.20 [30.00, 32.50]", "75.0 [70.0, 80.0]"]] * 2
    made = plots.write_plots(tmp_path, [base, llava], BASES["smollm2"], "")
    assert {path.name for path in made} == {"shift.png", "accuracy-images.png"}


# ---- running ----


def fake_run(
    folder: pathlib.Path, name: str, *codes: str, shared: Job | None = None
) -> ExperimentRun:
    jobs = [shared] if shared else []
    for number, code in enumerate(codes):
        job = Job("evaluate", folder / name / str(number), (sys.executable, "-c", code))
        jobs.append(job)
    return ExperimentRun(name, "images", 0, folder / name, tuple(jobs))


@pytest.fixture
def written(monkeypatch):
    """The names of the runs whose scores were gathered."""
    names = []

    def write(run: ExperimentRun) -> None:
        names.append(run.method)
        run.file.write_text("{}")

    monkeypatch.setattr(results, "write", write)
    return names


def test_what_is_done_is_not_done_again(tmp_path, written):
    add = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    runs = [fake_run(tmp_path, "one", add, add), fake_run(tmp_path, "two", add)]
    seen = []
    assert runner.go(runs, seen.append) == {}
    assert runner.go(runs, seen.append) == {}
    assert (tmp_path / "count").read_text() == "xxx"
    assert written == ["one", "two"]
    assert len(seen) == 2
    (tmp_path / "one" / "run.json").unlink()  # stopped before the scores were gathered
    runner.go(runs, seen.append)
    assert (tmp_path / "count").read_text() == "xxx"
    assert written == ["one", "two", "one"]


def test_a_failure_is_named_and_tried_again(tmp_path, written, capsys):
    switch = tmp_path / "switch"
    code = f"import os, sys; print('so it is'); sys.exit(not os.path.exists({str(switch)!r}))"
    shared = Job("stage 1", tmp_path / "first", (sys.executable, "-c", code))
    runs = [fake_run(tmp_path, name, "pass", shared=shared) for name in ("one", "two")]
    runs.append(fake_run(tmp_path, "three", "pass"))
    failed = runner.go(runs, lambda lost: None)
    assert list(failed) == ["one, images, seed 0", "two, images, seed 0"]
    assert set(failed.values()) == {f"exit status 1, see {shared.log}: so it is"}
    assert shared.log.read_text() == "so it is\n"  # once, though two runs need it
    assert written == ["three"]
    assert f"FAILED one, images, seed 0: exit status 1, see {shared.log}" in capsys.readouterr().out
    switch.touch()
    assert runner.go(runs, lambda lost: None) == {}
    assert written == ["three", "one", "two"]


def test_a_stopped_experiment_stops_its_command(tmp_path, written):
    """SIGTERM ends the child in the orderly way: it may save, and its job is not done."""
    saved = tmp_path / "saved"
    code = (
        "import os, pathlib, signal, sys, time\n"
        f"save = lambda *_: (pathlib.Path({str(saved)!r}).touch(), sys.exit(143))\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    run = fake_run(tmp_path, "one", code)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        runner.go([run], lambda lost: None)
    assert caught.value.code == 143
    assert saved.exists()
    assert run.jobs[0].seconds is None
    assert written == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_progress_counts_runs_and_foresees_the_rest(tmp_path):
    runs = [fake_run(tmp_path, name, "pass") for name in ("one", "two", "three")]
    training = Job("stage 2", tmp_path / "four", ("x",))
    runs.append(ExperimentRun("four", "images", 0, tmp_path / "four", (*runs[3:], training)))
    assert runner.progress(runs) == "0 of 4 runs done"
    for run, seconds in zip(runs[:2], (20, 40), strict=True):
        (job,) = run.jobs
        job.folder.mkdir(parents=True)
        job.note.write_text(json.dumps({"seconds": seconds}))
        run.file.write_text("{}")
    # 60 s for 2 runs; left are one like them, 30 s, and one of a kind not seen, 30 s as well
    assert runner.progress(runs) == "2 of 4 runs done, 0:30 a run, ETA 1:00"
    training.folder.mkdir()
    training.note.write_text(json.dumps({"seconds": 70}))  # of a run that is not done: 160 s in all
    assert runner.progress(runs) == "2 of 4 runs done, 0:40 a run, ETA 0:30"


# ---- the table ----


def scored(method: str, seed: int, pictures: float, text: float, regime: str = "images") -> Scored:
    def share(value: float) -> dict:
        return {"mean": value, "interval95": [value - 0.1, value + 0.1]}

    scores = {
        "scenes_images": {PICTURES.row: share(pictures)},
        "scenes_text": {NEVER.row: share(text), "plus": share(text)},
        "iit": {row: share(text) for row in iit.ROWS},
        "laws": {
            "shift": {"mean": 1 - text, "interval95": [0.9 - text, 1.1 - text]},
            "shift_after": {"mean": 1.0, "interval95": [None, None]},
        },
    }
    regime = "" if method == "base" else regime
    return Scored(method, regime, seed, 1000, 10.0, scores)


RUNS = [
    scored("base", 0, 0.1, 1.0),
    scored("llava", 0, 0.5, 0.4),
    scored("llava", 1, 0.6, 0.5),
    scored("llava", 2, 0.7, 0.9),
    scored("wings", 0, 0.6, 0.8),
    scored("wings", 2, 0.8, 0.9),
    scored("lora", 0, 0.3, 0.6, "replay"),
]


def test_means_and_intervals_are_those_of_student():
    found = results.estimate(results.of(RUNS, "llava", "images"), PICTURES)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t with 2 degrees of freedom, sd 0.1
    assert (found.mean, found.runs) == (pytest.approx(0.6), 3)
    assert (found.low, found.high) == pytest.approx((0.6 - half, 0.6 + half))
    single = results.estimate(results.of(RUNS, "base", "replay"), PICTURES)
    assert (single.mean, single.low, single.high, single.runs) == (0.1, 0.0, 0.2, 1)
    assert results.estimate([], PICTURES) == results.NONE


def test_differences_are_paired_by_seed():
    """Wings lacks seed 1; at 0 and 2 it is 0.4 and 0.0 better: mean 0.2, sd 0.2828."""
    found = results.difference(RUNS, "wings", "images", NEVER)
    half = 12.706204736174698 * math.sqrt(0.08) / math.sqrt(2)  # t with 1 degree of freedom
    assert (found.mean, found.runs) == (pytest.approx(0.2), 2)
    assert found.high - found.mean == pytest.approx(half)
    assert results.difference(RUNS, "lora", "replay", NEVER) == results.NONE  # nothing to pair


def answered(folder: pathlib.Path, words: str, right: str) -> pathlib.Path:
    """Writes answers to questions that are a letter each, "1" for a right one."""
    (folder / "scores").mkdir(parents=True)
    lines = [
        {"task": NEVER.task, "rows": [NEVER.row], "question": w, "truth": "", "right": r == "1"}
        for w, r in zip(words, right, strict=True)
    ]
    lines.append({"task": PICTURES.task, "rows": [], "question": "", "truth": "", "right": True})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "scores" / "answers-some.jsonl").write_text(text)
    return folder


def difference_of(tmp_path, words: str, wings: list[str], llava: list[str], other: str = ""):
    runs = []
    for name, given in (("wings", wings), ("llava", llava)):
        for seed, right in enumerate(given):
            folder = tmp_path / f"{words}-{other}" / name / str(seed)
            asked = other if other and name == "llava" else words
            run = scored(name, seed, 0.5, right.count("1") / len(right))
            runs.append(dataclasses.replace(run, folder=answered(folder, asked, right)))
    return results.difference(runs, "wings", "images", NEVER)


def test_a_difference_has_an_interval_over_the_questions(tmp_path):
    """By question, in the mean over seeds, Wings is 1, 1/2, 0 and 0 better."""
    wings, llava = ["1110", "1010"], ["0010", "0010"]
    found = difference_of(tmp_path, "abcd", wings, llava)
    values = [1.0, 0.5, 0.0, 0.0]
    half = 1.959963984540054 * statistics.stdev(values) / 2
    assert found.mean == pytest.approx(0.375)
    assert found.questions == pytest.approx((0.375 - half, 0.375 + half))
    text = table._shown(found, NEVER, sign="+")
    assert text == "+37.5 ±158.8 [-9.4, +84.4]"
    twice = difference_of(tmp_path, "aabb", wings, llava)  # two questions, each asked twice
    assert twice.questions[1] - twice.mean == pytest.approx(
        1.959963984540054 * math.sqrt((0.75**2 + 0.75**2) * 2) / 4
    )
    assert difference_of(tmp_path, "aaaa", wings, llava).questions is None  # nothing to compare
    assert difference_of(tmp_path, "abcd", wings, llava, "abce").questions is None
    assert results.difference(RUNS, "wings", "images", NEVER).questions is None  # no answers


def test_the_table_says_so():
    text = table.as_markdown(RUNS, SETTINGS, {"prefix, images, seed 0": "exit status 2"})
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
    text = table.as_markdown(RUNS, fast, {})
    assert "**This is the fast form**" in text
    assert "Here: 300 steps of stage 1, 100 steps of stage 2, 30 questions of a task, every" in text
    assert f"every training with `{flag}`." in text


def test_json_and_plots_are_whole(tmp_path):
    table.write_table(tmp_path, RUNS, SETTINGS, {})
    found = json.loads((tmp_path / "forgetting.json").read_text())
    row = found["table"]["images"]["llava"]["scores"]["laws"]["shift"]
    assert (row["mean"], row["over"], row["seeds"]) == (0.4, "seeds", 3)
    base = found["table"]["images"]["base"]["scores"]
    assert base["laws"]["shift"]["over"] == "probes"
    assert base["scenes_text"][NEVER.row]["over"] == "questions"
    assert base["laws"]["shift_after"]["over"] is None  # it has no interval
    assert [run["method"] for run in found["runs"]] == [run.method for run in RUNS]
    made = plots.write_plots(tmp_path, RUNS, TINY, "")
    assert {path.name for path in made} == {
        "shift.png",
        *(f"accuracy-{regime}.png" for regime in REGIMES),
        *(f"interleaved-{regime}.png" for regime in REGIMES),
    }
    for path in made:
        assert len(Image.open(path).convert("RGB").getcolors(1 << 24)) > 20
    assert plots.write_plots(tmp_path, [], TINY, "") == []


def test_the_base_alone_can_be_looked_at(tmp_path):
    text = table.as_markdown(RUNS[:1], SETTINGS, {"llava, images, seed 0": ""})
    assert "Runs that are not in yet: 1." in text
    assert text.count("| base, no training |") == 3
    (made,) = plots.write_plots(tmp_path, RUNS[:1], TINY, "")
    assert made.name == "accuracy-images.png"


def test_runs_are_read_in_the_order_of_the_table(tmp_path):
    for run in RUNS[::-1]:
        place = f"{run.regime}/{run.method}/seed-{run.seed}" if run.regime else run.method
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "run.json").write_text(json.dumps(run.plain()))
    assert results.read_scores(tmp_path) == RUNS
    assert all(run.folder for run in results.read_scores(tmp_path))
    assert results.read_scores(tmp_path / "nothing") == []


# ---- interleaved conversations ----


@pytest.fixture(scope="module")
def conversations():
    return iit.conversations(each=14)


def test_a_conversation_is_what_its_setting_says(conversations):
    assert [one.extra["setting"] for one in conversations[::14]] == list(iit.ROWS)
    for one in conversations:
        pattern = one.extra["setting"].strip("()").split(",")
        said = one.conversations
        assert [turn["from"] for turn in said] == ["human", "gpt"] * len(pattern)
        assert len(one.extra["kinds"]) == len(pattern)
        markers = ["V" if "<image>" in turn["value"] else "T" for turn in said[::2]]
        assert markers == pattern
        assert len(one.images) == pattern.count("V")
        last = one.extra["kinds"][-1]
        assert last in (iit.PICTURE_KINDS if pattern[-1] == "V" else iit.TEXT_KINDS)
        assert not skills.SKILLS[last].replayed if pattern[-1] == "T" else last != "sum"
    kinds = {one.extra["kinds"][-1] for one in conversations}
    assert kinds == {*iit.PICTURE_KINDS, *iit.TEXT_KINDS}


def test_earlier_turns_are_close_true_and_give_nothing_away(conversations):
    shared = []
    for one in conversations:
        *before, last = zip(one.conversations[::2], one.conversations[1::2], strict=True)
        question, truth = (turn["value"] for turn in last)
        for asked, answered in before:
            assert "\n" not in asked["value"]  # no description beside a picture
            assert asked["value"] != question
            assert answered["value"] in ("yes", "no") or answered["value"] not in truth.split()
            words = set(re.findall(r"\w+", asked["value"].lower()))
            shared.append(bool(words & set(re.findall(r"\w+", question.lower()))))
    assert sum(shared) > 0.9 * len(shared)
    riddles = {q: name for name, asked in skills.RIDDLES.items() for q in asked}
    said = [
        (human["value"], gpt["value"])
        for one in conversations
        for human, gpt in zip(one.conversations[::2], one.conversations[1::2], strict=True)
        if human["value"] in riddles
    ]
    assert said
    assert all(riddles[question] == answer for question, answer in said)


def test_pictures_are_of_held_out_glyphs(monkeypatch):
    seen = []
    render = drawings.render

    def spy(objects, glyphs):
        seen.append(glyphs)
        return render(objects, glyphs)

    monkeypatch.setattr(drawings, "render", spy)
    one = iit.conversations(each=1)[-1]
    assert seen
    assert all(glyphs is drawings.load_glyphs("test") for glyphs in seen)
    assert one.images[0].shape == (64, 64, 3)


def test_conversations_never_change(conversations):
    again = iit.conversations(each=14)
    assert [one.conversations for one in again] == [one.conversations for one in conversations]
    assert all(
        (a.images[0] == b.images[0]).all()
        for a, b in zip(again, conversations, strict=True)
        if a.images
    )


def test_the_last_question_is_what_is_scored():
    asked = tasks.read_questions(tasks.TASKS["iit"], None, limit=12)
    assert [question.labels for question in asked] == [(row,) for row in iit.ROWS for _ in "ab"]
    for question in asked:
        assert question.turns[-1]["from"] == "human"
        assert len(question.turns) == 2 * question.labels[0].count(",") + 1
        assert question.truth


# ---- the command ----


def run_command(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["forgetting", *map(str, flags)])
    cli.run_main("wings_jax.forgetting", forgetting.main)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "wings,wing"], "--methods: there is no 'wing'; there are base, llava"),
        (["--methods", ","], "--methods: names nothing"),
        (
            ["--regimes", "text"],
            "--regimes (--base tiny): there is no 'text'; there are images, replay",
        ),
        (["--seeds", "0,a"], "--seeds: '0,a' is no list of whole numbers"),
        (["--steps", "0"], "--steps: 0 is less than 1"),
        (["--limit", "0", "--fast"], "--limit: 0 is less than 1"),
        (["--data-root", "no/such"], "--data-root: no/such holds no scenes"),
        (["--confg.steps=3"], "'--confg.steps=3' is neither a flag nor --config.key=value"),
        (["--config.batch_size", "3"], "'--config.batch_size' is neither a flag nor"),
        (["--methods", "base@steps=3"], "--methods: there is no 'base@steps=3'"),
        (["--methods", "wings@steps=x"], "--methods: there is no 'wings@steps=x'"),
        (["--methods", "wings@steps=0"], "--methods: there is no 'wings@steps=0'"),
        (["--methods", "wings@optimzer.b1=1"], "wings@optimzer.b1=1: its config has no key optim"),
        (["--methods", "llava@model.rank.x=1"], "llava@model.rank.x=1: its config has no key"),
        (["--methods", "wings@seed=3"], "--methods: wings@seed=3: seed is set by the experiment"),
        (["--base", "smollm2", "--regimes", "replay"], "(--base smollm2): there is no 'replay'"),
        (["--base", "smollm2", "--gguf", "no.gguf"], "--gguf: no.gguf is not a file"),
        (["--text", "no.txt"], "--text: the tiny LLM knows no English; add --base smollm2"),
        (["--gguf", "no.gguf"], "--gguf: the tiny base has its LLM with it"),
        (["--config.seed=3"], "--config.seed=3: seed is set by the experiment itself"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, tmp_path, flags, message):
    monkeypatch.chdir(cases.ROOT)
    with pytest.raises(SystemExit) as caught:
        run_command(monkeypatch, "--out", tmp_path / "out", *flags)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_folder_is_of_one_choice_of_settings(tmp_path, monkeypatch):
    new = tmp_path / "new"
    for _ in range(2):
        with plan.claim(new, SETTINGS):
            assert (new / "settings.json").is_file()
    other = dataclasses.replace(SETTINGS, is_fast=True, steps=100)
    refused = {
        r"other settings \(is_fast: False -> True; steps: None": (new, other),
        "exists and holds no experiment": (cases.ROOT / "configs", SETTINGS),
        "--out: cannot write to": (tmp_path / "file" / "out", SETTINGS),
    }
    (tmp_path / "file").touch()
    for message, (out, settings) in refused.items():
        with pytest.raises(UserError, match=message), plan.claim(out, settings):
            pass
    (tmp_path / "another.safetensors").write_text("weights of another base")
    with monkeypatch.context() as patch:
        patch.setattr(plan, "_weights", lambda half: str(tmp_path / "another.safetensors"))
        message = r"other settings \(weights: "
        with pytest.raises(UserError, match=message), plan.claim(new, SETTINGS):
            pass
    (new / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is damaged"), plan.claim(new, SETTINGS):
        pass


def test_other_data_in_the_same_place_are_other_settings(tmp_path):
    def settings_with(pictures: int) -> plan.ExperimentSettings:
        (tmp_path / "scenes.json").write_text(json.dumps({"pictures": pictures}))
        plan.digest.cache_clear()
        return dataclasses.replace(SETTINGS, files=plan.digest(str(tmp_path / "scenes.json")))

    with plan.claim(tmp_path / "out", settings_with(6)):
        pass
    other = settings_with(7)
    with pytest.raises(UserError, match=r"settings \(files: "), plan.claim(tmp_path / "out", other):
        pass


def test_two_experiments_never_work_in_one_folder(tmp_path):
    with (
        plan.claim(tmp_path, SETTINGS),
        pytest.raises(UserError, match="another experiment is at work in"),
        plan.claim(tmp_path, SETTINGS),
    ):
        pass
    with plan.claim(tmp_path, SETTINGS):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)  # as the runner starts them
    with pytest.raises(UserError, match="another experiment"), plan.claim(tmp_path, SETTINGS):
        pass
    child.kill()
    child.wait()
    with plan.claim(tmp_path, SETTINGS):
        pass


def test_it_runs_at_the_root_of_the_repository(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "--fast")
    assert "configs/stage1.py is not here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_experiment(monkeypatch, capsys, tmp_path):
    """Two methods of two steps, from nothing to the table; a third that fails; all of it again."""
    monkeypatch.chdir(cases.ROOT)
    assert len(jax.devices()) == 8  # of this process, whatever its children are told
    monkeypatch.delenv("XLA_FLAGS")  # one device, as the children have nothing to share out
    folder, out = cases.folder(layers=3), tmp_path / "out"
    flags = ["--out", out, "--data-root", folder / "scenes", "--seeds", "0", "--regimes", "images"]
    flags += ["--steps", "2", "--stage1-steps", "2", "--limit", "6"]
    model = {"model.llm": folder / "llm", "model.vision": folder / "vision", "model.rank": 4}
    quick = {"batch_size": 8, "optimizer.name": "adamw", "data.threads": 1}
    flags += [f"--config.{key}={value}" for key, value in (model | quick).items()]
    run_command(monkeypatch, *flags, "--methods", "base,frozen_llm")
    said = capsys.readouterr().out
    assert "2 of 2 runs done" in said
    assert "Wings, frozen LLM" in said
    found = json.loads((out / "forgetting.json").read_text())
    base, frozen = (found["table"]["images"][name] for name in ("base", "frozen_llm"))
    assert base["trained"] == 0 < frozen["trained"]
    assert set(base["scores"]) == {*tasks.TASKS, "laws"}
    assert base["scores"]["scenes_text"] == {
        row: {**score, "against_reference": score["against_reference"]}
        for row, score in frozen["scores"]["scenes_text"].items()
    }  # the LLM is frozen: the same answers
    assert 0 <= frozen["scores"]["laws"][SHIFT.row]["mean"] <= 2
    assert found["missing"] == {}
    assert (out / "accuracy-images.png").is_file()
    assert not list(out.rglob("*.tmp"))

    # Another method joins; its first stage is spoiled, so it fails, and nothing else is run anew.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("run.json")}
    spoiled = out / "stage1" / "llava_stage1" / "seed-0"
    shutil.copytree(out / "stage1" / "stage1" / "seed-0", spoiled)
    (spoiled / "train.done.json").unlink()
    with pytest.raises(SystemExit) as caught:
        run_command(monkeypatch, *flags, "--methods", "base,frozen_llm,llava")
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert "1 of 3 runs failed (llava, images, seed 0)" in told.err
    assert f"see {spoiled / 'train.log'}: wings_jax.train: --workdir: {spoiled} was" in told.out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("run.json")} == before
