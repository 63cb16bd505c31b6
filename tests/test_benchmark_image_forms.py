"""Every image benchmark in every form: images from files, bytes, base64, other rows."""

from __future__ import annotations

import json

import pytest
from benchmark_files import (
    BOM,
    facts,
    image_bytes,
    png,
    png64,
    read,
    write,
    write_image,
    write_parquet,
    write_table,
)

from wings_jax.evaluation.benchmarks import metrics

MCQ_HEAD = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]


def mmmu_row(number, question, options, answer, images=("red",)):
    row = {"id": f"validation_Math_{number}", "question": question, "options": str(options)}
    row |= {"answer": answer, "question_type": "multiple-choice" if options else "open"}
    for position in range(1, 8):
        color = images[position - 1] if position <= len(images) else None
        row[f"image_{position}"] = {"bytes": png(color), "path": f"{color}.png"} if color else None
    return row


def test_mmmu_parquet(tmp_path):
    rows = [
        mmmu_row(1, "<image 1> What?", ["it's", "None", "(1, 2)"], "B"),
        mmmu_row(2, "Compare <image 2> to <image 1>.", ["<image 1>", "no"], "A", ("red", "blue")),
        mmmu_row(3, "How fast?", [], "['24/7', '3.429']"),
        mmmu_row(4, "How many?", [], "4"),
    ]
    write_parquet(tmp_path, "MMMU/Math/validation-00000-of-00001.parquet", rows)
    items = read("mmmu", tmp_path).items
    assert facts(items[0]) == ("<image> What?", ("it's", "None", "(1, 2)"), 1)
    assert items[0].group == "Math"
    # Images are in the order of the markers, also of those in options.
    assert items[1].question == "Compare <image> to <image>."
    assert items[1].options == ("<image>", "no")
    assert image_bytes(items[1]) == [png("blue"), png("red"), png("red")]
    assert [item.answer for item in items[2:]] == [("24/7", "3.429"), "4"]
    assert image_bytes(items[3]) == [png("red")]
    # VLMEvalKit's lines of the options, which open questions do not have.
    assert items[0].extra["choices_block"].startswith("Options:\nA. it's\nB. None\n")
    assert items[2].extra["choices_block"] == ""


def test_mmmu_tsv_with_lists_of_base64(tmp_path):
    head = ["index", "question", "A", "B", "answer", "category", "split", "image"]
    both = str([png64("red"), png64("blue")])
    rows = [
        [1, "Is <image 2> like <image 1>?", "yes", "no", "A", "Art", "validation", both],
        [2, "What?", "yes", "no", "B", "Art", "dev", png64()],
        [3, "Say it.", "", "", "blue", "Art", "validation", png64("green")],
    ]
    write_table(tmp_path, "MMMU/MMMU_DEV_VAL.tsv", [head, *rows])
    items = read("mmmu", tmp_path).items
    assert [item.id for item in items] == ["1", "3"]
    assert image_bytes(items[0]) == [png("blue"), png("red")]
    assert (items[1].options, items[1].answer, items[1].group) == ((), "blue", "Art")
    assert image_bytes(items[1]) == [png("green")]


def test_mmmu_test_is_answered_but_not_scored(tmp_path):
    head = ["index", "question", "A", "B", "category", "split", "image"]
    write_table(
        tmp_path, "MMMU/MMMU_TEST.tsv", [head, [1, "What?", "a", "b", "Art", "test", png64()]]
    )
    (item,) = read("mmmu_test", tmp_path).items
    assert item.answer is None


def mmbench_rows():
    return [
        [241, 'Say "it"\nnow', "look", "w", "x", "y", "z", "D", "ocr", png64("red")],
        [7, "Two?", "", "yes", "no", "", "", "A", "ocr", png64("blue")],
        [1000241, 'Say "it"\nnow', "look", "z", "w", "x", "y", "A", "ocr", "241"],
        [1000007, "Two?", "", "no", "yes", "", "", "B", "ocr", "7"],
    ]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mmbench_en", "mmbench_en/MMBench_DEV_EN.tsv"),
        ("mmbench_en", "MMBench/mmbench_dev_20230712.tsv"),
        ("mmbench_cn", "MMBench/MMBench_DEV_CN.tsv"),
        ("mmbench_cn", "mmbench_cn/mmbench_dev_cn_20231003.tsv"),
    ],
)
@pytest.mark.parametrize("mark", ["", BOM])
def test_mmbench_rotations_share_the_image_of_their_base_row(name, file, mark, tmp_path):
    write_table(tmp_path, file, [MCQ_HEAD, *mmbench_rows()], mark=mark, end="\r\n")
    items = read(name, tmp_path).items
    assert [item.extra["circular"] for item in items] == [241, 7, 241, 7]
    assert [item.answer for item in items] == [3, 0, 0, 1]
    assert items[1].options == ("yes", "no")
    assert [image_bytes(item) for item in items] == [[png("red")], [png("blue")]] * 2
    assert items[0].extra["hint_line"] == "Hint: look\n"
    assert items[1].extra["hint_line"] == ""

    # A question counts if all of its rotations are right.
    values = metrics.METRICS["circular"](items, [1.0, 1.0, 0.0, 1.0])
    assert [(one.name, one.value, one.count) for one in values] == [
        ("circular", 0.5, 2),
        ("vanilla", 1.0, 2),
    ]


