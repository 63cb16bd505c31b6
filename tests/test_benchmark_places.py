"""Where data sets are found, and that no data set is taken for another."""

from __future__ import annotations

import pytest
from benchmark_files import png, png64, read, write_lines, write_parquet, write_table

from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import readers, tables
from wings_jax.evaluation.benchmarks.records import BENCHMARKS
from wings_jax.evaluation.benchmarks.results import BenchmarkResult

MCQ = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
PIQA = {"goal": "Open a jar", "sol1": "twist", "sol2": "push", "label": 1}
IMAGE = {"bytes": png(), "path": "1.png"}


@pytest.mark.parametrize("collection", ["", "LMUData/", "vlmevalkit/", "lmudata/"])
def test_tables_of_vlmevalkit_lie_side_by_side(collection, tmp_path):
    row = [1, "What?", "", "a", "b", "", "", "B", "map", png64()]
    for name in ("MMBench_DEV_EN", "AI2D_TEST", "ScienceQA_TEST", "SEEDBench_IMG"):
        write_table(tmp_path, f"{collection}{name}.tsv", [MCQ, row])
    # A directory of another data set beside it changes nothing.
    write_parquet(tmp_path, "piqa/validation-0.parquet", [PIQA])
    for name in ("mmbench_en", "ai2d", "scienceqa", "seedbench"):
        assert [item.answer for item in read(name, tmp_path).items] == [1]


def test_directories_in_any_case_and_in_collections(tmp_path):
    write_parquet(tmp_path, "PIQA/validation-0.parquet", [PIQA])
    assert read("piqa", tmp_path).items[0].answer == 1
    ending = {"ctx_a": "a", "ctx_b": "b", "ctx": "a b", "endings": ["c", "d"], "label": "1"}
    write_parquet(tmp_path, "hf_arrow/HellaSwag/validation-0.parquet", [ending])
    assert read("hellaswag", tmp_path).items[0].answer == 1


def test_the_own_directory_comes_before_a_collection(tmp_path):
    for directory, answer in (("hf_arrow/piqa", 0), ("piqa", 1)):
        write_parquet(tmp_path, f"{directory}/validation-0.parquet", [{**PIQA, "label": answer}])
    assert read("piqa", tmp_path).items[0].answer == 1


def test_no_data_set_is_taken_for_another(tmp_path):
    """ScienceQA has the columns of MMLU, VQAv2 those of TextVQA: their scores would be wrong."""
    science = {"question": "q", "choices": ["a", "b"], "answer": 0, "subject": "s", "image": IMAGE}
    write_parquet(tmp_path, "ScienceQA/data/test-0.parquet", [science])
    write_parquet(tmp_path, "ScienceQA/data/dev-0.parquet", [science] * 5)
    vqa = {"question": "q", "answers": ["a"] * 10, "image": IMAGE, "question_id": 1}
    write_parquet(tmp_path, "vqav2/data/validation-0.parquet", [vqa])

    assert len(read("scienceqa", tmp_path).items) == 1
    for name in ("mmlu", "textvqa"):
        with pytest.raises(readers.MissingDataError, match=f"{name}: no files of its"):
            read(name, tmp_path)

    # Its own directory may be given as the root.
    assert read("scienceqa", tmp_path / "ScienceQA").form == "huggingface"


def mmmu_row(**values):
    row = {"id": "test_Art_1", "question": "<image 1> What?", "options": "['a', 'b']"}
    row |= {"answer": "A", "question_type": "multiple-choice", "image_1": IMAGE}
    return {**row, **{f"image_{number}": None for number in range(2, 8)}, **values}


def test_mmmu_splits_are_not_mixed_up(tmp_path):
    write_parquet(tmp_path, "MMMU/validation-0.parquet", [mmmu_row()])
    with pytest.raises(readers.MissingDataError, match="mmmu_test: no files of its test split"):
        read("mmmu_test", tmp_path)

    write_parquet(tmp_path / "other", "MMMU/test-0.parquet", [mmmu_row()])
    with pytest.raises(readers.MissingDataError, match="mmmu: no files of its val split"):
        read("mmmu", tmp_path / "other")
    assert len(read("mmmu_test", tmp_path / "other").items) == 1


