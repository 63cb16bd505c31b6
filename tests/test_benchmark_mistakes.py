"""Files of benchmarks that are missing, of another layout, damaged or wrong: one clear line."""

from __future__ import annotations

import json

import pytest
from benchmark_files import png, png64, read, write, write_lines, write_parquet, write_table

from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import readers, records

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
PIQA = {"goal": "Open a jar", "sol1": "twist", "sol2": "push"}
MCQ_HEAD = ["index", "question", "A", "B", "answer", "category", "image"]


def read_with_images(name, root) -> None:
    for item in read(name, root).items:
        for image in item.images:
            image.read()


def message(name, root, kind=UserError) -> str:
    with pytest.raises(kind) as caught:
        read_with_images(name, root)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", records.BENCHMARKS)
def test_missing_files_name_what_is_expected_and_what_is_there(name, tmp_path):
    (tmp_path / "something.txt").write_text("")
    text = message(name, tmp_path, readers.MissingDataError)
    benchmark = records.BENCHMARKS[name]
    assert text.startswith(f"{name}: no files of its {benchmark.split} split below {tmp_path}")
    assert benchmark.files[0].pattern in text
    assert "there is something.txt" in text
    assert benchmark.source in text


def test_missing_root(tmp_path):
    text = message("piqa", tmp_path / "none", readers.MissingDataError)
    assert text == f"--data-root: {tmp_path / 'none'} is not a directory"


def test_missing_split_of_the_shots(tmp_path):
    row = ["Q", "a", "b", "c", "d", "A"]
    write_table(tmp_path, "mmlu/test/anatomy_test.csv", [row])
    text = message("mmlu", tmp_path, readers.MissingDataError)
    assert "no files of its dev split" in text
    assert "there is mmlu/test" in text


def test_git_lfs_pointer(tmp_path):
    for name, file in (
        ("piqa", "piqa/valid.jsonl"),
        ("mmlu", "mmlu/test/anatomy_test.csv"),
        ("gsm8k", "gsm8k/main/test-0.parquet"),
        ("hellaswag", "hf_arrow/hellaswag/validation/data-0.arrow"),
    ):
        write(tmp_path, file, POINTER)
        text = message(name, tmp_path)
        assert str(tmp_path / file) in text
        assert "is a git-lfs pointer" in text


def test_git_lfs_pointer_in_place_of_an_image(tmp_path):
    write(tmp_path, "MME/MME_Benchmark_release_version/count/1.txt", "One?\tYes\nTwo?\tNo\n")
    write(tmp_path, "MME/MME_Benchmark_release_version/count/1.jpg", POINTER)
    assert "1.jpg is a git-lfs pointer" in message("mme", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "row", "expected"),
    [
        ("piqa", "piqa/valid.jsonl", {"question": "x"}, "needs column goal"),
        ("gsm8k", "gsm8k/test.jsonl", {"question": "x", "answer": "5"}, "no '####'"),
        ("siqa", "siqa/dev.jsonl", {"context": "c", "question": "q"}, "needs column answerA"),
        ("mbpp", "mbpp/mbpp.jsonl", {"prompt": "x"}, "KeyError 'test_list'"),
        ("wsc", "WSC/val.jsonl", {"text": "x"}, "KeyError 'span1_text'"),
        ("race_high", "race/test/high.jsonl", {"article": "x"}, "needs column question"),
        ("chid", "chid/test_public.json", {"id": 1, "text": "x"}, "needs column content"),
    ],
)
def test_wrong_columns_name_the_file_and_what_it_has(name, file, row, expected, tmp_path):
    write_lines(tmp_path, file, [row])
    text = message(name, tmp_path, readers.WrongLayoutError)
    assert str(tmp_path / file) in text
    assert expected in text


def test_another_form_is_tried_before_a_layout_is_refused(tmp_path):
    write_lines(tmp_path, "piqa/valid.jsonl", [{"question": "x"}])
    write_parquet(tmp_path, "piqa/validation-0.parquet", [{**PIQA, "label": 1}])
    assert read("piqa", tmp_path).form == "huggingface"


@pytest.mark.parametrize(("answer", "shown"), [("E", "'E'"), ("AB", "'AB'"), ("5", "'5'")])
def test_answer_out_of_range_names_file_and_row(answer, shown, tmp_path):
    rows = [["Q", "a", "b", "c", "d", "A"], ["Q\n2", "a", "b", "c", "d", answer]]
    write_table(tmp_path, "mmlu/data/test/anatomy_test.csv", rows)
    text = message("mmlu", tmp_path)
    path = tmp_path / "mmlu/data/test/anatomy_test.csv"
    assert text.startswith(f"{path} row 2: the answer {shown} is none of the 4 options")


