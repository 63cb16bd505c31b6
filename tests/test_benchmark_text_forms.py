"""Text benchmarks in every form of their files, with the oddities of the real ones."""

from __future__ import annotations

import json

import pytest
from benchmark_files import (
    BOM,
    facts,
    read,
    write,
    write_arrow,
    write_lines,
    write_parquet,
    write_table,
)

ABCD = ["one", "two", "three", "four"]
DEV = [[f"Dev {number}?", *ABCD, "A"] for number in range(5)]


def mmlu_header(root):
    head = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
    dev = [[*row[:5], 0] for row in DEV]
    write_table(root, "mmlu/dev/sociology_dev.csv", [head, *dev])
    rows = [[" Two\nlines? ", "0", "None", "nan", "4", 1], ["Q", *ABCD, 3]]
    write_table(root, "mmlu/test/sociology_test.csv", [head, *rows], mark=BOM)


def mmlu_original(root):
    write_table(root, "mmlu/data/dev/sociology_dev.csv", DEV)
    rows = [[" Two\nlines? ", "0", "None", "nan", "4", "B"], ["Q", *ABCD, "D"]]
    write_table(root, "mmlu/data/test/sociology_test.csv", rows, end="\r\n")


def mmlu_parquet(root, writer=write_parquet, name="mmlu/all/{}-00000-of-00001.parquet"):
    dev = [
        {"question": row[0], "subject": "sociology", "choices": ABCD, "answer": 0} for row in DEV
    ]
    rows = [
        {"question": " Two\nlines? ", "choices": ["0", "None", "nan", "4"], "answer": 1},
        {"question": "Q", "choices": ABCD, "answer": 3},
    ]
    writer(root, name.format("dev"), dev)
    writer(root, name.format("test"), [{**row, "subject": "sociology"} for row in rows])


def mmlu_arrow(root):
    mmlu_parquet(root, write_arrow, "hf_arrow/mmlu/all/{}/data-00000-of-00001.arrow")


@pytest.mark.parametrize("form", [mmlu_header, mmlu_original, mmlu_parquet, mmlu_arrow])
def test_mmlu(form, tmp_path):
    form(tmp_path)
    data = read("mmlu", tmp_path)
    assert [facts(item) for item in data.items] == [
        ("Two\nlines?", ("0", "None", "nan", "4"), 1),
        ("Q", tuple(ABCD), 3),
    ]
    assert {item.group for item in [*data.items, *data.shots]} == {"sociology"}
    assert [item.question for item in data.shots] == [f"Dev {number}?" for number in range(5)]
    assert len(data.files) == 2


def test_cmmlu(tmp_path):
    head = ["", "Question", "A", "B", "C", "D", "Answer"]
    rows = [
        [0, "下列正确的是", "甲", "乙", "丙", "丁", "C"],
        [1, "问，题", "1", "2", "3", "4", "A"],
    ]
    write_table(tmp_path, "cmmlu/test/agronomy.csv", [head, *rows], mark=BOM, end="\r\n")
    dev = [[number, "例", "1", "2", "3", "4", "B"] for number in range(5)]
    write_table(tmp_path, "cmmlu/dev/agronomy.csv", [head, *dev])
    data = read("cmmlu", tmp_path)
    assert facts(data.items[0]) == ("下列正确的是", ("甲", "乙", "丙", "丁"), 2)
    assert data.items[0].extra["subject_zh"] == "农学"
    assert (data.items[0].group, len(data.shots)) == ("agronomy", 5)


ARC = [
    ("1", "Four?", [("A", "w"), ("B", "x"), ("C", "y"), ("D", "z")], "C", 2),
    ("2", "Numbers?", [("1", "w"), ("2", "x"), ("3", "y"), ("4", "z")], "4", 3),
    ("3", "Three?", [("A", "w"), ("B", "x"), ("C", "y")], "A", 0),
    ("4", "Five?", [("A", "v"), ("B", "w"), ("C", "x"), ("D", "y"), ("E", "z")], "E", 4),
]


