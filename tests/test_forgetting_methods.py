"""What the forgetting experiment compares, and the commands that it plans."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib

import pytest
import training_cases as cases
from forgetting_cases import OUT, RUNS, SETTINGS, TINY

from configs import replay
from wings_jax import config as config_lib
from wings_jax import serialization
from wings_jax.evaluation import everyday
from wings_jax.forgetting import methods, plan, plots, results, table
from wings_jax.forgetting.methods import BASES, METHODS, REGIMES
from wings_jax.forgetting.plan import ExperimentRun, Job


def read_config(name: str, preset: str = "tiny") -> config_lib.Config:
    return config_lib.from_config_dict(
        importlib.import_module(f"configs.{name}").get_config(preset)
    )


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_the_groups_of_their_config(name):
    method = METHODS[name]
    config = read_config(method.config)
    rates = config.optimizer.learning_rates
    trained = {group for group, rate in rates.items() if rate > 0}
    assert set(method.trained_groups) == (set() if method.steps == 0 else trained)
    assert pathlib.Path(config.init_from).name == method.first_stage
    if method.first_stage:
        assert not read_config(method.first_stage).init_from


def test_every_config_is_a_method_or_the_stage_before_one():
    used = {name for m in METHODS.values() for name in (m.config, m.first_stage) if name}
    files = {path.stem for path in (cases.ROOT / "configs").glob("*.py")}
    assert files - {"base", "replay"} == used
    assert {methods.BASE, methods.REFERENCE} <= set(METHODS)
    assert len({method.color for method in METHODS.values()}) == len(METHODS)


# Config keys of the model that a method changes from Wings, and the methods that may train shared
# groups at other rates.
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
    mine, wings = (serialization.to_dict(read_config(name, preset)) for name in names)
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


@pytest.mark.parametrize("name", [m.config for m in METHODS.values() if m.first_stage])
def test_replay_adds_text_and_changes_nothing_else(name):
    plain, mixed = read_config(name), config_lib.from_config_dict(replay.get_config(name))
    assert set(plain.data.sources) == set(REGIMES["images"].sources)
    assert set(mixed.data.sources) == set(REGIMES["replay"].sources)
    for source, file in REGIMES["replay"].sources.items():
        assert pathlib.Path(mixed.data.sources[source].path).name == f"{file}.json"
    keys = {difference.split(":")[0] for difference in config_lib.differences(plain, mixed)}
    keys = {key for key in keys if not key.startswith("data.sources.")}
    assert keys <= {"stage", "data.sequence_length"}


def test_replay_of_another_config_is_refused():
    for name in ("nothing", "base", "replay"):
        with pytest.raises(ValueError, match="is not one of"):
            replay.get_config(name)


def stages(runs: list[ExperimentRun], kind: str) -> list[Job]:
    return [job for run in runs for job in run.jobs if job.kind == kind]


def test_first_stages_are_shared():
    runs = plan.plan_runs(OUT, tuple(METHODS), tuple(REGIMES), (0, 1), SETTINGS)
    assert len(runs) == 1 + (len(METHODS) - 1) * len(REGIMES) * 2
    first = set(stages(runs, "stage 1"))
    assert {job.directory for job in first} == {
        OUT / "stage1" / name / f"seed-{seed}"
        for name in ("stage1", "llava_stage1")
        for seed in (0, 1)
    }
    assert len(first) == 4  # equal where the directory is
    last = stages(runs, "stage 2")
    assert len({job.directory for job in last}) == len(last) == len(runs)
    for run in runs:
        if METHODS[run.method].first_stage:
            before, training = run.jobs[:2]
            assert f"--config.init_from={before.directory}" in training.command
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
    base, run = plan.plan_runs(OUT, ("base", "lora"), ("replay",), (3,), settings)
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
    assert f"--checkpoint=lora={run.directory}" in laws.command
    plain = plan.plan_runs(OUT, ("lora",), ("images",), (0,), SETTINGS)[0].jobs[1].command
    assert not any(word.startswith(("--config.steps", "--config.data.scenes")) for word in plain)


def test_a_variant_changes_its_last_stage_only():
    name = "wings@optimizer.learning_rates.llm=5e-4@steps=9"
    steps = dataclasses.replace(SETTINGS, steps=7)
    (run,) = plan.plan_runs(OUT, (name,), ("images",), (0,), steps)
    first, last, evaluation, _ = run.jobs
    (plain,) = plan.plan_runs(
        OUT, ("wings",), ("images",), (0,), dataclasses.replace(SETTINGS, steps=7)
    )
    assert first == plain.jobs[0]
    assert set(last.command) - set(plain.jobs[1].command) == {
        f"--workdir={run.directory}",
        "--config.steps=9",
        "--config.optimizer.learning_rates.llm=5e-4",
    }
    assert "=" not in str(run.directory)  # checkpoints are given as NAME=DIR
    assert f"--checkpoint=wings={run.directory}" in evaluation.command
    method = methods.find_method(name)
    assert (method.title, method.config) == ("Wings; llm 5e-4, steps 9", "stage2")
    assert method.color != METHODS["wings"].color
    rate = "wings@optimizer.learning_rates.llm="
    assert methods.find_method(f"{rate}1.5e-3").title == "Wings; llm 1.5e-3"
    assert len({methods.find_method(f"{rate}{n}e-4").color for n in range(1, 10)}) == 9
    assert methods.choose_methods(f"{name},wings,llava", "--methods") == ("llava", "wings", name)


def test_a_variants_value_may_be_a_tuple():
    name = "frozen_llm@model.learner_layers=(0, 2)"
    assert methods.choose_methods(f"llava,{name}", "--methods") == ("llava", name)


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
    base, wings = plan.plan_runs(OUT, ("base", "wings"), ("images",), (0,), settings)
    kinds = ["import", "stage 1", "stage 2", "evaluate", "language", "laws"]
    assert [job.kind for job in wings.jobs] == kinds
    assert [job.kind for job in base.jobs] == [kinds[0], *kinds[2:]]
    assert base.jobs[0] == wings.jobs[0]
    assert dataclasses.replace(base.jobs[0], output=cases.ROOT).seconds == 0  # its output exists
    assert base.jobs[0].seconds is None
    assert "--gguf=model.gguf" in wings.jobs[0].command
    imported = f"--config.init_from={OUT / 'imported' / 'base'}"
    assert imported in base.jobs[1].command
    assert imported in wings.jobs[1].command
    assert "--config=configs/stage2.py:smollm2_scenes" in wings.jobs[2].command
    assert " ".join(wings.jobs[4].command).endswith(
        f"evaluate language --checkpoint=wings={wings.directory} --text my.txt "
        f"--out {wings.directory}/language --limit 5"
    )


def test_perplexity_and_choices_are_columns_of_a_real_llm(tmp_path):
    found = {
        "perplexity": {"value": 31.2, "interval95": [30.0, 32.5], "passages": 9},
        "choices": {everyday.ALL: {"accuracy": 0.75, "interval95": [0.7, 0.8], "total": 4}},
    }
    scores = dict(RUNS[1].scores) | dict(results._language_scores(found))
    base, llava = (dataclasses.replace(run, scores=scores) for run in RUNS[:2])
    header, *rows = table.main_cells([base, llava], "images", BASES["smollm2"])
    assert header[4:6] == ["perplexity of English", "multiple choice"]
    assert [row[4:6] for row in rows] == [["31.20 [30.00, 32.50]", "75.0 [70.0, 80.0]"]] * 2
    paths = plots.write_plots(tmp_path, [base, llava], BASES["smollm2"], "")
    assert {path.name for path in paths} == {"shift.png", "accuracy-images.png"}
