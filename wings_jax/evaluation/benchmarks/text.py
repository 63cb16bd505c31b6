"""Declarations of English text benchmarks: MMLU, ARC, WinoGrande, OpenBookQA, RACE, WSC.

Prompts `ppl` are those of OpenCompass' configurations (named in `notes`), `ll` those of lm-eval,
`generate` those of OpenCompass. Where OpenCompass has two turns without a chat template, which it
joins by a line break, the answer follows "Answer:" and the like after a space here.
"""

from __future__ import annotations

from wings_jax.evaluation.benchmarks.declarations import (
    english_choice,
    file_patterns,
    likelihood_prompts,
)
from wings_jax.evaluation.benchmarks.record import Benchmark, FilePattern, Prompt, Shots

LETTERED = "{question}\n{options}\nAnswer:"
QUESTION = Prompt("Question: {question}\nAnswer:")


def _mmlu_files(split: str) -> tuple[FilePattern, ...]:
    """Returns the forms of a split of MMLU: with and without header, parquet."""
    by_stem = {"group": "@stem"}
    header = {
        "question": "question",
        "options": ["choice0", "choice1", "choice2", "choice3"],
        "answer": "answer",
        **by_stem,
    }
    bare = {"question": "0", "options": ["1", "2", "3", "4"], "answer": "5", **by_stem}
    named = {"question": "question", "options": "choices", "answer": "answer", "group": "subject"}

    stem = {"stem_suffix": f"_{split}", "strip": True}
    headed = {**stem, "answers": "index"}
    headless = {**stem, "answers": "letter", "header": False}
    rows = {"answers": "index", "strip": True}

    csv = f"{split}/*_{split}.csv"
    tables = (f"all/{split}-*.parquet", f"**/{split}-*.parquet", f"**/{split}/*.arrow")
    return (
        FilePattern("csv with header", csv, "csv", split, header, headed),
        *file_patterns("original", (csv, f"data/{csv}", f"*/data/{csv}"), split, bare, headless),
        *file_patterns("huggingface", tables, split, named, rows),
    )


MMLU = english_choice(
    name="mmlu",
    title="MMLU",
    files=(*_mmlu_files("test"), *_mmlu_files("dev")),
    directories=("mmlu", "MMLU", "mmlu_parquet", "mmlu_hendrycks_form"),
    prompts={
        "ppl": Prompt(
            LETTERED,
            " {letter}",
            hint="The following are multiple choice questions (with answers) about  {subject}.\n\n",
        ),
        "ll": Prompt(
            LETTERED,
            " {letter}",
            hint="The following are multiple choice questions (with answers) about {subject}.\n\n",
        ),
    },
    split="test",
    shots=Shots(5, "dev", (0, 1, 2, 3, 4), per_group=True),
    grouping="subject",
    average="macro",
    size=14042,
    source="hendrycks/test (data.tar), or cais/mmlu at Hugging Face",
    license="MIT",
    notes="OpenCompass mmlu_ppl_ac766d: 5 shots, mean of the 57 subjects. Spaces around a "
    "question are dropped, as in lm-eval.",
)


# ARC and OpenBookQA: AI2's lines nest the stem and the choices in the key "question".
AI2_FIELDS = {
    "id": "id",
    "question": "question.stem",
    "options": "question.choices[].text",
    "labels": "question.choices[].label",
    "answer": "answerKey",
}
# Hugging Face's rows of them hold the choices as parallel lists.
AI2_COLUMNS = {"options": "choices.text", "labels": "choices.label"}


def _arc(name: str, level: str, title: str, size: int) -> Benchmark:
    """Returns ARC-Easy or ARC-Challenge."""
    rows = {**AI2_FIELDS, **AI2_COLUMNS, "question": "question"}

    # Abbreviation of the level in folders and in OpenCompass' names of configurations.
    short = "e" if level == "Easy" else "c"
    # The answer key is a label of the choices: a letter, or a digit in some questions.
    by_label = {"answers": "label"}

    test = f"ARC-{level}-Test.jsonl"
    lines = (f"ARC-{short}/{test}", f"ARC-{level}/{test}", test)
    tables = (f"**/ARC-{level}/test-*.parquet", f"**/ARC-{level}/test/*.arrow")
    return english_choice(
        name=name,
        title=title,
        files=(
            *file_patterns("original", lines, "test", AI2_FIELDS, by_label),
            *file_patterns("huggingface", tables, "test", rows, by_label),
        ),
        directories=("ARC", "arc", "ai2_arc", "ARC-V1-Feb2018-2"),
        prompts=likelihood_prompts(QUESTION),
        split="test",
        size=size,
        source="AI2's ARC-V1-Feb2018, or allenai/ai2_arc at Hugging Face",
        license="CC BY-SA 4.0",
        notes=f"OpenCompass ARC_{short}_ppl_a450bd reads the dev split by default, and drops "
        "questions without exactly four options; here all questions of the test split are scored.",
    )


