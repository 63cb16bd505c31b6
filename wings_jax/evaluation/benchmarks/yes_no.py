"""Declarations of yes-or-no questions about images: MME, HallusionBench, POPE, NLVR.

The options are "Yes" and "No" ("true" and "false" in NLVR), so that their likelihoods can be
compared too. Generated answers are read by VLMEvalKit's rule (MME, HallusionBench) or LLaVA's
(POPE).
"""

from __future__ import annotations

import functools

from wings_jax.evaluation.benchmarks.declarations import (
    SHORT_ANSWER,
    TSV,
    chat_prompts,
    file_patterns,
    image_choice,
)
from wings_jax.evaluation.benchmarks.record import Benchmark, FilePattern, Prompt

ANSWERS = {"choices": ("Yes", "No"), "answers": {"yes": 0, "no": 1}}
TSV_ANSWERS = {**TSV, **ANSWERS}

_yes_or_no = functools.partial(
    Benchmark,
    kind="yesno",
    modality="image",
    language="en",
    headline="generate",
    grouping="category",
)

_MME_LABELS = {
    "rewrite": "mme_answers",
    "reader": "lines",
    "on": "key",
    "key": "key",
}
MME_FIELDS = {
    "id": "index",
    "question": "question",
    "answer": "answer",
    "group": "category",
    "images": "image",
    "cluster": "image_path",
}
MME = _yes_or_no(
    name="mme",
    title="MME",
    files=(
        FilePattern(
            "vlmevalkit",
            "MME.tsv",
            "csv",
            "test",
            MME_FIELDS,
            {
                **TSV_ANSWERS,
                "rewrite": "image_or_path",
                "image_dirs": ("images/MME", "images", "."),
            },
        ),
        FilePattern(
            "llava",
            "llava_mme.jsonl",
            "json",
            "test",
            {**MME_FIELDS, "id": "key", "answer": "label.answer", "cluster": "image"},
            {
                **ANSWERS,
                "rewrite": "llava_mme",
                "image_dirs": ("MME_Benchmark_release_version",),
                "labels": {**_MME_LABELS, "file": "MME_Benchmark_release_version/**/*.txt"},
            },
        ),
        *file_patterns(
            "original",
            (
                "MME_Benchmark_release_version/**/*.txt",
                "*/questions_answers_YN/*.txt",
                "*/*.txt",
            ),
            "test",
            {**MME_FIELDS, "id": "key"},
            {**ANSWERS, "rewrite": "mme_answers", "image_dirs": ("../images", ".")},
            reader="lines",
        ),
    ),
    directories=("MME", "mme"),
    prompts=chat_prompts("{question}", "{option}", "yes or no"),
    split="test",
    metric="mme",
    size=2374,
    source="BradyFU/Awesome-Multimodal-Large-Language-Models (Evaluation), or VLMEvalKit's MME.tsv",
    license="research only",
    notes="The paper's number may be perception (of 2000) or the total (of 2800); both are "
    "reported.",
)

HALLUSION_FIELDS = {
    "id": "id",
    "question": "question",
    "group": "l2",
    "cluster": "figure",
    "set_id": "set_id",
    "figure_id": "figure_id",
    "question_id": "question_id",
}
HALLUSION_BENCH = _yes_or_no(
    name="hallusionbench",
    title="HallusionBench",
    files=(
        FilePattern(
            "original",
            "HallusionBench.json",
            "json",
            "image",
            {**HALLUSION_FIELDS, "answer": "gt_answer", "images": "filename"},
            {
                "rewrite": "hallusion",
                "choices": ("Yes", "No"),
                "answers": {"1": 0, "0": 1},
                "skip": {"filename": (None, "")},
                "image_dirs": ("hallusion_bench", "images", "."),
            },
        ),
        FilePattern(
            "vlmevalkit",
            "HallusionBench.tsv",
            "csv",
            "image",
            {**HALLUSION_FIELDS, "answer": "answer", "images": "image"},
            {
                **TSV_ANSWERS,
                "rewrite": "hallusion",
                "image_dirs": ("hallusion_bench", "images", "."),
            },
        ),
    ),
    directories=("HallusionBench", "hallusionbench", "hallusion_bench"),
    prompts=chat_prompts("{question}", "{option}", "yes or no"),
    split="image",
    metric="hallusion",
    size=951,
    source="tianyi-lab/HallusionBench (json and hallusion_bench.zip), or VLMEvalKit's "
    "HallusionBench.tsv",
    license="BSD-3-Clause",
    notes="aAcc, fAcc, qAcc and their mean are reported; which one the paper means is not stated. "
    "The 178 questions without an image are left out.",
)

NLVR = image_choice(
    name="nlvr",
    title="NLVR (dev)",
    language="en",
    files=file_patterns(
        "original",
        ("dev/dev.json", "nlvr/dev/dev.json"),
        "dev",
        {
            "id": "identifier",
            "question": "sentence",
            "answer": "label",
            "images": "image",
            "cluster": "image",
        },
        {
            "choices": ("true", "false"),
            "answers": {"true": 0, "false": 1},
            "rewrite": "nlvr",
            "image_dirs": ("images",),
        },
    ),
    directories=("nlvr", "NLVR"),
    prompts={
        "ll": Prompt("Is it true? {question}\n{options}\nAnswer:", "{letter}", chat=True),
        "generate": Prompt(
            "Is it true? {question}\n{options}\n"
            "Answer with the option's letter from the given choices directly.",
            chat=True,
            extraction="option",
        ),
    },
    split="dev",
    size=None,
    source="lil-lab/nlvr (nlvr/dev)",
    license="CC BY 4.0",
    notes="Sentences about drawn shapes; the first of the six arrangements of each image.",
    in_paper=False,
)

POPE_FIELDS = {
    "question": "question",
    "group": "category",
    "images": "image",
    "cluster": "image",
}
POPE = _yes_or_no(
    name="pope",
    title="POPE",
    files=(
        FilePattern(
            "llava",
            "llava_pope_test.jsonl",
            "json",
            "test",
            {**POPE_FIELDS, "id": "question_id", "answer": "label.label"},
            {
                **ANSWERS,
                "rewrite": "llava_question",
                "image_dirs": ("val2014", "../val2014", "images"),
                "labels": {
                    "file": "coco/coco_pope_{by}.json",
                    "by": "category",
                    "same": ("image",),
                },
            },
        ),
        FilePattern(
            "vlmevalkit",
            "POPE.tsv",
            "csv",
            "test",
            {**POPE_FIELDS, "id": "index", "answer": "answer", "cluster": "image_path?"},
            TSV_ANSWERS,
        ),
        FilePattern(
            "original",
            "coco_pope_*.json",
            "json",
            "test",
            {
                "id": ["@stem", "question_id"],
                "question": "text",
                "answer": "label",
                "group": "@stem",
                "images": "image",
                "cluster": "image",
            },
            {**ANSWERS, "image_dirs": ("val2014", "../val2014", "images")},
        ),
    ),
    directories=("pope", "POPE"),
    prompts=chat_prompts("{question}" + SHORT_ANSWER, "{option}", "pope"),
    split="test",
    metric="pope",
    size=8910,
    source="AoiDragon/POPE (output/coco) with COCO val2014, and LLaVA's eval.zip",
    license="MIT",
    notes="LLaVA's rule: an answer whose first sentence has no 'no' or 'not' means yes.",
    in_paper=False,
)
