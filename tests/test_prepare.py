"""data.prepare: shards that are resumed, verified and the same however they are written."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny_data
from test_data_commands import call

from wings_jax.data import prepare, shards, sources
from wings_jax.errors import UserError

COUNT = 24


@pytest.fixture
def file(tmp_path):
    records = tiny_data.write_records(tmp_path, COUNT)
    return tiny_data.write_json(tmp_path / "x.json", records)


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    """Returns every file of a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def ids(directory: pathlib.Path) -> list[str]:
    source = sources.open_source(directory)
    return [source[index].id for index in range(len(source))]


def test_shards_hold_all_samples_in_order_and_the_card_describes_them(tmp_path, file):
    prepare.write_dataset(file, tmp_path / "out", shard_count=5)
    assert ids(tmp_path / "out") == [f"s{number}" for number in range(COUNT)]
    card = json.loads((tmp_path / "out/card.json").read_text())
    assert (card["samples"], card["text_only"], card["images"]) == (COUNT, COUNT // 3, COUNT)
    assert [shard["samples"] for shard in card["shards"]] == [4, 5, 5, 5, 5]
    assert card["source"]["file"] == str(file)
    assert "| images | 24 |" in (tmp_path / "out/README.md").read_text()
    assert prepare.verify(tmp_path / "out") == card


@pytest.mark.slow
def test_processes_write_the_same_bytes_as_one(tmp_path, file):
    prepare.write_dataset(file, tmp_path / "one", shard_count=3)
    prepare.write_dataset(file, tmp_path / "two", shard_count=3, workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_an_ended_run_goes_on_with_the_missing_shards(tmp_path, file, monkeypatch):
    out = tmp_path / "out"
    prepare.write_dataset(file, tmp_path / "whole", shard_count=4)
    write_shard, written = shards.write_shard, []

    def interrupt(job, number):
        if number == 2 and len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        return write_shard(job, number)

    monkeypatch.setattr(shards, "write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare.write_dataset(file, out, shard_count=4)
    assert not out.exists()

    # Other settings would mix two data sets.
    with pytest.raises(UserError, match=r"an unfinished run of other settings .*shards: 4 -> 3"):
        prepare.write_dataset(file, out, shard_count=3)

    partial = tmp_path / ".out.partial"
    stamps = {path: path.stat().st_mtime_ns for path in partial.glob("*array_record*")}
    (partial / ".123.stray").write_text("of a process that was killed")
    monkeypatch.undo()
    prepare.write_dataset(file, out, shard_count=4)
    assert len(stamps) == 2
    assert all((out / path.name).stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert contents(out) == contents(tmp_path / "whole")
    assert not partial.exists()


def test_a_bad_sample_keeps_the_finished_shards_for_skip_bad(tmp_path, file):
    records = json.loads(file.read_text())
    records[20] = {"id": "gone", "image": "no.png", "conversations": records[4]["conversations"]}
    tiny_data.write_json(file, records)
    with pytest.raises(
        UserError, match=r"sample gone: missing image: .*--skip-bad leaves them out"
    ):
        prepare.write_dataset(file, tmp_path / "out", shard_count=3)
    assert len(list((tmp_path / ".out.partial").glob("*array_record*"))) == 2

    tally = prepare.write_dataset(file, tmp_path / "out", shard_count=3, skip_bad=True)
    assert (tally.seen, tally.bad) == (COUNT, 1)
    assert "gone" not in ids(tmp_path / "out")
    assert len(ids(tmp_path / "out")) == COUNT - 1


def test_a_shard_of_bad_samples_only_is_empty(tmp_path, file):
    records = json.loads(file.read_text())
    for record in records[8:16]:
        record["image"] = "no.png"
        record["conversations"] = tiny_data.turns("<image>q", "a")
    tiny_data.write_json(file, records)
    prepare.write_dataset(file, tmp_path / "out", shard_count=3, skip_bad=True)
    assert len(ids(tmp_path / "out")) == COUNT - 8
    assert prepare.verify(tmp_path / "out")["left_out"]["bad"] == 8


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "has another sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "bytes, not"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_verify_names_the_damaged_shard(tmp_path, file, damage, message, monkeypatch, capsys):
    out = tmp_path / "out"
    prepare.write_dataset(file, out, shard_count=3)
    assert call(prepare, "--verify", out, monkeypatch=monkeypatch) == 0
    assert "24 samples in 3 shards are as they were written" in capsys.readouterr().out

    name = "conversations-train.array_record-00001-of-00003"
    damage(out / name)
    assert call(prepare, "--verify", out, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert f"--verify {out}: 1 of 3 shards are damaged: {name} " in error
    assert message in error

    assert call(prepare, "--verify", tmp_path, monkeypatch=monkeypatch) == 2
    assert "has no card.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    file = tiny_data.write_json(tmp_path / "x.json", tiny_data.write_records(tmp_path, 600))
    prepare.write_dataset(file, tmp_path / "whole", shard_count=60)
    command = [sys.executable, "-m", "wings_jax.data.prepare", str(file), "--shards", "60"]
    command += ["--out", str(tmp_path / "out"), "--workers", "2"]

    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    notes = tmp_path / ".out.partial" / shards.NOTES
    while not (notes.exists() and len(os.listdir(notes)) > 3) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()

    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
