"""Questions about images with short answers, in every form of their files: MME, POPE, VQA."""

from __future__ import annotations

import json

import pytest
from benchmark_files import (
    facts,
    image_bytes,
    png,
    png64,
    read,
    write,
    write_image,
    write_lines,
    write_table,
)

from wings_jax.evaluation.benchmarks import metrics

SHORT = "\nAnswer the question using a single word or phrase."


MME_QUESTIONS = [
    ("Is there a cat? Please answer yes or no.", "Yes"),
    ("Is there a dog? Please answer yes or no.", "No"),
]


def mme_tsv(root):
    head = ["index", "image", "question", "answer", "category", "image_path"]
    rows = [
        [index, png64(), question, answer, "existence", "existence/1.jpg"]
        for index, (question, answer) in enumerate(MME_QUESTIONS)
    ]
    write_table(root, "MME/MME.tsv", [head, *rows])


def mme_folder(root, file="MME/MME_Benchmark_release_version/existence/1.txt"):
    write(root, file, "".join(f"{question}\t{answer}\r\n" for question, answer in MME_QUESTIONS))
    write_image(root, "MME/MME_Benchmark_release_version/existence/1.jpg")


def mme_folder_with_directories(root):
    base = "MME/MME_Benchmark_release_version/existence"
    mme_folder(root, f"{base}/questions_answers_YN/1.txt")
    (root / base / "images").mkdir()
    (root / base / "1.jpg").rename(root / base / "images" / "1.jpg")


def mme_llava(root):
    mme_folder(root)
    rows = [
        {
            "question_id": "existence/1.jpg",
            "image": "existence/1.jpg",
            "text": question.replace(" Please answer yes or no.", "") + SHORT,
            "category": "existence",
        }
        for question, _ in MME_QUESTIONS
    ]
    write_lines(root, "MME/llava_mme.jsonl", rows)


@pytest.mark.parametrize("form", [mme_tsv, mme_folder, mme_folder_with_directories, mme_llava])
def test_mme(form, tmp_path):
    form(tmp_path)
    items = read("mme", tmp_path).items
    assert [item.answer for item in items] == [0, 1]
    assert len({item.id for item in items}) == 2
    assert {item.cluster for item in items} == {"existence/1.jpg"}
    assert [image_bytes(item) for item in items] == [[png()], [png()]]
    assert items[0].question.startswith("Is there a cat?")

    values = {one.name: one for one in metrics.METRICS["mme"](items, [1.0, 0.0])}
    assert values["existence"].value == 50  # half of the questions, no image with both
    assert (values["perception"].value, values["perception"].scale) == (50, 2000)
    assert values["total"].count == 2


def hallusion_rows():
    row = {"category": "VD", "subcategory": "map", "set_id": "3", "sample_note": "x"}
    row |= {"question": "Is it?", "gt_answer_details": "It is."}
    cases = [("1", "0", "0", "1"), ("1", "0", "1", "0"), ("1", "1", "0", "1"), ("0", "0", "0", "1")]
    return [
        {
            **row,
            "visual_input": visual,
            "figure_id": figure,
            "question_id": question,
            "gt_answer": answer,
            "filename": f"./VD/map/3_{figure}.png" if visual == "1" else None,
        }
        for visual, figure, question, answer in cases
    ]


def hallusion_json(root):
    write(root, "HallusionBench/HallusionBench.json", json.dumps(hallusion_rows()))
    for figure in "01":
        write_image(root, f"HallusionBench/hallusion_bench/VD/map/3_{figure}.png")


def hallusion_tsv(root):
    head = ["index", "question", "answer", "category", "l2-category", "image"]
    rows = [
        [
            f"VD_map_{row['visual_input']}_3_{row['figure_id']}_{row['question_id']}",
            row["question"],
            "Yes" if row["gt_answer"] == "1" else "No",
            "VD",
            "VD_map",
            png64(),
        ]
        for row in hallusion_rows()[:3]
    ]
    write_table(root, "HallusionBench/HallusionBench.tsv", [head, *rows])


@pytest.mark.parametrize("form", [hallusion_json, hallusion_tsv])
def test_hallusion_bench(form, tmp_path):
    form(tmp_path)
    data = read("hallusionbench", tmp_path)
    assert [item.answer for item in data.items] == [0, 1, 0]
    assert data.items[0].id == "VD_map_1_3_0_0"
    assert data.skipped == ({"no filename": 1} if form is hallusion_json else {})
    assert image_bytes(data.items[2]) == [png()]

    # Two figures, two questions: one figure and one question are right everywhere.
    values = metrics.METRICS["hallusion"](data.items, [1.0, 0.0, 1.0])
    assert [round(one.value, 4) for one in values] == [0.6667, 0.5, 0.5, 0.5556]