ARC_EASY = _arc("arc_easy", "Easy", "ARC-Easy", 2376)
ARC_CHALLENGE = _arc("arc_challenge", "Challenge", "ARC-Challenge", 1172)

WINOGRANDE_FIELDS = {
    "id": "qID?",
    "question": "sentence",
    "options": ["option1", "option2"],
    "answer": "answer",
    "tail": "tail",
}
WINOGRANDE_OPTIONS = {"answers": "number", "rewrite": "winogrande", "gap": "_"}
WINOGRANDE = english_choice(
    name="winogrande",
    title="WinoGrande",
    files=(
        *file_patterns(
            "original",
            ("dev.jsonl", "winogrande_1.1/dev.jsonl"),
            "dev",
            WINOGRANDE_FIELDS,
            WINOGRANDE_OPTIONS,
        ),
        *file_patterns(
            "huggingface",
            (
                "**/winogrande_xl/validation-*.parquet",
                "**/validation-*.parquet",
                "**/validation/*.arrow",
            ),
            "dev",
            WINOGRANDE_FIELDS,
            WINOGRANDE_OPTIONS,
        ),
    ),
    directories=("winogrande", "winogrande_1.1"),
    prompts={
        "ppl": Prompt("Good sentence:", " {filled}", gap="_"),
        "ll": Prompt("{before}{option}", " {tail}", gap="_"),
    },
    split="dev",
    size=1267,
    source="allenai/winogrande (winogrande_1.1.zip), or allenai/winogrande at Hugging Face",
    license="CC BY 4.0",
    notes="OpenCompass winogrande_ppl_55a66e, which warns that it does not reproduce published "
    "scores; `ll` is partial scoring, as in lm-eval and in its winogrande_ll_c5cf57.",
)


def _openbookqa_files(with_fact: bool) -> tuple[FilePattern, ...]:
    """Returns the forms of OpenBookQA's test split, or of its variant with the science fact."""
    # Folder of the release, configuration at Hugging Face, and suffix of the files.
    folder, variant, suffix = (
        ("Additional", "additional", "_complete") if with_fact else ("Main", "main", "")
    )
    fact = {"fact1": "fact1"} if with_fact else {}

    original = {**AI2_FIELDS, **fact}
    rows = {**original, **AI2_COLUMNS, "question": "question_stem"}

    # `split_lettered` makes the columns `options` and `labels` of one cell with all choices.
    table = {
        "id": "ID",
        "question": "Question Stem",
        "options": "options",
        "labels": "labels",
        "answer": "Answer Key",
        **({"fact1": "Fact1"} if with_fact else {}),
    }
    by_label = {"answers": "label"}
    # A quotation mark in the TSV belongs to the text.
    tsv = {**by_label, "delimiter": "\t", "quotes": False, "rewrite": "split_lettered"}

    test = f"{folder}/test{suffix}"
    published = (f"{variant}/test-*.parquet", f"{variant}/test/*.arrow")
    return (
        *file_patterns(
            "original", (f"{test}.jsonl", f"Data/{test}.jsonl"), "test", original, by_label
        ),
        *file_patterns("original tsv", (f"{test}.tsv", f"Data/{test}.tsv"), "test", table, tsv),
        *file_patterns("huggingface", published, "test", rows, by_label),
    )