@pytest.mark.parametrize("level", ["easy", "challenge"])
@pytest.mark.parametrize("form", ["original", "parquet", "arrow"])
def test_arc(level, form, tmp_path):
    title = level.title()
    if form == "original":
        rows = [
            {
                "id": name,
                "question": {
                    "stem": question,
                    "choices": [{"text": text, "label": label} for label, text in choices],
                },
                "answerKey": key,
            }
            for name, question, choices, key, _ in ARC
        ]
        name = f"ARC/ARC-{level[0]}/ARC-{title}-Test.jsonl"
        write_lines(tmp_path, name, rows, mark=BOM, end="\r\n")
    else:
        rows = [
            {
                "id": name,
                "question": question,
                "choices": {
                    "text": [text for _, text in choices],
                    "label": [label for label, _ in choices],
                },
                "answerKey": key,
            }
            for name, question, choices, key, _ in ARC
        ]
        if form == "parquet":
            write_parquet(tmp_path, f"ai2_arc/ARC-{title}/test-00000-of-00001.parquet", rows)
        else:
            write_arrow(tmp_path, f"hf_arrow/ai2_arc/ARC-{title}/test/data-0.arrow", rows)
    data = read(f"arc_{level}", tmp_path)
    assert [item.answer for item in data.items] == [case[4] for case in ARC]
    assert [len(item.options) for item in data.items] == [4, 4, 3, 5]
    assert [item.id for item in data.items] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("form", ["original", "parquet"])
