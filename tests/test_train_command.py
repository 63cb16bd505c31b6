"""The command line of train: changes of leaves, data files, configs of runs, and its help."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import typing

import pytest
import training_cases as cases

from wings_jax import config as config_lib
from wings_jax import serialization, train
from wings_jax.errors import UserError
from wings_jax.training import arguments, config_help

STAGE1 = f"--config={cases.ROOT}/configs/stage1.py"


def parse(*changes: str, config: str = STAGE1) -> config_lib.Config:
    return config_lib.from_config_dict(arguments.parse([config, *changes]).config)


@pytest.fixture(autouse=True)
def _warn_again():
    serialization._warn_renamed.cache_clear()


@pytest.mark.parametrize(
    ("change", "leaf", "value"),
    [
        ("--config.steps=7", "steps", 7),
        ("-config.epochs=2", "epochs", 2.0),
        ("--config.model.router=FALSE", "model.router", False),
        ("--noconfig.data.packing", "data.packing", False),
        ("--config.data.packing", "data.packing", True),
        ("--config.model.learner_layers=(0,2)", "model.learner_layers", [0, 2]),
        ("--config.model.learner_layers=3", "model.learner_layers", [3]),
        ("--config.model.lora_targets=('q',)", "model.lora_targets", ["q"]),
        ("--config.model.lora_targets=q,v", "model.lora_targets", ["q", "v"]),
        ("--config.optimizer.learning_rates.visual=1", "optimizer.learning_rates.visual", 1.0),
        ("--config.optimizer.no_decay=.*=.*", "optimizer.no_decay", ".*=.*"),
    ],
)
def test_command_line_sets_leaves_of_every_type(change, leaf, value):
    assert serialization.flatten(serialization.to_dict(parse(change)))[leaf] == value


def test_command_line_takes_values_as_separate_arguments():
    assert parse("--config.seed", "4", "--workdir", "there").seed == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--config.seed=1.5"], "--config.seed: '1.5' is not of type int"),
        (["--config.optimizer.b1=high"], "--config.optimizer.b1: 'high' is not of type float"),
        (["--config.model.router=maybe"], "--config.model.router: 'maybe' is not true or false"),
        (["--config.model.rnak=3"], "--config.model.rnak: no such key; did you mean rank?"),
        (["--config.seed.first=3"], "--config.seed.first: config.seed has no keys"),
        (["--config.model.learner_layers=q"], "--config.model.learner_layers[0]: 'q' is not of"),
        (["--data", "mine.json"], "--data mine.json: the form is NAME=FILE[:IMAGES][@WEIGHT]"),
        (["--data", "a=b.json@1e"], "--data a=b.json@1e: '1e' is not a weight"),
        (["--steps=3"], "unrecognized arguments: --steps=3"),
    ],
)
def test_command_line_errors_name_flag_and_value(changes, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        parse(*changes)


FORMER = {
    "keep": ("3", "max_checkpoints", 3),
    "optimizer.kind": ("adamw", "optimizer.name", "adamw"),
    "optimizer.clip": ("0.5", "optimizer.max_grad_norm", 0.5),
}


@pytest.mark.parametrize("former", FORMER)
def test_renamed_key_works_on_the_command_line_with_one_warning(former, caplog):
    text, leaf, value = FORMER[former]
    for _ in range(2):
        config = parse(f"--config.{former}={text}")
    assert serialization.flatten(serialization.to_dict(config))[leaf] == value
    (line,) = caplog.messages
    assert f"{former.split('.')[-1]} is now called {leaf.split('.')[-1]}" in line


@pytest.mark.parametrize("former", FORMER)
def test_renamed_key_works_in_a_config_file(former, tmp_path, caplog):
    text, leaf, value = FORMER[former]
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import stage1\n\n\n"
        "def get_config():\n"
        "    config = stage1.get_config()\n"
        f"    config.{former} = {text if text[0].isdigit() else repr(text)}\n"
        f"    assert config.{former} == config.{leaf}\n"
        "    return config\n"
    )
    config = parse(config=f"--config={file}")
    assert serialization.flatten(serialization.to_dict(config))[leaf] == value
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("former", FORMER)
def test_renamed_key_works_in_a_saved_config(former, tmp_path):
    _, leaf, value = FORMER[former]
    saved = json.loads(json.dumps(serialization.to_dict(parse())))
    node = saved["optimizer"] if "." in former else saved
    del node[leaf.split(".")[-1]]
    node[former.split(".")[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(saved))
    for given in (tmp_path, tmp_path / "config.json"):
        config = parse("--config.steps=3", config=f"--config={given}")
        assert serialization.flatten(serialization.to_dict(config))[leaf] == value
        assert config.steps == 3


def test_config_of_a_run_is_the_config_it_was_started_with(tmp_path):
    original = parse("--config.model.rank=7", "--config.optimizer.learning_rates.visual=0.5")
    (tmp_path / "config.json").write_text(json.dumps(serialization.to_dict(original)))
    again = parse(config=f"--config={tmp_path}/config.json")
    assert again == original
    assert list(again.optimizer.groups) == list(original.optimizer.groups)  # first match wins


def test_data_flag_replaces_the_sources():
    data = parse("--data", "b=/d/b.json:/images@0.25", "--data=a=/d/a.jsonl@0.75").data
    sources = {name: dataclasses.astuple(source) for name, source in data.sources.items()}
    assert sources == {
        "b": ("/d/b.json", "/images", 0.25, "all", "train"),
        "a": ("/d/a.jsonl", "", 0.75, "all", "train"),
    }
    assert list(sources) == ["b", "a"]
    assert data.scenes == ""


def test_data_leaves_add_a_source():
    data = parse("--config.data.sources.mine.path=/d/mine.json").data
    assert data.sources["mine"].path == "/d/mine.json"
    assert data.sources.keys() == {"scenes", "mine"}
    assert data.scenes == "runs/scenes"


def test_data_of_a_user_has_no_image_directory_of_the_scenes():
    data = parse("--config.data.sources.scenes.path=/d/mine.json").data
    assert (data.sources["scenes"].images, data.scenes) == ("", "")
    images = "--config.data.sources.scenes.images=/i"
    data = parse("--config.data.sources.scenes.path=/d/mine.json", images).data
    assert data.sources["scenes"].images == "/i"


def test_data_scenes_are_read_where_they_are_written():
    data = parse("--config.data.scenes=/d/scenes").data
    assert data.scenes == "/d/scenes"
    assert data.sources["scenes"].path == "/d/scenes/train_stage1.json"
    assert data.sources["scenes"].images == "/d/scenes/images"


def run_main(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    train.main()
    return capsys.readouterr().out


def test_help_lists_flags_leaves_and_presets(monkeypatch, capsys):
    text = run_main(monkeypatch, capsys, STAGE1, "--config.seed=5", "--help")
    assert "--data NAME=FILE[:IMAGES][@WEIGHT]" in text
    assert "qwen1_5_7b_clip" in text
    assert "  seed = 5\n      Seed of new parameters" in text
    for leaf in serialization.flatten(serialization.to_dict(parse())):
        name = leaf if not leaf.startswith("optimizer.groups") else "optimizer.groups"
        name = name if not leaf.startswith("optimizer.learn") else "optimizer.learning_rates"
        assert f"\n  {name} = " in text, leaf
    assert "\n  seed = 0\n" in run_main(monkeypatch, capsys, "--help")


def test_print_config_is_a_config(monkeypatch, capsys, tmp_path):
    text = run_main(monkeypatch, capsys, STAGE1, "--config.seed=5", "--print_config")
    (tmp_path / "config.json").write_text(text)
    assert parse(config=f"--config={tmp_path}/config.json") == parse("--config.seed=5")


def test_every_config_leaf_is_documented():
    def check(kind: type) -> None:
        docs = config_help.field_docs(kind)
        for name, hint in typing.get_type_hints(kind).items():
            assert len(docs.get(name, "")) >= 10, f"{kind.__name__}.{name}"
            for part in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(part):
                    check(part)

    check(config_lib.Config)