def _openbookqa(name: str, title: str, with_fact: bool) -> Benchmark:
    """Returns OpenBookQA; `with_fact` states the science fact before the question."""
    beginning = "Given the fact: {fact1}\n" if with_fact else ""
    # `ppl` and `letter` show the options with letters; `ll` scores the text of each option.
    lettered = Prompt(
        f"{beginning}Question: {{question}}\n{{options}}\nAnswer:",
        " {letter}",
    )

    return english_choice(
        name=name,
        title=title,
        files=_openbookqa_files(with_fact),
        directories=(
            "openbookqa",
            "OpenBookQA",
            "OpenBookQA-V1-Sep2018",
            "openbookqa_tsv",
        ),
        prompts={"ppl": lettered, "ll": Prompt(f"{beginning}{{question}}"), "letter": lettered},
        split="test",
        size=500,
        source="AI2's OpenBookQA-V1-Sep2018, or allenai/openbookqa at Hugging Face",
        license="Apache-2.0 (repository)",
        notes="OpenCompass obqa_ppl_c7c154 has two variants, without and with the fact; which "
        "one the paper means is not stated.",
        in_paper=not with_fact,
    )


OPENBOOKQA = _openbookqa("openbookqa", "OpenBookQA", with_fact=False)
OPENBOOKQA_FACT = _openbookqa("openbookqa_fact", "OpenBookQA with fact", with_fact=True)


def _race(level: str, size: int) -> Benchmark:
    """Returns RACE-M ("middle") or RACE-H ("high")."""
    # Questions about one article are not independent: the article is their cluster.
    fields = {
        "id": "id",
        "question": "question",
        "options": "options",
        "answer": "answer",
        "article": "article",
        "cluster": "article",
    }

    # Forms with a row per question may lack identifiers.
    lines = {**fields, "id": "id?"}
    # An original file is one article with the lists of its questions.
    article = {"rewrite": "split_article"}
    articles = (f"test/{level}/*.txt", f"RACE/test/{level}/*.txt")
    tables = (f"{level}/test-*.parquet", f"{level}/test/*.arrow")

    prompt = Prompt(
        "Read the article, and answer the question by replying A, B, C or D.\n\n"
        "Article:\n{article}\n\nQ: {question}\n\n{options}\nA:",
        " {letter}",
    )

    return english_choice(
        name=f"race_{level}",
        title=f"RACE-{level[0].upper()}",
        files=(
            *file_patterns("original", articles, "test", fields, article, reader="json"),
            FilePattern("opencompass", f"test/{level}.jsonl", "json", "test", lines),
            *file_patterns("huggingface", tables, "test", lines),
        ),
        directories=("race", "RACE"),
        prompts=likelihood_prompts(prompt),
        split="test",
        size=size,
        source="RACE of Carnegie Mellon University, or ehovy/race at Hugging Face",
        license="non-commercial research",
        notes="OpenCompass race_ppl_a138cd. Intervals resample articles. lm-eval's `race` has "
        "only the last question of each article of RACE-H, and is not comparable.",
    )


RACE_MIDDLE, RACE_HIGH = _race("middle", 1436), _race("high", 3498)

WSC_FIELDS = {
    "id": "idx?",
    "question": "marked",
    "answer": "label",
    "starred": "starred",
    "span1": "span1",
    "span2": "span2",
}
WSC_OPTIONS = {
    "rewrite": "mark_spans",
    "choices": ("Yes", "No"),
    "answers": {"true": 0, "false": 1, "1": 0, "0": 1},
}
WSC_LETTERED = Prompt(
    "Passage: {question}\nDoes the pronoun # {span2} # refer to * {span1} *?\n{options}\nAnswer:",
    " {letter}",
)
WSC = english_choice(
    name="wsc",
    title="WSC",
    files=(
        *file_patterns("original", ("val.jsonl", "WSC/val.jsonl"), "val", WSC_FIELDS, WSC_OPTIONS),
        *file_patterns(
            "huggingface",
            ("**/wsc.fixed/validation-*.parquet", "**/wsc*/validation/*.arrow"),
            "val",
            WSC_FIELDS,
            WSC_OPTIONS,
        ),
    ),
    directories=("WSC", "SuperGLUE/WSC", "SuperGLUE", "super_glue"),
    prompts={
        "ppl": WSC_LETTERED,
        "ll": Prompt(
            'Passage: {starred}\nQuestion: In the passage above, does the pronoun "*{span2}*" '
            'refer to "*{span1}*"?\nAnswer:'
        ),
        "letter": WSC_LETTERED,
    },
    split="val",
    size=104,
    source="SuperGLUE (WSC.zip), or aps/super_glue at Hugging Face",
    license="CC BY 4.0 (Winograd schemas)",
    notes="OpenCompass SuperGLUE_WSC_ppl_1c4a90. The paper cites CLUE for its WSC column, so it "
    "may mean `cluewsc`. lm-eval's choices are lower case and its text is detokenized.",
)
