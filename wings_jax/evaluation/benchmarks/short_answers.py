"""Declarations of short free answers about images: TextVQA, GQA, VQAv2, with LLaVA's prompts."""

from __future__ import annotations

from wings_jax.evaluation.benchmarks.record import Benchmark, FilePattern, Prompt

_CONTEXT = "{question}\nAnswer the question using a single word or phrase."
_FIELDS = {
    "id": "question_id",
    "question": "question",
    "images": "image",
    "cluster": "image",
}


def _prompts(extraction: str) -> dict[str, Prompt]:
    return {"generate": Prompt(_CONTEXT, "{answer}", chat=True, extraction=extraction)}


TEXT_VQA = Benchmark(
    name="textvqa",
    title="TextVQA (val)",
    kind="generate",
    modality="image",
    language="en",
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
    headline="generate",
    metric="vqa",
    size=5000,
    source="TextVQA 0.5.1 (val) and LLaVA's eval.zip",
    license="CC BY 4.0",
    notes="LLaVA's file has the text that OCR found in the question.",
    in_paper=False,
)

GQA = Benchmark(
    name="gqa",
    title="GQA (testdev balanced)",
    kind="generate",
    modality="image",
    language="en",
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
        *(
            FilePattern(
                "original",
                pattern,
                "json",
                "testdev",
                {
                    "id": "@key",
                    "question": "question",
                    "answer": "answer",
                    "images": "image_file",
                    "cluster": "imageId",
                },
                {"answers": "text", "rewrite": "gqa", "image_dirs": ("images", "../images")},
            )
            for pattern in (
                "testdev_balanced_questions.json",
                "data/testdev_balanced_questions.json",
            )
        ),
    ),
    directories=("gqa", "GQA"),
    prompts=_prompts("gqa"),
    split="testdev",
    headline="generate",
    size=12578,
    source="GQA of Stanford (questions 1.2 and images), and LLaVA's eval.zip",
    license="CC BY 4.0",
    notes="An answer must be the true one, in any case and without a last period.",
    in_paper=False,
)

VQA_V2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    kind="generate",
    modality="image",
    language="en",
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
        *(
            FilePattern(
                "original",
                pattern,
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
            )
            for pattern in ("v2_OpenEnded_mscoco_val2014_questions.json",)
        ),
    ),
    directories=("vqav2", "VQAv2"),
    prompts=_prompts("vqa"),
    split="test",
    headline="generate",
    metric="vqa",
    size=None,
    source="VQA v2.0 (questions, annotations, COCO images), and LLaVA's eval.zip",
    license="CC BY 4.0",
    notes="test-dev has no answers: they are written for submission to EvalAI. Of val2014, whose "
    "answers are public, the accuracy is computed.",
    in_paper=False,
)
