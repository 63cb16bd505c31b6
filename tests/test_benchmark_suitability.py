"""What cannot be asked is found before the first answer; what was repaired is asked again."""

from __future__ import annotations

import base64
import json
import re
import shutil

import inference_cases as cases
import pytest
from benchmark_files import png
from benchmark_runs import contents, run, write_data

from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import runner
from wings_jax.inference import jobs

AI2D = "AI2D/AI2D_TEST.tsv"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return cases.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def root(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def refuse_answers(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("an answer was computed")

    monkeypatch.setattr(runner, "run_task", refuse)


def break_images(root, rows: slice) -> None:
    """Puts text in place of the images of some rows of AI2D."""
    head, *lines = (root / AI2D).read_text().splitlines()
    junk = base64.b64encode(bytes(100)).decode()
    lines[rows] = [re.sub(r"\t[^\t]{64,}\t", f"\t{junk}\t", line) for line in lines[rows]]
    (root / AI2D).write_text("\n".join([head, *lines]) + "\n")


def evaluate(monkeypatch, checkpoint, root, out, tasks: str, *more: object) -> None:
    common = ["--data-root", root, "--out", out, "--batch-size", 2, "--protocols", "ll,generate"]
    run(monkeypatch, "--checkpoint", f"m={checkpoint}", "--tasks", tasks, *common, *more)


def test_a_later_task_that_does_not_fit_ends_the_run_before_the_first(
    root, checkpoint, tmp_path, monkeypatch, refuse_answers
):
    """An hour of answers to the first task would be spent before the mistake is found."""
    text_only = cases.write_checkpoint(tmp_path / "llm", parts=("decoder",))
    for model, tasks, shots, message in (
        (text_only, "mmlu,ai2d", 0, "ai2d: 4 items have images"),
        (checkpoint, "ai2d,mmlu", 5, "mmlu: 12 of 12 items do not fit the model's"),
    ):
        more = ["--shots", shots] if tasks == "mmlu,ai2d" else []
        with pytest.raises(UserError, match=message):
            evaluate(monkeypatch, model, root, tmp_path / "out", tasks, *more)
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_one_long_item_among_short_ones_is_counted(
    root, checkpoint, tmp_path, monkeypatch, refuse_answers
):
    with (root / "mmlu/test/colors_test.csv").open("a") as file:
        file.write(f"{'What is red? ' * 300},a,b,c,d,1\n")
    message = (
        r"mmlu: 1 of 13 items do not fit the model's \d+ positions \(.*\): leave the task out$"
    )
    with pytest.raises(UserError, match=message):
        evaluate(monkeypatch, checkpoint, root, tmp_path / "out", "mmlu", "--shots", 0)


def test_a_suite_runs_what_fits_the_positions(root, checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["--suite", "wings", "--data-root", root, "--protocols", "ll,generate"]
    run(monkeypatch, "--checkpoint", f"m={checkpoint}", *arguments, "--out", tmp_path / "out")
    assert "mmlu: 12 of 12 items do not fit" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["tasks"]) == ["ai2d"]
    assert any(line.startswith("mmlu: 12 of 12") for line in report["missing"])


def test_a_refused_run_does_not_stand_in_the_way_of_the_next(
    root, checkpoint, tmp_path, monkeypatch
):
    with pytest.raises(UserError, match="lower --shots"):
        evaluate(monkeypatch, checkpoint, root, tmp_path / "out", "mmlu")
    evaluate(monkeypatch, checkpoint, root, tmp_path / "out", "mmlu", "--shots", 2)
    assert (tmp_path / "out/m/mmlu.json").exists()


def test_without_any_image_a_task_is_refused_and_a_suite_lists_it(
    root, checkpoint, tmp_path, monkeypatch, capsys
):
    break_images(root, slice(0, 4))
    expected = f"ai2d: none of the images of 4 items can be read: .*{AI2D} row 2"
    with pytest.raises(UserError, match=expected):
        evaluate(monkeypatch, checkpoint, root, tmp_path / "out", "ai2d")

    arguments = ["--suite", "wings", "--data-root", root, "--protocols", "ll", "--shots", 0]
    run(monkeypatch, "--checkpoint", f"m={checkpoint}", *arguments)
    printed = capsys.readouterr().out
    assert re.search(expected, printed)
    assert "mmlu ll" in printed


def test_many_images_that_cannot_be_read_are_one_line(
    root, checkpoint, tmp_path, monkeypatch, capsys
):
    break_images(root, slice(1, 4))
    evaluate(monkeypatch, checkpoint, root, tmp_path / "out", "ai2d")
    report = (tmp_path / "out/report.md").read_text()
    for text in (capsys.readouterr().out, report):
        (line,) = (line for line in text.splitlines() if "count as wrong" in line)
        assert "ai2d: m: 3 items count as wrong: " in line
        assert line.endswith("(and 2 other causes, see report.json)")


def test_a_repaired_image_is_asked_by_the_same_command(root, checkpoint, tmp_path, monkeypatch):
    """Files beside the table are not in the hash of the data."""
    rows = [
        {"sentence": "Up?", "label": "true", "identifier": f"{n}-0", "directory": "1"}
        for n in range(3)
    ]
    (root / "nlvr/dev/images/1").mkdir(parents=True)
    (root / "nlvr/dev/dev.json").write_text("\n".join(map(json.dumps, rows)))
    images = [root / f"nlvr/dev/images/1/dev-{n}-0-0.png" for n in range(3)]
    source = png()
    for image in images:
        image.write_bytes(source)
    evaluate(monkeypatch, checkpoint, root, tmp_path / "whole", "nlvr")

    out = tmp_path / "out"
    images[1].write_bytes(b"not an image")
    evaluate(monkeypatch, checkpoint, root, out, "nlvr")
    broken = contents(out)
    evaluate(monkeypatch, checkpoint, root, out, "nlvr")  # still broken: nothing is computed
    assert contents(out) == broken

    # A run that is killed while it computes a result again is resumed as any other.
    images[1].write_bytes(source)
    with monkeypatch.context() as patch:
        patch.setattr(jobs.Journal, "add", lambda *entry: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate(patch, checkpoint, root, out, "nlvr")
    evaluate(monkeypatch, checkpoint, root, out, "nlvr")
    assert contents(out) == contents(tmp_path / "whole")

    # So is an entry of a journal.
    shutil.rmtree(out)
    images[1].write_bytes(b"not an image")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "collect_lines", lambda *task: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            evaluate(patch, checkpoint, root, out, "nlvr")
    assert '"error"' in (out / "m/nlvr.jsonl.partial").read_text()
    images[1].write_bytes(source)
    evaluate(monkeypatch, checkpoint, root, out, "nlvr")
    assert contents(out) == contents(tmp_path / "whole")