def test_mmbench_parquet(tmp_path):
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    rows = [dict(zip(names, row, strict=True)) for row in mmbench_rows()[:2]]
    for row, color in zip(rows, ("red", "blue"), strict=True):
        row["image"] = {"bytes": png(color), "path": None}
        row["C"] = row["C"] or None
        row["D"] = row["D"] or None
    write_parquet(tmp_path, "MMBench/en/dev-00000-of-00001.parquet", rows)
    items = read("mmbench_en", tmp_path).items
    assert [len(item.options) for item in items] == [4, 2]
    assert image_bytes(items[1]) == [png("blue")]


def science_qa_original(root):
    problem = {"question": "Which?", "choices": ["north", "south"], "answer": 1, "hint": "Look."}
    problem |= {"subject": "social science", "image": "image.png", "split": "test"}
    text = {**problem, "image": None, "hint": "", "answer": 0}
    problems = {"4": problem, "5": text, "6": {**text, "split": "train"}}
    write(root, "ScienceQA/problems.json", json.dumps(problems))
    write(root, "ScienceQA/pid_splits.json", json.dumps({"test": ["4", "5"], "train": ["6"]}))
    write_image(root, "ScienceQA/images/test/4/image.png")


def science_qa_parquet(root):
    row = {"question": "Which?", "choices": ["north", "south"], "answer": 1, "hint": "Look."}
    row |= {"subject": "social science", "image": {"bytes": png(), "path": "x.png"}}
    text = {**row, "image": None, "hint": "", "answer": 0}
    write_parquet(root, "ScienceQA/data/test-00000-of-00001.parquet", [row, text])


@pytest.mark.parametrize("form", [science_qa_original, science_qa_parquet])
def test_science_qa_scores_all_questions_and_those_with_an_image(form, tmp_path):
    form(tmp_path)
    items = read("scienceqa", tmp_path).items
    assert [facts(item)[1:] for item in items] == [(("north", "south"), 1), (("north", "south"), 0)]
    assert [image_bytes(item) for item in items] == [[png()], []]
    values = metrics.METRICS["with_image"](items, [1.0, 0.0])
    assert [(value.value, value.count) for value in values] == [(0.5, 2), (1.0, 1)]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("scienceqa", "ScienceQA/ScienceQA_TEST.tsv"),
        ("seedbench", "SEEDBench/SEEDBench_IMG.tsv"),
        ("ai2d", "AI2D/AI2D_TEST.tsv"),
        ("ai2d", "AI2D/AI2D_TEST_NO_MASK.tsv"),
    ],
)
def test_vlmevalkit_tables(name, file, tmp_path):
    rows = [[1, "What?", "", "a", "b", "None", "", "C", "map", png64()]]
    write_table(tmp_path, file, [MCQ_HEAD, *rows])
    (item,) = read(name, tmp_path).items
    assert facts(item) == ("What?", ("a", "b", "None"), 2)
    assert (item.group, image_bytes(item)) == ("map", [png()])


def test_ai2d_prefers_masked_images(tmp_path):
    for name, letter in (("AI2D_TEST_NO_MASK", "A"), ("AI2D_TEST", "B")):
        row = [1, "What?", "", "a", "b", "", "", letter, "map", png64()]
        write_table(tmp_path, f"AI2D/{name}.tsv", [MCQ_HEAD, row])
    assert read("ai2d", tmp_path).items[0].answer == 1


def test_seed_bench_original_leaves_out_videos(tmp_path):
    row = {"question": "How many?", "question_type_id": 5, "question_id": "q1", "answer": "C"}
    row |= {f"choice_{letter}": letter for letter in "abcd"}
    rows = [
        {**row, "data_id": "1454426_2591111986", "data_type": "image"},
        {**row, "data_id": "video.mp4", "data_type": "video"},
    ]
    write(tmp_path, "SEED-Bench/SEED-Bench.json", json.dumps({"questions": rows}))
    write_image(tmp_path, "SEED-Bench/SEED-Bench-image/1454426_2591111986")
    (item,) = read("seedbench", tmp_path).items
    assert facts(item) == ("How many?", ("a", "b", "c", "d"), 2)
    assert image_bytes(item) == [png()]
