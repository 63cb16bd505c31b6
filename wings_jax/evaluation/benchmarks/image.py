"""Declarations of multimodal multiple choice: MMMU, MMBench, ScienceQA, SEED-Bench, AI2D.

Prompts are those of VLMEvalKit (`build_prompt` of its `image_mcq.py`), except where `notes` has
another; answers are extracted by its rules without a judge. The paper used VLMEvalKit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wings_jax.evaluation.benchmarks.declarations import (
    TSV,
    chat_prompts,
    file_patterns,
    image_choice,
)
from wings_jax.evaluation.benchmarks.record import Benchmark, FilePattern, Prompt

_CHOICE = (
    "{hint_line}Question: {question}\nOptions:\n{options}\n"
    "Please select the correct answer from the options above. \n"
)
_DIRECT = (
    "{hint_line}{question}\n{options}\n"
    "Answer with the option's letter from the given choices directly."
)


def choice_prompts(context: str, extraction: str = "option") -> dict[str, Prompt]:
    """Returns the prompts of multiple choice: likelihood of the letters, and generation."""
    return chat_prompts(context, "{letter}", extraction)


def _tsv_fields(group: str = "category?", **more: Any) -> Mapping[str, Any]:
    """Returns the columns of VLMEvalKit's multiple choice; empty options are left out."""
    return {
        "id": "index",
        "question": "question",
        "options": ["A", "B", "C?", "D?", "E?", "F?", "G?", "H?", "I?"],
        "answer": "answer",
        "group": group,
        "images": "image",
        "hint": "hint?",
        **more,
    }


def _mmmu_files(split: str, parquet: str, tsv: str) -> tuple[FilePattern, ...]:
    """Returns the forms of a split of MMMU."""
    fields = {
        "id": "id",
        "question": "question",
        "options": "options",
        "answer": "answer?",
        "group": "subject",
        "images": "images",
        "choices_block": "choices_block",
        "question_type": "question_type?",
    }

    # VLMEvalKit identifies a row by its index.
    table = {**fields, "id": "index"}

    options = {"answers": "letter or text", "rewrite": "mmmu", "optional_image": True}
    # One TSV holds dev and validation, by its column `split`.
    rows = {**options, **TSV, "where": {"split": (parquet,)}}

    tables = (f"*/{parquet}-*.parquet", f"**/{parquet}/*.arrow")
    return (
        *file_patterns("huggingface", tables, split, fields, options),
        FilePattern("vlmevalkit", tsv, "csv", split, table, rows),
        *file_patterns("huggingface", (f"{parquet}-*.parquet",), split, fields, options),
        # Files of another name are those of the split that everybody scores.
        *(_other_parquet(fields, options) if split == "val" else ()),
    )


def _other_parquet(fields: Mapping[str, Any], options: Mapping[str, Any]) -> list[FilePattern]:
    """Returns MMMU's form of a parquet file that is not named after the test or dev split."""
    others = {**options, "exclude": "[dt]e[sv]*"}
    return [FilePattern("huggingface", "*.parquet", "parquet", "val", fields, others)]


def _mmmu(name: str, title: str, split: str, size: int, tsv: str, notes: str) -> Benchmark:
    # `choices_block` is empty for an open question.
    context = "Question: {question}\n{choices_block}"

    return image_choice(
        name=name,
        title=title,
        language="en",
        files=_mmmu_files(split, {"val": "validation", "test": "test"}[split], tsv),
        directories=("MMMU", "mmmu", "mmmu_parquet_form"),
        prompts=choice_prompts(context, "option or text"),
        split=split,
        grouping="subject",
        size=size,
        source="MMMU/MMMU at Hugging Face, or VLMEvalKit's MMMU_DEV_VAL.tsv and MMMU_TEST.tsv",
        license="Apache-2.0",
        notes=notes,
        in_paper=split == "val",
    )


MMMU = _mmmu(
    "mmmu",
    "MMMU (val)",
    "val",
    900,
    "MMMU_DEV_VAL.tsv",
    "Open questions count as right if the answer's text is contained in a short answer.",
)
MMMU_TEST = _mmmu(
    "mmmu_test",
    "MMMU (test)",
    "test",
    10500,
    "MMMU_TEST.tsv",
    "Answers are withheld: the answers are written for submission to EvalAI.",
)


def _mmbench(name: str, title: str, language: str, tsvs: tuple[str, ...]) -> Benchmark:
    """Returns MMBench dev in one language; a question is right if all its rotations are."""
    # Rotations of a question are one cluster, which intervals resample as a whole.
    fields = _tsv_fields(circular="circular", cluster="circular", l2="l2-category?")

    # The image of a row may be the index of the row that has it.
    options = {
        **TSV,
        "rewrite": "mmbench",
        "index": "index",
        "where": {"split": ("dev",)},
    }

    code = "en" if language == "en" else "cn"

    return image_choice(
        name=name,
        title=title,
        language=language,
        files=(
            *file_patterns("vlmevalkit", tsvs, "dev", fields, options),
            FilePattern("huggingface", f"{code}/dev-*.parquet", "parquet", "dev", fields, options),
        ),
        directories=(f"mmbench_{code}", f"MMBench_{code.upper()}", "MMBench", "mmbench"),
        prompts=choice_prompts(_CHOICE),
        split="dev",
        metric="circular",
        grouping="category",
        size=None,
        source=f"VLMEvalKit's {tsvs[0]}, or lmms-lab/MMBench at Hugging Face",
        license="Apache-2.0",
        notes="Circular evaluation of the 1,164 questions of dev: every rotation must be right.",
    )


