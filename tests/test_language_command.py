"""`evaluate language` by command: reports, a user's files, and errors in one line."""

from __future__ import annotations

import json
import sys

import inference_cases as cases
import pytest
from language_cases import SENTENCE

from wings_jax import cli, evaluate
from wings_jax.errors import UserError
from wings_jax.evaluation import everyday, prose

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
GOOD = {"id": "a", "question": "Up?", "choices": ["yes", "no"], "answer": 1}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return cases.write_checkpoint(tmp_path_factory.mktemp("run") / "random")


def run_command(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, flags)])
    cli.run_main("python -m wings_jax.evaluate", evaluate.main)


def test_the_command_compares_models(workdir, tmp_path, monkeypatch, capsys):
    other = cases.write_checkpoint(tmp_path / "other", "plain")
    flags = ["language", "--base", f"old={workdir}", "--checkpoint", f"same={workdir}", other]
    out = tmp_path / "out"
    run_command(monkeypatch, *flags, "--limit", 4, "--batch-size", 2, "--out", out)
    output = capsys.readouterr().out
    assert "ratio to old" in output
    assert "tensorflow_datasets" in output
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"choices-{name}.jsonl" for name in ("old", "other", "same")),
        "language.json",
        "language.md",
        "old",
        "other",
        "same",
    ]
    scores = json.loads((out / "old" / "language_text.json").read_text())["scores"]
    assert set(scores) == {"perplexity"}
    old, same, plain = json.loads((out / "language.json").read_text())["models"]
    text = prose.installed_text().subset(4)
    assert old["perplexity"] == same["perplexity"]
    assert old["perplexity"]["sha256"] == plain["perplexity"]["sha256"] == text.sha256
    assert old["perplexity"]["passages"] == 4
    assert old["perplexity"]["value"] != plain["perplexity"]["value"]
    low, high = old["perplexity"]["interval95"]
    assert low <= old["perplexity"]["value"] <= high
    assert same["change"]["perplexity"] == {"ratio": 1.0, "interval95": [1.0, 1.0]}
    assert plain["change"]["perplexity"]["ratio"] == pytest.approx(
        plain["perplexity"]["value"] / old["perplexity"]["value"], rel=1e-4
    )
    assert same["change"]["choices"][everyday.ALL]["change"] == 0
    lines = [json.loads(line) for line in (out / "choices-other.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert plain["choices"][everyday.ALL]["total"] == 4
    assert plain["choices"][everyday.ALL]["right"] == sum(line["right"] for line in lines)
    for line in lines:
        sums = {one["text"]: one["logprob"] for one in line["choices"]}
        means = {one["text"]: one["logprob"] / one["tokens"] for one in line["choices"]}
        assert line["answer"] == max(sums, key=sums.get)
        assert line["answer_per_token"] == max(means, key=means.get)
    markdown = (out / "language.md").read_text()
    assert markdown.startswith("# Language\n")
    assert f"| **{everyday.ALL}** | **4** |" in markdown


def test_the_command_reads_a_users_files(workdir, tmp_path, monkeypatch, capsys):
    text, choices = tmp_path / "text.txt", tmp_path / "mine.jsonl"
    text.write_text(SENTENCE * 2)
    choices.write_text(json.dumps(GOOD | {"kind": "odd kind"}))
    flags = ["language", "--checkpoint", workdir, "--text", text, "--choices", choices]
    run_command(monkeypatch, *flags)
    output = capsys.readouterr().out
    assert f"{text}, 1 passages" in output
    assert "odd kind" in output
    assert "Change" not in output
    assert sorted(tmp_path.iterdir()) == [choices, text]


def test_forgetting_has_the_change_of_the_text(workdir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    flags = ["forgetting", "--base", f"old={workdir}", "--checkpoint", f"new={workdir}"]
    flags += ["--tasks", "language_text,language_choices", "--limit", 4, "--out", out]
    run_command(monkeypatch, *flags)
    assert "1.0000 [1.0000, 1.0000]" in capsys.readouterr().out
    changes = json.loads((out / "forgetting.json").read_text())["old -> new"]
    (text,) = (change for change in changes if change["task"] == "language_text")
    assert (text["n"], text["ratio"], text["interval95"]) == (4, 1.0, [1.0, 1.0])
    assert "| language_text | 4 |" in (out / "forgetting.md").read_text()


def test_both_measures_are_tasks_among_others(workdir, tmp_path, monkeypatch, capsys):
    """In one report, resumed after the first task; another text replaces the result."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(SENTENCE * 2)
    flags = ["--checkpoint", f"m={workdir}", "--out", out, "--limit", 4, "--batch-size", 2]
    flags += ["--tasks", "language_text,language_choices", "--text", text]
    run_command(monkeypatch, *flags)
    assert "language_text perplexity*" in capsys.readouterr().out
    report = (out / "report.json").read_bytes()
    found = json.loads(report)["tasks"]
    perplexity = found["language_text"][0]["scores"]["perplexity"]
    assert perplexity["micro"]["n"] == 1
    assert perplexity["micro"]["value"] > 1
    assert found["language_choices"][0]["scores"]["ll"]["groups"][everyday.ALL]["n"] == 4

    (out / "m" / "language_choices.json").unlink()
    (out / "report.json").unlink()
    run_command(monkeypatch, *flags)
    assert (out / "report.json").read_bytes() == report
    text.write_text(SENTENCE * 3)
    run_command(monkeypatch, *flags)
    again = json.loads((out / "report.json").read_text())["tasks"]["language_text"][0]
    assert again["scores"]["perplexity"] != perplexity


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["language", "--tasks", "iit"], "--tasks is not for `language`"),
        (["language", "--picture", "x.png"], "--figure is not for `language`"),
        (["language", "--data-root", "x"], "--data-root is not for `language`"),
        (["--text", "FILE"], "--text is for `language` only"),
        (["forgetting", "--choices", "FILE"], "--choices is for `language` only"),
        (["language", "--limit", "0"], "--limit: 0 is less than 1"),
        (["language", "--text", "no/such"], "--text: cannot read no/such: No such file"),
        (["language", "--text", "LATIN"], "latin.txt is not UTF-8 text (byte 0xe9 at position 1)"),
        (["language", "--text", "SHORT"], "short.txt: 11 characters, fewer than 40"),
        (["language", "--text", "EMPTY"], "empty.txt: 0 characters, fewer than 40"),
        (["language", "--choices", "no/such"], "--choices: cannot read no/such: No such file"),
        (
            ["language", "--choices", "LATIN"],
            "latin.txt is not UTF-8 text (byte 0xe9 at position 1)",
        ),
        (["language", "--choices", "EMPTY"], "empty.txt contains no question"),
        (["language", "--out", "SHORT/x"], "--out: cannot write"),
        (["language", "--text", "POINTER"], "pointer.txt is a git-lfs pointer, not the file"),
        (["language", "--choices", "POINTER"], "pointer.txt is a git-lfs pointer, not the file"),
        (["language", "--text", "a\0b"], "--text: 'a\\x00b' has a null character"),
        (["language", "--choices", "\udce9.jsonl"], r"--choices: '\udce9.jsonl' is not UTF-8"),
        (["language", "--out", "\udce9"], r"--out: '\udce9' is not UTF-8"),
        (["--checkpoint", "a\0b"], r"--checkpoint: 'a\x00b' has a null character"),
        (["--checkpoint", "\udce9=x"], r"--checkpoint: '\udce9=x' is not UTF-8"),
    ],
)
def test_user_errors_are_one_line(workdir, tmp_path, monkeypatch, capsys, flags, message):
    made = {"LATIN": b"d\xe9j\xe0", "SHORT": b"all is well", "EMPTY": b"\n", "POINTER": POINTER}
    for name, content in made.items():
        (tmp_path / f"{name.lower()}.txt").write_bytes(content)
    known = {name: tmp_path / f"{name.lower()}.txt" for name in made}
    known["SHORT/x"] = known["SHORT"] / "x"
    flags = [known.get(flag, flag) for flag in flags]
    with pytest.raises(SystemExit) as caught:
        run_command(monkeypatch, *flags, "--checkpoint", workdir)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_without_the_package_the_text_is_required(monkeypatch):
    monkeypatch.setitem(sys.modules, prose.PACKAGE, None)
    with pytest.raises(UserError, match="--text is missing"):
        prose.installed_text()