def test_answers_of_other_kinds_out_of_range(tmp_path):
    write_lines(tmp_path, "piqa/valid.jsonl", [PIQA])
    write(tmp_path, "piqa/valid-labels.lst", "2\n")
    assert "the answer '2' is none of the 2 options" in message("piqa", tmp_path)
    write(tmp_path, "piqa/valid-labels.lst", "one\n")
    assert "the answer 'one' is none of" in message("piqa", tmp_path)

    row = {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c"}
    write_lines(tmp_path, "siqa/dev.jsonl", [row])
    write(tmp_path, "siqa/dev-labels.lst", "0\n")  # labels are 1 to 3
    assert "the answer '0' is none of the 3 options" in message("siqa", tmp_path)

    pair = {"sentence1": "a", "sentence2": "b", "label": "maybe"}
    write_lines(tmp_path, "ocnli/dev.json", [pair])
    text = message("ocnli", tmp_path)
    assert "the answer 'maybe' is none of contradiction, entailment, neutral" in text


def test_number_of_labels(tmp_path):
    write_lines(tmp_path, "piqa/valid.jsonl", [PIQA, PIQA])
    write(tmp_path, "piqa/valid-labels.lst", "1\n")
    text = message("piqa", tmp_path)
    assert "valid-labels.lst has 1 answers for 2 questions of" in text
    (tmp_path / "piqa/valid-labels.lst").unlink()
    text = message("piqa", tmp_path, readers.MissingDataError)
    assert f"its answers are missing: expected {tmp_path}/piqa/valid-labels.lst" in text


def test_labels_of_other_questions(tmp_path):
    row = {"question_id": 1, "image": "a.jpg", "text": "Is it?", "category": "random"}
    write_lines(tmp_path, "pope/llava_pope_test.jsonl", [row])
    label = {"question_id": 1, "image": "b.jpg", "text": "Is it?", "label": "yes"}
    write_lines(tmp_path, "pope/coco/coco_pope_random.json", [label])
    assert "the files do not belong together" in message("pope", tmp_path)

    row = {"question_id": "9", "image": "n1.jpg", "text": "Is it windy?"}
    write_lines(tmp_path, "gqa/llava_gqa_testdev_balanced.jsonl", [row])
    write(tmp_path, "gqa/data/testdev_balanced_questions.json", json.dumps({"8": {"answer": "a"}}))
    assert "has no answer for '9'" in message("gqa", tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f'{json.dumps(PIQA)}\n{{"goal": \n', "row 2 is not JSON"),
        ("[1, 2]\n", "is not a list of JSON objects"),
        (f"{json.dumps(PIQA)}\n3\n", "row 2 is not a JSON object"),
        ("", "has no rows"),
    ],
)
def test_damaged_json(content, expected, tmp_path):
    write(tmp_path, "piqa/valid.jsonl", content)
    text = message("piqa", tmp_path)
    assert "valid.jsonl" in text
    assert expected in text


def test_damaged_tables(tmp_path):
    write(tmp_path, "gsm8k/main/test-0.parquet", "not parquet")
    assert "is not a parquet file" in message("gsm8k", tmp_path)
    write(tmp_path, "hf_arrow/hellaswag/validation/data-0.arrow", "not arrow")
    assert "is not an arrow file" in message("hellaswag", tmp_path)
    write(tmp_path, "cmmlu/test/arts.csv", ",Question,A,B,C,D,Answer\n0,q,a,b,c,d,A,extra\n")
    assert "arts.csv row 2 has 8 fields, the header 7" in message("cmmlu", tmp_path)

    path = write(tmp_path, "mmlu/data/test/arts_test.csv", "")
    path.write_bytes("Größe,a,b,c,d,A\n".encode("latin-1"))
    assert "arts_test.csv row 1: not UTF-8 text" in message("mmlu", tmp_path)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("999", "the image is '999': neither a file nor another row"),
        ("!" * 100, "the image is not base64"),
    ],
)
def test_images_of_tables(image, expected, tmp_path):
    rows = [[1, "Q", "a", "b", "A", "c", image]]
    write_table(tmp_path, "mmbench_en/MMBench_DEV_EN.tsv", [MCQ_HEAD, *rows])
    text = message("mmbench_en", tmp_path)
    assert "MMBench_DEV_EN.tsv row 2" in text
    assert expected in text


def test_missing_image_file(tmp_path):
    row = {"category": "VD", "subcategory": "map", "visual_input": "1", "set_id": "0"}
    row |= {"figure_id": "0", "question_id": "0", "question": "Q", "gt_answer": "1"}
    write(
        tmp_path,
        "HallusionBench/HallusionBench.json",
        json.dumps([{**row, "filename": "./VD/map/0_0.png"}]),
    )
    text = message("hallusionbench", tmp_path)
    assert "no image 0_0.png in" in text
    assert "HallusionBench.json row 1" in text


def test_image_that_a_question_names_but_the_row_lacks(tmp_path):
    row = {"id": "validation_Art_1", "question": "<image 2>?", "options": "['a', 'b']"}
    row |= {"answer": "A", "image_1": {"bytes": png(), "path": "x"}, "image_2": None}
    second = {**row, "image_2": {"bytes": png(), "path": "y"}}
    write_parquet(tmp_path, "MMMU/Art/validation-0.parquet", [row, second])
    assert "names <image 2>, which is missing" in message("mmmu", tmp_path)

    write_parquet(tmp_path, "MMMU/Art/validation-0.parquet", [{**second, "options": "['a', "}])
    assert "options are not a Python list" in message("mmmu", tmp_path)


def test_science_qa_without_its_splits(tmp_path):
    write(tmp_path, "ScienceQA/problems.json", "{}")
    assert "pid_splits.json is missing" in message("scienceqa", tmp_path)
    write(tmp_path, "ScienceQA/pid_splits.json", '{"test": ["1"]}')
    assert "test names problem 1, which problems.json lacks" in message("scienceqa", tmp_path)


def test_mme_line_without_an_answer(tmp_path):
    write(tmp_path, "MME/MME_Benchmark_release_version/count/1.txt", "One? Yes\n")
    assert "expected a question, a tab, and Yes or No" in message("mme", tmp_path)


def test_only_rows_of_other_splits(tmp_path):
    head = [*MCQ_HEAD, "split"]
    row = [1, "Q", "a", "b", "A", "c", png64(), "test"]
    write_table(tmp_path, "mmbench_en/MMBench_DEV_EN.tsv", [head, row])
    assert "no questions in" in message("mmbench_en", tmp_path)