def test_winogrande(form, tmp_path):
    rows = [
        {
            "qID": "x-1",
            "sentence": "The cup did not fit in the bag as the _ was too big.",
            "option1": "cup",
            "option2": "bag",
            "answer": "1",
        },
        {"qID": "x-2", "sentence": "_'s hat.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        {"qID": "x-3", "sentence": "A _ b.", "option1": "c", "option2": "d", "answer": ""},
    ]
    if form == "original":
        write_lines(tmp_path, "winogrande/dev.jsonl", rows)
    else:
        write_parquet(tmp_path, "winogrande/winogrande_xl/validation-0.parquet", rows)
    items = read("winogrande", tmp_path).items
    assert [item.answer for item in items] == [0, 1, None]
    assert items[0].options == ("cup", "bag")
    assert items[0].extra["tail"] == "was too big."


def openbookqa_rows(**more):
    texts = ["a marsh", "a tundra (cold)", "the plains", "a desert"]
    return [
        {
            "id": "8-343",
            "question": {
                "stem": 'Fog is likely in "',
                "choices": [
                    {"text": text, "label": label}
                    for text, label in zip(texts, "ABCD", strict=True)
                ],
            },
            "answerKey": "B",
            **more,
        }
    ]


@pytest.mark.parametrize("form", ["jsonl", "tsv", "parquet", "arrow"])
def test_openbookqa(form, tmp_path):
    (row,) = openbookqa_rows()
    choices = row["question"]["choices"]
    flat = {
        "id": row["id"],
        "question_stem": row["question"]["stem"],
        "choices": {
            "text": [choice["text"] for choice in choices],
            "label": [choice["label"] for choice in choices],
        },
        "answerKey": "B",
    }
    if form == "jsonl":
        write_lines(tmp_path, "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl", [row])
    elif form == "tsv":
        cell = " ".join(f"({choice['label']}) {choice['text']}" for choice in choices)
        # The published file has bare quotes.
        text = "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n"
        text += f"8-343\t{flat['question_stem']}\t{cell}\t...\tB\n"
        write(tmp_path, "openbookqa_tsv/Main/test.tsv", text)
    elif form == "parquet":
        write_parquet(tmp_path, "openbookqa/main/test-00000-of-00001.parquet", [flat])
    else:
        write_arrow(tmp_path, "hf_arrow/openbookqa/main/test/data-00000-of-00001.arrow", [flat])
    (item,) = read("openbookqa", tmp_path).items
    assert item.id == "8-343"
    expected = ("a marsh", "a tundra (cold)", "the plains", "a desert")
    assert facts(item) == ('Fog is likely in "', expected, 1)


def test_openbookqa_with_fact(tmp_path):
    rows = openbookqa_rows(fact1="fog forms over wet land")
    write_lines(tmp_path, "openbookqa/Additional/test_complete.jsonl", rows)
    (item,) = read("openbookqa_fact", tmp_path).items
    assert item.extra["fact1"] == "fog forms over wet land"


@pytest.mark.parametrize("level", ["middle", "high"])
@pytest.mark.parametrize("form", ["txt", "opencompass", "parquet"])
def test_race(level, form, tmp_path):
    questions, answers = ["What?", "Why?"], ["B", "D"]
    flat = [
        {"article": "Once.", "question": question, "options": ABCD, "answer": answer}
        for question, answer in zip(questions, answers, strict=True)
    ]
    if form == "txt":
        article = {
            "article": "Once.",
            "questions": questions,
            "options": [ABCD, ABCD],
            "answers": answers,
            "id": f"{level}1.txt",
        }
        write(tmp_path, f"RACE/test/{level}/1.txt", json.dumps(article))
    elif form == "opencompass":
        write_lines(tmp_path, f"race/test/{level}.jsonl", flat)
    else:
        write_parquet(tmp_path, f"race/{level}/test-00000-of-00001.parquet", flat)
    items = read(f"race_{level}", tmp_path).items
    assert [facts(item) for item in items] == [("What?", tuple(ABCD), 1), ("Why?", tuple(ABCD), 3)]
    assert {item.cluster for item in items} == {"Once."}
    assert items[0].extra["article"] == "Once."


@pytest.mark.parametrize("form", ["strings", "booleans", "parquet"])
def test_wsc(form, tmp_path):
    target = {
        "span1_index": 0,
        "span1_text": "Mark",
        "span2_index": 4,
        "span2_text": "he",
    }
    text = "Mark said to Pete he was late."  # "he" is word 4
    labels = {"strings": ("true", "false"), "booleans": (True, False), "parquet": (1, 0)}[form]
    rows = [
        {"idx": number, "text": text, "target": target, "label": label}
        for number, label in enumerate(labels)
    ]
    if form == "parquet":
        flat = [{"idx": row["idx"], "text": text, **target, "label": row["label"]} for row in rows]
        write_parquet(tmp_path, "super_glue/wsc.fixed/validation-00000-of-00001.parquet", flat)
    else:
        write_lines(tmp_path, "WSC/val.jsonl", rows)
    items = read("wsc", tmp_path).items
    assert [item.answer for item in items] == [0, 1]
    assert items[0].question == "* Mark * said to Pete # he # was late."
    assert items[0].extra["starred"] == "Mark said to Pete *he* was late."
    assert items[0].options == ("Yes", "No")


def test_cluewsc(tmp_path):
    target = {"span1_index": 0, "span1_text": "小明", "span2_index": 5, "span2_text": "他"}
    rows = [
        {"target": target, "idx": 1, "label": label, "text": "小明说因为他累"}
        for label in ("true", "false")
    ]
    write_lines(tmp_path, "FewCLUE/cluewsc/test_public.json", rows)
    items = read("cluewsc", tmp_path).items
    assert [item.answer for item in items] == [0, 1]
    assert (items[0].options, items[0].extra["span2"]) == (("是", "否"), "他")
    assert [item.id for item in items] == ["1", "1#2"]


def test_chid(tmp_path):
    idioms = ["一心一意", "二话不说", "三心二意", "四面八方", "五光十色", "六神无主", "七上八下"]
    rows = [{"id": 0, "candidates": idioms, "content": "他做事#idiom#。", "answer": 2}]
    write_lines(tmp_path, "FewCLUE/chid/test_public.json", rows)
    (item,) = read("chid", tmp_path).items
    assert facts(item) == ("他做事#idiom#。", tuple(idioms), 2)