def pope_llava(root):
    cases = [
        ("adversarial", "a.jpg", "yes"),
        ("adversarial", "b.jpg", "no"),
        ("random", "c.jpg", "no"),
    ]
    rows = []
    for number, (category, image, label) in enumerate(cases):
        question = f"Is there a dog in {image}?"
        rows.append(
            {"question_id": number, "image": image, "text": question + SHORT, "category": category}
        )
        path = root / "pope" / "coco" / f"coco_pope_{category}.json"
        before = path.read_text() if path.exists() else ""
        line = {"question_id": 1, "image": image, "text": question, "label": label}
        write(root, f"pope/coco/coco_pope_{category}.json", before + json.dumps(line) + "\n")
        write_image(root, f"pope/val2014/{image}")
    write_lines(root, "pope/llava_pope_test.jsonl", rows)


def pope_original(root):
    pope_llava(root)
    (root / "pope" / "llava_pope_test.jsonl").unlink()
    for path in (root / "pope" / "coco").iterdir():
        path.rename(root / "pope" / path.name)


@pytest.mark.parametrize("form", [pope_llava, pope_original])
def test_pope(form, tmp_path):
    form(tmp_path)
    items = read("pope", tmp_path).items
    assert [item.answer for item in items] == [0, 1, 1]
    assert image_bytes(items[0]) == [png()]
    assert items[0].question == "Is there a dog in a.jpg?"
    assert len({item.id for item in items}) == 3

    # One true positive, one false positive, one true negative.
    values = {one.name: one.value for one in metrics.METRICS["pope"](items, [1.0, 0.0, 1.0])}
    assert values["accuracy"] == pytest.approx(2 / 3)
    assert values["precision"] == pytest.approx(1 / 2)
    assert (values["recall"], values["f1"]) == (1.0, pytest.approx(2 / 3))


def test_textvqa_of_llava(tmp_path):
    question = "what is the brand?\nReference OCR token: DAKOTA, DIGITAL"
    rows = [{"question_id": "0035", "image": "0035.jpg", "text": question + SHORT}]
    write_lines(tmp_path, "textvqa/llava_textvqa_val_v051_ocr.jsonl", rows)
    annotation = {"question_id": 34602, "image_id": "0035", "question": "what is the brand?"}
    other = {**annotation, "question": "what color?", "answers": ["red"] * 10}
    data = {"data": [other, {**annotation, "answers": ["dakota"] * 9 + ["no"]}]}
    write(tmp_path, "textvqa/TextVQA_0.5.1_val.json", json.dumps(data))
    write_image(tmp_path, "textvqa/train_images/0035.jpg")
    (item,) = read("textvqa", tmp_path).items
    assert facts(item) == (question, (), (*["dakota"] * 9, "no"))
    assert image_bytes(item) == [png()]

    (tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl").unlink()
    assert [item.question for item in read("textvqa", tmp_path).items] == [
        "what color?",
        "what is the brand?",
    ]


def test_gqa_of_llava(tmp_path):
    rows = [{"question_id": "2013", "image": "n1.jpg", "text": "Is it windy?" + SHORT}]
    write_lines(tmp_path, "gqa/llava_gqa_testdev_balanced.jsonl", rows)
    questions = {"2013": {"question": "Is it windy?", "answer": "yes", "imageId": "n1"}}
    write(tmp_path, "gqa/data/testdev_balanced_questions.json", json.dumps(questions))
    write_image(tmp_path, "gqa/data/images/n1.jpg")
    (item,) = read("gqa", tmp_path).items
    assert (*facts(item), image_bytes(item)) == ("Is it windy?", (), "yes", [png()])

    (tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl").unlink()
    (item,) = read("gqa", tmp_path).items
    assert (item.id, item.answer, image_bytes(item)) == ("2013", "yes", [png()])


def test_vqav2_with_and_without_answers(tmp_path):
    rows = [{"question_id": 1, "image": "COCO_test2015_000000000001.jpg", "text": "What?" + SHORT}]
    name = "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl"
    path = write_lines(tmp_path, name, rows)
    write_image(tmp_path, "vqav2/test2015/COCO_test2015_000000000001.jpg")
    (item,) = read("vqav2", tmp_path).items
    assert (item.question, item.answer, image_bytes(item)) == ("What?", None, [png()])

    path.unlink()
    question = {"image_id": 42, "question": "What?", "question_id": 42000}
    write(
        tmp_path,
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        json.dumps({"questions": [question]}),
    )
    answers = [{"answer": "net", "answer_id": number} for number in range(1, 11)]
    write(
        tmp_path,
        "vqav2/v2_mscoco_val2014_annotations.json",
        json.dumps({"annotations": [{"question_id": 42000, "answers": answers}]}),
    )
    write_image(tmp_path, "vqav2/val2014/COCO_val2014_000000000042.jpg")
    (item,) = read("vqav2", tmp_path).items
    assert (item.answer, image_bytes(item)) == (("net",) * 10, [png()])
