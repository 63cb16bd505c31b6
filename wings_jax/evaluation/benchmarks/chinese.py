"""Declarations of the Chinese text benchmarks: CMMLU, CHID, OCNLI, CLUEWSC.

Prompts `ppl` are those of OpenCompass, whose turns are joined by a line break; `ll` of CMMLU is
that of lm-eval, which has none of the others.
"""

from __future__ import annotations

from wings_jax.evaluation.benchmarks.declarations import (
    chinese_choice,
    file_patterns,
    likelihood_prompts,
)
from wings_jax.evaluation.benchmarks.record import FilePattern, Prompt, Shots

CMMLU_FIELDS = {
    "question": "Question",
    "options": ["A", "B", "C", "D"],
    "answer": "Answer",
    "group": "@stem",
    "subject_zh": "subject_zh",
}
CMMLU_OPTIONS = {"rewrite": "cmmlu", "strip": True}
CMMLU_HINT = "以下是关于{subject_zh}的单项选择题，请直接给出正确答案的选项。\n"


def _cmmlu_files(split: str) -> tuple[FilePattern, ...]:
    """Returns the forms of a split of CMMLU, which differ in the folder only."""
    globs = (f"{split}/*.csv", f"cmmlu_v1_0_1/{split}/*.csv", f"data/{split}/*.csv")
    return file_patterns("original", globs, split, CMMLU_FIELDS, CMMLU_OPTIONS)


CMMLU = chinese_choice(
    name="cmmlu",
    title="CMMLU",
    files=(*_cmmlu_files("test"), *_cmmlu_files("dev")),
    directories=("cmmlu", "CMMLU"),
    prompts={
        "ppl": Prompt(
            CMMLU_HINT + "题目：{question}\n{options}\n答案是:", " {letter}", separator="\n"
        ),
        "ll": Prompt("{question}\n{options}\n答案：", " {letter}", hint=f"{CMMLU_HINT}\n"),
    },
    split="test",
    shots=Shots(5, "dev", (0, 1, 2, 3, 4), per_group=True),
    grouping="subject",
    average="macro",
    size=11582,
    source="haonan-li/CMMLU (cmmlu_v1_0_1.zip)",
    license="CC BY-NC-SA 4.0",
    notes="OpenCompass cmmlu_ppl_8b9c76: 5 shots, mean of the 67 subjects.",
)

CHID_FIELDS = {
    "id": "id",
    "question": "content",
    "options": "candidates",
    "answer": "answer",
}
CHID = chinese_choice(
    name="chid",
    title="CHID",
    files=file_patterns(
        "original",
        ("test_public.json", "chid/test_public.json", "datasets/chid/test_public.json"),
        "test",
        CHID_FIELDS,
        {"answers": "index", "gap": "#idiom#"},
    ),
    directories=("chid", "FewCLUE/chid", "FewCLUE", "CHID"),
    prompts={
        "ppl": Prompt("以下句子是否通顺？\n{filled}\n", "这个句子是通顺的。", gap="#idiom#"),
        "ll": Prompt("{before}", "{option}{after}", gap="#idiom#"),
    },
    split="test",
    size=2002,
    source="CLUEbenchmark/FewCLUE (datasets/chid)",
    license="not stated",
    notes="OpenCompass FewCLUE_chid_ppl_8f2872, test_public; it also has the dev split.",
)

OCNLI_FIELDS = {
    "id": "id?",
    "question": "sentence1",
    "answer": "label",
    "sentence1": "sentence1",
    "sentence2": "sentence2",
    "group": "genre?",
}
OCNLI_OPTIONS = {
    "choices": ("矛盾", "蕴含", "无关"),
    "answers": {"contradiction": 0, "entailment": 1, "neutral": 2},
    "skip": {"label": ("-",)},
}
OCNLI_QUESTION = "语句一：“{sentence1}”\n语句二：“{sentence2}”\n请问这两句话是什么关系？\n"
OCNLI = chinese_choice(
    name="ocnli",
    title="OCNLI",
    files=file_patterns(
        "original",
        ("dev.json", "ocnli/dev.json", "OCNLI/dev.json", "ocnli_public/dev.json"),
        "dev",
        OCNLI_FIELDS,
        OCNLI_OPTIONS,
    ),
    directories=("ocnli", "OCNLI", "ocnli_public", "CLUE"),
    prompts=likelihood_prompts(Prompt(OCNLI_QUESTION, "{option}")),
    split="dev",
    size=2950,
    source="cluebenchmark/OCNLI, or ocnli_public.zip of CLUE",
    license="CC BY-NC 2.0",
    notes="OpenCompass CLUE_ocnli_ppl_fdc6de. 50 of the 3,000 pairs have no label ('-').",
)

CLUEWSC_QUESTION = "{question}\n此处，代词“{span2}”被用于指代“{span1}”吗？\n"
CLUEWSC = chinese_choice(
    name="cluewsc",
    title="CLUEWSC",
    files=file_patterns(
        "original",
        ("test_public.json", "cluewsc/test_public.json"),
        "test",
        {"id": "idx?", "question": "text", "answer": "label", "span1": "span1", "span2": "span2"},
        {"rewrite": "mark_spans", "choices": ("是", "否"), "answers": {"true": 0, "false": 1}},
    ),
    directories=("cluewsc", "FewCLUE/cluewsc", "FewCLUE", "CLUEWSC"),
    prompts=likelihood_prompts(Prompt(CLUEWSC_QUESTION, "{option}。")),
    split="test",
    size=976,
    source="CLUEbenchmark/FewCLUE (datasets/cluewsc)",
    license="not stated",
    notes="After OpenCompass FewCLUE_cluewsc_ppl_868415 (yes and no in Chinese).",
    in_paper=False,
)