MMBENCH_EN = _mmbench(
    "mmbench_en",
    "MMBench EN (dev)",
    "en",
    (
        "MMBench_DEV_EN.tsv",
        "mmbench_dev_en.tsv",
        "mmbench_dev_20230712.tsv",
        "MMBench_DEV_EN_V11.tsv",
        "MMBench.tsv",
        "MMBench_form*.tsv",
    ),
)
MMBENCH_CN = _mmbench(
    "mmbench_cn",
    "MMBench CN (dev)",
    "zh",
    (
        "MMBench_DEV_CN.tsv",
        "mmbench_dev_cn.tsv",
        "mmbench_dev_cn_20231003.tsv",
        "MMBench_DEV_CN_V11.tsv",
        "MMBench_CN.tsv",
    ),
)

SCIENCE_QA_FIELDS = {
    "question": "question",
    "options": "choices",
    "answer": "answer",
    "group": "subject",
    "images": "image",
    "hint": "hint?",
}
SCIENCE_QA = image_choice(
    name="scienceqa",
    title="ScienceQA (test)",
    language="en",
    files=(
        *file_patterns(
            "original",
            ("problems.json", "data/scienceqa/problems.json"),
            "test",
            {"id": "pid", **SCIENCE_QA_FIELDS},
            {
                "answers": "index",
                "subset": "test",
                "image_dirs": ("images", "."),
                "optional_image": True,
            },
            reader="science_qa",
        ),
        FilePattern(
            "huggingface",
            "**/test-*.parquet",
            "parquet",
            "test",
            SCIENCE_QA_FIELDS,
            {"answers": "index", "optional_image": True},
        ),
        FilePattern("vlmevalkit", "ScienceQA_TEST.tsv", "csv", "test", _tsv_fields(), TSV),
    ),
    directories=("ScienceQA", "scienceqa"),
    prompts=choice_prompts(_DIRECT),
    split="test",
    metric="with_image",
    grouping="subject",
    size=4241,
    source="lupantech/ScienceQA, derek-thomas/ScienceQA at Hugging Face, or VLMEvalKit's "
    "ScienceQA_TEST.tsv (2,017 questions, all with an image)",
    license="CC BY-NC-SA 4.0",
    notes="LLaVA's prompt. Accuracy of all questions and of those with an image are reported; "
    "the paper's column fits neither number of questions.",
)

SEED_BENCH = image_choice(
    name="seedbench",
    title="SEED-Bench (image)",
    language="en",
    files=(
        FilePattern(
            "original",
            "SEED-Bench.json",
            "json",
            "test",
            {
                "id": "question_id",
                "question": "question",
                "options": ["choice_a", "choice_b", "choice_c", "choice_d"],
                "answer": "answer",
                "group": "question_type_id",
                "images": "data_id",
                "cluster": "data_id",
            },
            {
                "rows": "questions",
                "where": {"data_type": ("image",)},
                "image_dirs": ("SEED-Bench-image",),
            },
        ),
        FilePattern("vlmevalkit", "SEEDBench_IMG.tsv", "csv", "test", _tsv_fields(), TSV),
    ),
    directories=("SEED-Bench", "seed_bench", "seedbench", "SEEDBench"),
    prompts=choice_prompts(_CHOICE),
    split="test",
    grouping="category",
    size=None,
    source="AILab-CVC/SEED-Bench, or VLMEvalKit's SEEDBench_IMG.tsv",
    license="CC BY-NC 4.0",
    notes="The questions about images only, about 14,200.",
)

AI2D = image_choice(
    name="ai2d",
    title="AI2D (test)",
    language="en",
    files=(
        *file_patterns(
            "vlmevalkit", ("AI2D_TEST.tsv", "AI2D_TEST_NO_MASK.tsv"), "test", _tsv_fields(), TSV
        ),
        FilePattern(
            "huggingface",
            "**/test-*.parquet",
            "parquet",
            "test",
            {"question": "question", "options": "options", "answer": "answer", "images": "image"},
            {"answers": "index"},
        ),
    ),
    directories=("AI2D", "ai2d"),
    prompts=choice_prompts(_CHOICE),
    split="test",
    grouping="category",
    size=3088,
    source="VLMEvalKit's AI2D_TEST.tsv (labels masked) or AI2D_TEST_NO_MASK.tsv",
    license="CC BY-SA 4.0",
    notes="The masked images, if both files are there.",
)
