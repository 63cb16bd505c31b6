"""Declarations of the Chinese text benchmarks: CMMLU, CHID, OCNLI, CLUEWSC.

Prompts `ppl` are those of OpenCompass, whose turns are joined by a line break; `ll` of CMMLU is
that of lm-eval, which has none of the others.
"""

from __future__ import annotations

from wings_jax.evaluation.benchmarks.record import Benchmark, FilePattern, Prompt, Shots

CMMLU_FIELDS = {
    "question": "Question",
    "options": ["A", "B", "C", "D"],
    "answer": "Answer",
    "group": "@stem",
    "subject_zh": "subject_zh",
}
CMMLU_HINT = "以下是关于{subject_zh}的单项选择题，请直接给出正确答案的选项。\n"
CMMLU = Benchmark(
    name="cmmlu",
    title="CMMLU",
    kind="choice",
    modality="text",
    language="zh",
    files=tuple(
        FilePattern(form, pattern, reader, split, CMMLU_FIELDS, {"rewrite": "cmmlu", "strip": True})
        for split in ("test", "dev")
        for form, pattern, reader in (
            ("original", f"{split}/*.csv", "csv"),
            ("original", f"cmmlu_v1_0_1/{split}/*.csv", "csv"),
            ("original", f"data/{split}/*.csv", "csv"),
        )
    ),
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
CHID = Benchmark(
    name="chid",
    title="CHID",
    kind="choice",
    modality="text",
    language="zh",
    files=tuple(
        FilePattern("original", pattern, "json", "test", CHID_FIELDS, {"answers": "index"})
        for pattern in (
            "test_public.json",
            "chid/test_public.json",
            "datasets/chid/test_public.json",
        )
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
OCNLI_RELATIONS = {"contradiction": 0, "entailment": 1, "neutral": 2}
OCNLI_QUESTION = "语句一：“{sentence1}”\n语句二：“{sentence2}”\n请问这两句话是什么关系？\n"
OCNLI = Benchmark(
    name="ocnli",
    title="OCNLI",
    kind="choice",
    modality="text",
    language="zh",
    files=tuple(
        FilePattern(
            "original",
            pattern,
            "json",
            "dev",
            OCNLI_FIELDS,
            {
                "choices": ("矛盾", "蕴含", "无关"),
                "answers": OCNLI_RELATIONS,
                "skip": {"label": ("-",)},
            },
        )
        for pattern in ("dev.json", "ocnli/dev.json", "OCNLI/dev.json", "ocnli_public/dev.json")
    ),
    directories=("ocnli", "OCNLI", "ocnli_public", "CLUE"),
    prompts={
        "ppl": Prompt(OCNLI_QUESTION, "{option}"),
        "ll": Prompt(OCNLI_QUESTION, "{option}"),
    },
    split="dev",
    size=2950,
    source="cluebenchmark/OCNLI, or ocnli_public.zip of CLUE",
    license="CC BY-NC 2.0",
    notes="OpenCompass CLUE_ocnli_ppl_fdc6de. 50 of the 3,000 pairs have no label ('-').",
)

CLUEWSC_QUESTION = "{question}\n此处，代词“{span2}”被用于指代“{span1}”吗？\n"
CLUEWSC = Benchmark(
    name="cluewsc",
    title="CLUEWSC",
    kind="choice",
    modality="text",
    language="zh",
    files=tuple(
        FilePattern(
            "original",
            pattern,
            "json",
            "test",
            {
                "id": "idx?",
                "question": "text",
                "answer": "label",
                "span1": "span1",
                "span2": "span2",
            },
            {
                "rewrite": "mark_spans",
                "choices": ("是", "否"),
                "answers": {"true": 0, "false": 1},
            },
        )
        for pattern in ("test_public.json", "cluewsc/test_public.json")
    ),
    directories=("cluewsc", "FewCLUE/cluewsc", "FewCLUE", "CLUEWSC"),
    prompts={
        "ppl": Prompt(CLUEWSC_QUESTION, "{option}。"),
        "ll": Prompt(CLUEWSC_QUESTION, "{option}。"),
    },
    split="test",
    size=976,
    source="CLUEbenchmark/FewCLUE (datasets/cluewsc)",
    license="not stated",
    notes="After OpenCompass FewCLUE_cluewsc_ppl_868415 (yes and no in Chinese).",
    in_paper=False,
)