def test_mmmu_withholds_answers_as_question_marks(tmp_path):
    rows = [mmmu_row(answer="?"), mmmu_row(answer="?", options="[]", question_type="open")]
    write_parquet(tmp_path, "MMMU/Art/test-0.parquet", rows)
    assert [item.answer for item in read("mmmu_test", tmp_path).items] == [None, None]


def test_answers_that_are_missing_name_the_data_set_and_its_source(tmp_path):
    question = {"question_id": 1, "image": "1.jpg", "text": "A cat?", "category": "random"}
    write_lines(tmp_path, "pope/llava_pope_test.jsonl", [question])
    with pytest.raises(readers.MissingDataError, match=r"^pope: .*answers are missing.*AoiDragon"):
        read("pope", tmp_path)


def test_mmbench_of_hugging_face_writes_nan_for_nothing(tmp_path):
    values = [7, "Red?", "nan", "yes", "no", "nan", "nan", "B", "color", IMAGE]
    write_parquet(tmp_path, "MMBench/en/dev-0.parquet", [dict(zip(MCQ, values, strict=True))])
    (item,) = read("mmbench_en", tmp_path).items
    assert (item.options, item.answer, item.extra["hint_line"]) == (("yes", "no"), 1, "")


@pytest.mark.parametrize(("rotations", "expected"), [(3, 0), (2, 1)])
def test_mmbench_questions_without_all_rotations_are_reported(rotations, expected, tmp_path):
    rows = [
        [1, "q", "", "a", "b", "c", "", "A", "x", png64()],
        [1_000_001, "q", "", "b", "c", "a", "", "C", "x", "1"],
        [2_000_001, "q", "", "c", "a", "b", "", "B", "x", "1"],
        [2, "q", "", "a", "b", "", "", "A", "x", png64()],
        [1_000_002, "q", "", "b", "a", "", "", "B", "x", "2"],
    ]
    write_table(tmp_path, "MMBench_DEV_EN.tsv", [MCQ, *rows[:rotations], *rows[3:]])
    data = read("mmbench_en", tmp_path)
    assert len(data.remarks) == expected

    provenance = {"items": len(data.items), "skipped": {}, "remarks": list(data.remarks)}
    result = BenchmarkResult("m", BENCHMARKS["mmbench_en"], provenance, [], {}, 0.0, "", None)
    notes = [line for line in tables.notes({"mmbench_en": [result]}) if "rotations" in line]
    assert (
        notes
        == [
            "mmbench_en: 1 of 2 questions have fewer rotations than options: the circular "
            "score is too high"
        ][:expected]
    )


def test_a_question_without_its_image_is_not_asked_without_it(tmp_path):
    write_table(tmp_path, "MMBench_DEV_EN.tsv", [MCQ, [1, "q", "", "a", "b", "", "", "A", "x", ""]])
    (item,) = read("mmbench_en", tmp_path).items
    with pytest.raises(UserError, match=r"MMBench_DEV_EN.tsv row 2: no image"):
        item.images[0].read()


@pytest.mark.parametrize(
    ("name", "file", "row", "gap"),
    [
        (
            "chid",
            "chid/test_public.json",
            {"id": 1, "candidates": ["x"] * 7, "content": "他。", "answer": 3},
            "#idiom#",
        ),
        (
            "winogrande",
            "winogrande/dev.jsonl",
            {"sentence": "A cat.", "option1": "a", "option2": "b", "answer": "1"},
            "_",
        ),
    ],
)
def test_a_cloze_question_without_its_gap_is_refused(name, file, row, gap, tmp_path):
    """All options would be equally likely, and the first be chosen."""
    write_lines(tmp_path, file, [row])
    with pytest.raises(UserError, match=f"row 1: the question has no '{gap}'"):
        read(name, tmp_path)
