"""Every image benchmark in every form: images from files, bytes, base64, other rows."""

from __future__ import annotations

import json

import pytest
from benchmark_files import (
    BOM,
    facts,
    png,
    png64,
    read,
    write,
    write_image,
    write_lines,
    write_parquet,
    write_table,
)

from wings_jax.evaluation.benchmarks import metrics

MCQ_HEAD = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
SHORT = "\nAnswer the question using a single word or phrase."


def image_bytes(item) -> list[bytes]:
    return [image.read() for image in item.images]


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
