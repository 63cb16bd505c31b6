"""Declarations of short free answers about images: TextVQA, GQA, VQAv2, with LLaVA's prompts."""

from __future__ import annotations

import functools

from wings_jax.evaluation.benchmarks.declarations import SHORT_ANSWER, file_patterns
from wings_jax.evaluation.benchmarks.record import Benchmark, FilePattern, Prompt

_FIELDS = {
    "id": "question_id",
    "question": "question",
    "images": "image",
    "cluster": "image",
}


# All of them are outside of the paper's tables, and have this license.
_short_answer = functools.partial(
    Benchmark,
    kind="generate",
    modality="image",
    language="en",
    headline="generate",
    license="CC BY 4.0",
    in_paper=False,
)


def _prompts(extraction: str) -> dict[str, Prompt]:
    context = "{question}" + SHORT_ANSWER
    return {"generate": Prompt(context, "{answer}", chat=True, extraction=extraction)}


TEXT_VQA = _short_answer(
    name="textvqa",
    title="TextVQA (val)",
    files=(
        FilePattern(
            "llava",
            "llava_textvqa_val_v051_ocr.jsonl",
            "json",
            "val",
            {**_FIELDS, "answer": "label.answers"},
            {
                "answers": "accepted",
                "rewrite": "textvqa",
                "image_dirs": ("train_images",),
                "labels": {
                    "file": "TextVQA_0.5.1_val.json",
                    "rows": "data",
                    "rewrite": "textvqa_answers",
                    "on": "key",
                    "key": "key",
                },
            },
        ),
        FilePattern(
            "huggingface",
            "**/validation-*.parquet",
            "parquet",
            "val",
            {**_FIELDS, "answer": "answers", "cluster": "image_id"},
            {"answers": "accepted"},
        ),
        FilePattern(
            "original",
            "TextVQA_0.5.1_val.json",
            "json",
            "val",
            {**_FIELDS, "answer": "answers", "images": "image_file", "cluster": "image_id"},
            {
                "answers": "accepted",
                "rows": "data",
                "rewrite": "textvqa_images",
                "image_dirs": ("train_images",),
            },
        ),
    ),
    directories=("textvqa", "TextVQA"),
    prompts=_prompts("vqa"),
    split="val",
    metric="vqa",
    size=5000,
    source="TextVQA 0.5.1 (val) and LLaVA's eval.zip",
    notes="LLaVA's file has the text that OCR found in the question.",
)

GQA = _short_answer(
    name="gqa",
    title="GQA (testdev balanced)",
    files=(
        FilePattern(
            "llava",
            "llava_gqa_testdev_balanced.jsonl",
            "json",
            "testdev",
            {**_FIELDS, "answer": "label.answer"},
            {
                "answers": "text",
                "rewrite": "llava_question",
                "image_dirs": ("data/images", "images"),
                "labels": {
                    "file": "data/testdev_balanced_questions.json",
                    "on": "question_id",
                    "key": "@key",
                },
            },
        ),
        *file_patterns(
            "original",
            ("testdev_balanced_questions.json", "data/testdev_balanced_questions.json"),
            "testdev",
            {
                "id": "@key",
                "question": "question",
                "answer": "answer",
                "images": "image_file",
                "cluster": "imageId",
            },
            {"answers": "text", "rewrite": "gqa", "image_dirs": ("images", "../images")},
        ),
    ),
    directories=("gqa", "GQA"),
    prompts=_prompts("gqa"),
    split="testdev",
    size=12578,
    source="GQA of Stanford (questions 1.2 and images), and LLaVA's eval.zip",
    notes="An answer must be the true one, in any case and without a last period.",
)

VQA_V2 = _short_answer(
    name="vqav2",
    title="VQAv2",
    files=(
        FilePattern(
            "llava",
            "llava_vqav2_mscoco_test-dev2015.jsonl",
            "json",
            "test",
            _FIELDS,
            {
                "answers": "accepted",
                "rewrite": "llava_question",
                "image_dirs": ("test2015",),
            },
        ),
        FilePattern(
            "original",
            "v2_OpenEnded_mscoco_val2014_questions.json",
            "json",
            "test",
            {**_FIELDS, "answer": "label.answers"},
            {
                "answers": "accepted",
                "rows": "questions",
                "rewrite": "vqav2",
                "image_dirs": ("val2014", "images/val2014"),
                "labels": {
                    "file": "v2_mscoco_val2014_annotations.json",
                    "rows": "annotations",
                    "on": "question_id",
                    "key": "question_id",
                },
            },
        ),
    ),
    directories=("vqav2", "VQAv2"),
    prompts=_prompts("vqa"),
    split="test",
    metric="vqa",
    size=None,
    source="VQA v2.0 (questions, annotations, COCO images), and LLaVA's eval.zip",
    notes="test-dev has no answers: they are written for submission to EvalAI. Of val2014, whose "
    "answers are public, the accuracy is computed.",
)
