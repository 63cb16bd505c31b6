"""HellaSwag, SIQA, PIQA, OCNLI, GSM8K and MBPP in every form of their files."""

from __future__ import annotations

import pytest
from benchmark_files import facts, read, write, write_arrow, write_lines, write_parquet

HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "source_id": "activitynet~v_1",
    "endings": ["is [substeps] ripping.", "is [title] holding.", "starts.", "is."],
}


@pytest.mark.parametrize("label", [3, "3"])
@pytest.mark.parametrize("form", ["original", "parquet", "opencompass"])
def test_hellaswag(form, label, tmp_path):
    endings = ["is ripping.", "is. holding.", "starts.", "is."]
    query = "Roof shingle removal: A man is sitting on a roof. He"
    if form == "original":
        rows = [{**HELLASWAG, "label": label}]
        write_lines(tmp_path, "hellaswag/hellaswag_val.jsonl", rows)
    elif form == "parquet":
        write_parquet(
            tmp_path, "hellaswag/data/validation-0.parquet", [{**HELLASWAG, "label": "3"}]
        )
    else:
        rows = [{"query": query, "choices": endings, "gold": label}]
        write_lines(tmp_path, "hellaswag/hellaswag.jsonl", rows)
    (item,) = read("hellaswag", tmp_path).items
    assert facts(item) == ("A man is sitting on a roof. He", tuple(endings), 3)
    assert item.extra["query"] == query


@pytest.mark.parametrize("form", ["original", "parquet"])
def test_siqa(form, tmp_path):
    row = {"context": "Ann left.", "question": "Why?"}
    row |= {"answerA": "tired", "answerB": "sad", "answerC": "late"}
    if form == "original":
        write_lines(tmp_path, "siqa/dev.jsonl", [row, row])
        write(tmp_path, "siqa/dev-labels.lst", "3\r\n1\r\n")
    else:
        rows = [{**row, "label": "3"}, {**row, "label": "1"}]
        write_parquet(tmp_path, "siqa/data/validation-0.parquet", rows)
    items = read("siqa", tmp_path).items
    assert [facts(item) for item in items] == [
        ("Why?", ("tired", "sad", "late"), 2),
        ("Why?", ("tired", "sad", "late"), 0),
    ]
    assert items[0].extra["context"] == "Ann left."


@pytest.mark.parametrize("form", ["original", "parquet", "arrow"])
def test_piqa(form, tmp_path):
    rows = [{"goal": "Open a jar", "sol1": "twist ", "sol2": "push"}] * 3
    if form == "original":
        write_lines(tmp_path, "piqa/valid.jsonl", rows)
        write(tmp_path, "piqa/valid-labels.lst", "1\n0\n1")
    labeled = [{**row, "label": label} for row, label in zip(rows, (1, 0, -1), strict=True)]
    if form == "parquet":
        write_parquet(tmp_path, "piqa/plain_text/validation-0.parquet", labeled)
    if form == "arrow":
        write_arrow(tmp_path, "hf_arrow/piqa/plain_text/validation/data-0.arrow", labeled)
    items = read("piqa", tmp_path).items
    hidden = 1 if form == "original" else None  # Hugging Face has -1 where the answer is withheld
    assert [item.answer for item in items] == [1, 0, hidden]
    assert facts(items[0]) == ("Open a jar", ("twist ", "push"), 1)


def test_ocnli_leaves_out_pairs_without_a_label(tmp_path):
    row = {"sentence1": "他来了", "sentence2": "他没来", "genre": "news"}
    labels = ("contradiction", "-", "entailment", "neutral")
    rows = [{**row, "label": label, "id": number} for number, label in enumerate(labels)]
    write_lines(tmp_path, "ocnli/dev.json", rows)
    data = read("ocnli", tmp_path)
    assert [item.answer for item in data.items] == [0, 1, 2]
    assert data.skipped == {"label is '-'": 1}
    assert data.items[0].options == ("矛盾", "蕴含", "无关")


@pytest.mark.parametrize("form", ["original", "parquet"])
def test_gsm8k(form, tmp_path):
    rows = [
        {"question": "How many?", "answer": "3 - 5 = -2\n#### -2"},
        {"question": "How much?", "answer": "1000 + 234\n#### 1,234"},
    ]
    if form == "original":
        write_lines(tmp_path, "gsm8k/test.jsonl", rows)
    else:
        write_parquet(tmp_path, "gsm8k/main/test-00000-of-00001.parquet", rows)
    items = read("gsm8k", tmp_path).items
    assert [item.answer for item in items] == ["-2", "1,234"]
    assert items[0].extra["solution"].startswith("3 - 5")


@pytest.mark.parametrize("form", ["original", "parquet"])
def test_mbpp(form, tmp_path):
    rows = [
        {
            "task_id": number,
            "text": f"Task {number}.",
            "code": "def f():\r\n  return 1",
            "test_list": ["assert f() == 1", "assert f()"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for number in (2, 3, 4, 10, 11, 510, 511)
    ]
    if form == "original":
        write_lines(tmp_path, "mbpp/mbpp.jsonl", rows)
    else:
        write_parquet(tmp_path, "mbpp/full/prompt-0.parquet", rows[:4])
        write_parquet(tmp_path, "mbpp/full/test-0.parquet", rows[4:6])
    data = read("mbpp", tmp_path)
    assert [item.id for item in data.items] == ["11", "510"]
    assert [item.id for item in data.shots] == ["2", "3", "4", "10"]
    assert data.items[0].answer == "def f():\n  return 1"
    assert data.items[0].extra["tests"] == ("assert f() == 1", "assert f()")
    assert data.items[0].extra["test_lines"] == "assert f() == 1\nassert f()"
