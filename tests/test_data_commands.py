"""data.check and data.prepare through their command lines: output, files and exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_data
import transformers
from PIL import Image

from wings_jax import cli
from wings_jax.data import check, examples, inspection, prepare, samples, sources


def call(module, *arguments, monkeypatch) -> int:
    """Runs a command as `python -m` would; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    try:
        cli.run_main(f"python -m {module.__name__}", module.main)
    except SystemExit as ended:
        return ended.code or 0
    return 0


@pytest.fixture
def directory(tmp_path):
    records = tiny_data.write_records(tmp_path, 12)
    tiny_data.write_json(tmp_path / "good.json", records)
    records[4] = {"id": "gone", "image": "no.png", "conversations": records[4]["conversations"]}
    records[5]["conversations"] = records[5]["conversations"][:1]
    tiny_data.write_json(tmp_path / "bad.json", records)
    return tmp_path


@pytest.fixture
def tokenizer(tmp_path):
    backend = tiny_data.byte_tokenizer()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_check_of_good_data(directory, tokenizer, monkeypatch, capsys):
    limits = ("--sequence-length", 90, "--image-slots", 4)
    report = directory / "report.json"
    arguments = (directory / "good.json", "--tokenizer", tokenizer, *limits, "--output", report)
    assert call(check, *arguments, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "12 samples, 0 bad" in printed
    report_content = json.loads(report.read_text())
    assert report_content["images_per_sample"] == {"0": 4, "1": 4, "2": 4}
    assert (
        report_content["slots"]["least"]
        <= report_content["slots"]["median"]
        <= report_content["slots"]["most"]
    )
    assert report_content["slots"]["cut"] == sum(
        one.slots > 90
        for one in inspection.inspect_source(
            sources.open_source(directory / "good.json"), recipe_of(tokenizer)
        )
    )


def recipe_of(tokenizer):
    fast = transformers.AutoTokenizer.from_pretrained(tokenizer)
    settings = check.settings.DataConfig(sequence_length=90, images_per_row=8)
    return examples.make_recipe(settings, fast, inspection.ImageSlots(4))


def test_check_of_bad_data(directory, monkeypatch, capsys):
    report = directory / "report.json"
    arguments = (directory / "bad.json", "--output", report)
    assert call(check, *arguments, monkeypatch=monkeypatch) == 1
    printed = capsys.readouterr().out
    assert "12 samples, 2 bad" in printed
    assert f"gone: {directory / 'no.png'}" in printed
    causes = json.loads(report.read_text())["causes"]
    assert {cause: row["ids"] for cause, row in causes.items()} == {
        samples.MISSING_IMAGE: ["gone"],
        samples.NO_ANSWER: ["s5"],
    }


def test_check_names_the_form_and_what_does_not_fit(tmp_path, monkeypatch, capsys):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    deep = np.full((20, 30), 500, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    rows = [{"id": "a", "messages": talk, "images": ["deep.png"]}, {"goal": "q", "sol1": "a"}]
    rows.append({"id": "c", "img": "a.png", "conversations": tiny_data.turns("<image>q", "a")})
    path = tiny_data.write_json(tmp_path / "x.json", rows)
    report = tmp_path / "report.json"
    assert call(check, path, "--output", report, monkeypatch=monkeypatch) == 1
    printed = capsys.readouterr().out
    assert "record form        messages 1   none 1   conversations 1" in printed
    assert "<image> as a word  1 samples without images (first: c)" in printed
    assert f"1  {samples.UNKNOWN_FORM}\n             x.json#1: its keys are goal, sol1" in printed
    assert "scaled to 8 bits   I;16 1" in printed
    assert "largest image      600 pixels (a)\n" in printed
    assert json.loads(report.read_text())["images"] == {
        "scaled_to_8_bit": {"I;16": 1},
        "largest_pixels": 600,
        "largest_id": "a",
        "bytes_per_thread": 3600,
    }


def test_check_with_lengths_finds_what_is_cut_off(directory, tokenizer, monkeypatch, capsys):
    limits = ("--tokenizer", tokenizer, "--sequence-length", 40, "--images-per-row", 1)
    assert call(check, directory / "good.json", *limits, monkeypatch=monkeypatch) == 1
    printed = capsys.readouterr().out
    assert f"8  {samples.CUT_OFF}" in printed
    assert f"4  {samples.TOO_MANY_IMAGES}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.json",), "none.json does not exist"),
        (("good.json", "--images", "nowhere"), "image directory nowhere"),
        (("good.json", "--tokenizer", "nowhere"), "--tokenizer nowhere is not a directory"),
        (("good.json", "--fix", "bad.json"), "--fix bad.json exists"),
        (("good.json", "--config", "no.py"), "--config: no.py does not exist"),
        (("good.json", "--output", "good.json/x.json"), "good.json/x.json: cannot be written"),
    ],
)
def test_mistakes_on_the_command_line_of_check(directory, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(directory)
    assert call(check, *arguments, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("python -m wings_jax.data.check: ")
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["fixed.json", "fixed.jsonl"])
def test_check_fix_writes_the_good_records_as_they_were(directory, name, monkeypatch, capsys):
    path = directory / "bad.json"
    fix = ("--fix", directory / name, "--figure", directory / "histogram.png")
    assert call(check, path, *fix, monkeypatch=monkeypatch) == 1
    assert "10 good records" in capsys.readouterr().out

    before = json.loads(path.read_text())
    source = sources.open_source(directory / name)
    assert [source.record(i) for i in range(10)] == before[:4] + before[6:]
    with Image.open(directory / "histogram.png") as figure:
        assert figure.format == "PNG"

    assert call(check, directory / name, monkeypatch=monkeypatch) == 0
    again = call(check, path, "--fix", directory / name, monkeypatch=monkeypatch)
    assert again == 2, "an existing file is not replaced"


def test_check_with_a_config_measures_what_training_measures(directory, monkeypatch, capsys):
    """The tiny config has its own tokenizer, template, tower and sequence length."""
    path, report = directory / "good.json", directory / "report.json"
    config = ("--config", "configs/stage2.py", "--config.data.sequence_length=70")
    arguments = (path, *config, "--config.data.images_per_row=2", "--output", report)
    status = call(check, *arguments, monkeypatch=monkeypatch)
    content = json.loads(report.read_text())
    assert content["slots"]["sequence_length"] == 70
    assert status == (1 if content["bad"] else 0)

    from wings_jax.weights import starting

    fast = transformers.AutoTokenizer.from_pretrained(starting.base_directory("tiny", "llm"))
    settings = check.settings.DataConfig(sequence_length=70, images_per_row=2)
    recipe = examples.make_recipe(settings, fast, inspection.ImageSlots(16))  # the tiny tower
    findings = inspection.inspect_source(sources.open_source(path), recipe)
    assert content["slots"]["most"] == max(found.slots for found in findings if found.slots)


def test_check_in_processes_finds_the_same(directory):
    source = sources.open_source(directory / "bad.json")
    alone, shared = (inspection.inspect_source(source, workers=n) for n in (0, 2))
    assert [found.id for found in alone] == [found.id for found in shared]
    assert [str(found.reason) for found in alone] == [str(found.reason) for found in shared]


def test_prepare_refuses_and_writes_nothing(directory, monkeypatch, capsys):
    before = sorted(os.listdir(directory))
    out = directory / "deep" / "out"
    assert call(prepare, directory / "bad.json", "--out", out, monkeypatch=monkeypatch) == 2
    assert "sample gone: missing image" in capsys.readouterr().err
    assert call(prepare, directory / "bad.json", "--out", directory, monkeypatch=monkeypatch) == 2
    assert "exists" in capsys.readouterr().err
    name = ("--name", "Not A Name")
    assert call(prepare, directory / "good.json", "--out", out, *name, monkeypatch=monkeypatch) == 2
    assert sorted(set(os.listdir(directory)) - {"deep"}) == before
    assert not list((directory / "deep").glob("*"))


def test_prepare_then_check(directory, monkeypatch, capsys):
    out = directory / "out"
    arguments = (directory / "bad.json", "--out", out, "--skip-bad", "--split", "validation")
    assert call(prepare, *arguments, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr()
    assert "10 samples written" in printed.out
    assert "2 of 12 samples are bad" in printed.err
    assert call(check, out, "--split", "validation", monkeypatch=monkeypatch) == 0
    assert "10 samples, 0 bad" in capsys.readouterr().out
    assert call(check, out, monkeypatch=monkeypatch) == 2


@pytest.mark.slow
def test_the_commands_run_as_modules(directory):
    command = [sys.executable, "-m", "wings_jax.data.check", str(directory / "bad.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "12 samples, 2 bad" in ended.stdout
    command = [sys.executable, "-m", "wings_jax.data.prepare", str(directory / "good.json")]
    ended = subprocess.run(
        [*command, "--out", str(directory / "out")], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, f"12 samples written to {directory}/out")
