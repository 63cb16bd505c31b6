"""Real files of benchmarks, as published. Skipped where they are not there."""

from __future__ import annotations

import collections
import json
import shutil

import pytest
from benchmark_files import REAL, read, write

from wings_jax.evaluation.benchmarks import metrics, ratings, readers, records

pytestmark = pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not there")


@pytest.mark.parametrize(
    ("name", "root", "form", "items", "shots"),
    [
        ("mmlu", ".", "csv with header", 2493, 40),
        ("mmlu", "mmlu_hendrycks_form", "original", 5, 5),
        ("mmlu", "mmlu_parquet", "huggingface", 612, 15),
        ("arc_challenge", ".", "original", 1172, 0),
        ("openbookqa", ".", "original tsv", 500, 0),
        ("piqa", ".", "original", 1838, 0),
        ("piqa", "hf_arrow", "huggingface", 1838, 0),
        ("gsm8k", ".", "original", 1319, 0),
        ("mbpp", ".", "original", 500, 10),
        ("hallusionbench", ".", "original", 951, 0),
        ("mmbench_en", "vlmevalkit", "vlmevalkit", 37, 0),
        ("mmbench_en", ".", "vlmevalkit", 37, 0),
        ("mmmu", ".", "huggingface", 11, 0),
        ("mmmu", "mmmu_parquet_form", "huggingface", 11, 0),
        ("nlvr", ".", "original", 33, 0),
    ],
)
def test_real_data_set(name, root, form, items, shots):
    data = read(name, REAL / root)
    assert (data.form, len(data.items), len(data.shots)) == (form, items, shots)
    assert len({item.id for item in data.items}) == items
    if records.BENCHMARKS[name].kind == "choice":
        assert all(0 <= item.answer < len(item.options) for item in data.items)
        assert all(option.strip() for item in data.items for option in item.options)


def test_arrow_and_text_files_of_piqa_have_the_same_questions():
    text, arrow = read("piqa", REAL), read("piqa", REAL / "hf_arrow")
    facts = [
        [(item.question, item.options, item.answer) for item in data.items]
        for data in (text, arrow)
    ]
    assert facts[0] == facts[1]


def test_csv_and_parquet_of_mmlu_have_the_same_questions():
    table = {item.question: item for item in read("mmlu", REAL).items}
    parquet = read("mmlu", REAL / "mmlu_parquet").items
    same = [item for item in parquet if item.question in table]
    assert len(same) > 290  # sociology and abstract algebra are in both
    assert all(table[item.question].options == item.options for item in same)


def test_arc_has_labels_in_digits_and_three_to_five_options():
    items = read("arc_challenge", REAL).items
    assert collections.Counter(len(item.options) for item in items) == {4: 1165, 3: 4, 5: 3}
    assert any(item.extra["labels"] == ("1", "2", "3", "4") for item in items)


def test_gsm8k_answers_are_numbers():
    answers = [item.answer for item in read("gsm8k", REAL).items]
    assert all(float(answer.replace(",", "")) == int(answer.replace(",", "")) for answer in answers)
    assert sum("," in answer for answer in answers) == 14
    assert sum(answer.startswith("-") for answer in answers) == 2


def test_mmbench_rotations_have_their_images_and_answers():
    items = read("mmbench_en", REAL / "vlmevalkit").items
    groups = collections.defaultdict(list)
    for item in items:
        groups[item.extra["circular"]].append(item)
    assert len(groups) == 12
    for members in groups.values():
        assert len({item.images[0].read() for item in members}) == 1
        # A rotation moves the right option, it does not change it.
        assert len({item.options[item.answer] for item in members}) == 1
        assert len(members) == len(members[0].options)
    assert ratings.rate_circular([item.extra["circular"] for item in items], [True] * 37) == {
        "circular": 100,
        "vanilla": 100,
    }


def test_mmmu_images_are_encoded_images():
    for item in read("mmmu", REAL / "mmmu_parquet_form").items:
        (image,) = item.images
        assert image.read()[:4] == b"\x89PNG"
        assert item.question.count("<image>") == 1


def test_mme_and_hallusion_bench_of_vlmevalkit(tmp_path):
    shutil.copy(REAL / "vlmevalkit/MME.noimage.tsv", tmp_path / "MME.tsv")
    items = read("mme", tmp_path).items
    assert collections.Counter(item.answer for item in items) == {0: 1187, 1: 1187}
    values = {one.name: one.value for one in metrics.METRICS["mme"](items, [1.0] * 2374)}
    assert (values["perception"], values["reasoning"]) == (2000, 800)

    # Without its image column a table names files, which are not there.
    with pytest.raises(readers.UserError, match=r"no image 0001\.jpg in"):
        items[0].images[0].read()

    shutil.copy(REAL / "vlmevalkit/HallusionBench.noimage.tsv", tmp_path / "HallusionBench.tsv")
    table = read("hallusionbench", tmp_path).items
    original = read("hallusionbench", REAL).items
    assert sorted((item.id, item.answer) for item in table) == sorted(
        (item.id, item.answer) for item in original
    )


def test_llava_question_files_with_answers_by_hand(tmp_path):
    for name in ("MME", "pope"):
        shutil.copytree(REAL / "llava_eval" / name, tmp_path / name, copy_function=shutil.copyfile)
    with pytest.raises(readers.MissingDataError, match="its answers are missing"):
        read("mme", tmp_path)

    # The published answers are not in the sample: every question gets "Yes".
    lines = (tmp_path / "MME/llava_mme.jsonl").read_text(encoding="utf-8").splitlines()
    texts = collections.defaultdict(list)
    for row in map(json.loads, lines):
        category, _, file = row["image"].partition("/")
        question = row["text"].partition("\n")[0]
        stem = file.rpartition(".")[0]
        texts[category, stem].append(f"{question} Please answer yes or no.\tYes\n")
    for (category, stem), questions in texts.items():
        # artwork/images/1.jpg has its questions in artwork/questions_answers_YN/1.txt.
        place = f"{category}/{stem}".replace("/images/", "/questions_answers_YN/")
        base = "MME/MME_Benchmark_release_version"
        write(tmp_path, f"{base}/{place}.txt", "".join(questions))
    items = read("mme", tmp_path).items
    assert len(items) == 60
    assert len({item.id for item in items}) == 60  # `question_id` occurs twice

    lines = (tmp_path / "pope/llava_pope_test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = list(map(json.loads, lines))
    for category in {row["category"] for row in rows}:
        labels = [
            json.dumps({"image": row["image"], "label": "no"})
            for row in rows
            if row["category"] == category
        ]
        write(tmp_path, f"pope/coco/coco_pope_{category}.json", "\n".join(labels))
    assert [item.answer for item in read("pope", tmp_path).items] == [1] * 60


def test_nlvr_images_are_there():
    items = read("nlvr", REAL).items
    assert all(item.images[0].read()[:4] == b"\x89PNG" for item in items)
    assert {item.answer for item in items} == {0, 1}
