"""Declarations of English text benchmarks: MMLU, ARC, WinoGrande, OpenBookQA, RACE, WSC.

Prompts `ppl` are those of OpenCompass' configurations (named in `notes`), `ll` those of lm-eval,
`generate` those of OpenCompass. Where OpenCompass has two turns without a chat template, which it
joins by a line break, the answer follows "Answer:" and the like after a space here.
"""

from __future__ import annotations

from wings_jax.evaluation.benchmarks.record import Benchmark, FilePattern, Prompt, Shots

LETTERED = "{question}\n{options}\nAnswer:"
QUESTION = Prompt("Question: {question}\nAnswer:")


def _mmlu_files(split: str, parquet: str) -> tuple[FilePattern, ...]:
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
    return (
        FilePattern("csv with header", f"{split}/*_{split}.csv", "csv", split, header, headed),
        FilePattern("original", f"{split}/*_{split}.csv", "csv", split, bare, headless),
        FilePattern("original", f"data/{split}/*_{split}.csv", "csv", split, bare, headless),
        FilePattern("original", f"*/data/{split}/*_{split}.csv", "csv", split, bare, headless),
        FilePattern("huggingface", f"all/{parquet}-*.parquet", "parquet", split, named, rows),
        FilePattern("huggingface", f"**/{parquet}-*.parquet", "parquet", split, named, rows),
        FilePattern("huggingface", f"**/{parquet}/*.arrow", "arrow", split, named, rows),
    )


MMLU = Benchmark(
    name="mmlu",
    title="MMLU",
    kind="choice",
    modality="text",
    language="en",
    files=(*_mmlu_files("test", "test"), *_mmlu_files("dev", "dev")),
    directories=("mmlu", "MMLU", "mmlu_parquet", "mmlu_hendrycks_form", "hf_arrow/mmlu"),
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


def _arc(name: str, level: str, title: str, size: int) -> Benchmark:
    """Returns ARC-Easy or ARC-Challenge."""
    # AI2's lines nest the stem and the choices in the key "question".
    original = {
        "id": "id",
        "question": "question.stem",
        "options": "question.choices[].text",
        "labels": "question.choices[].label",
        "answer": "answerKey",
    }

    # Hugging Face's rows hold the choices as parallel lists.
    rows = {
        "id": "id",
        "question": "question",
        "options": "choices.text",
        "labels": "choices.label",
        "answer": "answerKey",
    }

    # Abbreviation of the level in folders and in OpenCompass' names of configurations.
    short = "e" if level == "Easy" else "c"
    # The answer key is a label of the choices: a letter, or a digit in some questions.
    by_label = {"answers": "label"}

    return Benchmark(
        name=name,
        title=title,
        kind="choice",
        modality="text",
        language="en",
        files=tuple(
            FilePattern(form, pattern, reader, "test", fields, by_label)
            for form, pattern, reader, fields in (
                ("original", f"ARC-{short}/ARC-{level}-Test.jsonl", "json", original),
                ("original", f"ARC-{level}/ARC-{level}-Test.jsonl", "json", original),
                ("original", f"ARC-{level}-Test.jsonl", "json", original),
                ("huggingface", f"**/ARC-{level}/test-*.parquet", "parquet", rows),
                ("huggingface", f"**/ARC-{level}/test/*.arrow", "arrow", rows),
            )
        ),
        directories=("ARC", "arc", "ai2_arc", "ARC-V1-Feb2018-2", "hf_arrow/ai2_arc"),
        prompts={"ppl": QUESTION, "ll": QUESTION},
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
WINOGRANDE_OPTIONS = {"answers": "number", "rewrite": "winogrande"}
WINOGRANDE = Benchmark(
    name="winogrande",
    title="WinoGrande",
    kind="choice",
    modality="text",
    language="en",
    files=tuple(
        FilePattern(form, pattern, reader, "dev", WINOGRANDE_FIELDS, WINOGRANDE_OPTIONS)
        for form, pattern, reader in (
            ("original", "dev.jsonl", "json"),
            ("original", "winogrande_1.1/dev.jsonl", "json"),
            ("huggingface", "**/winogrande_xl/validation-*.parquet", "parquet"),
            ("huggingface", "**/validation-*.parquet", "parquet"),
            ("huggingface", "**/validation/*.arrow", "arrow"),
        )
    ),
    directories=("winogrande", "winogrande_1.1", "hf_arrow/winogrande"),
    prompts={
        "ppl": Prompt("Good sentence:", " {filled}", gap="_"),
        "ll": Prompt("{before}{option}", " {tail}", gap="_"),
    },
    split="dev",
    size=1267,
    source="allenai/winogrande (winogrande_1.1.zip), or winogrande at Hugging Face",
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

    original = {
        "id": "id",
        "question": "question.stem",
        "options": "question.choices[].text",
        "labels": "question.choices[].label",
        "answer": "answerKey",
        **fact,
    }
    rows = {
        **original,
        "question": "question_stem",
        "options": "choices.text",
        "labels": "choices.label",
    }

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

    return tuple(
        FilePattern(form, pattern, reader, "test", fields, options)
        for form, pattern, reader, fields, options in (
            ("original", f"{folder}/test{suffix}.jsonl", "json", original, by_label),
            ("original", f"Data/{folder}/test{suffix}.jsonl", "json", original, by_label),
            ("original tsv", f"{folder}/test{suffix}.tsv", "csv", table, tsv),
            ("original tsv", f"Data/{folder}/test{suffix}.tsv", "csv", table, tsv),
            ("huggingface", f"{variant}/test-*.parquet", "parquet", rows, by_label),
            ("huggingface", f"{variant}/test/*.arrow", "arrow", rows, by_label),
        )
    )


def _openbookqa(name: str, title: str, with_fact: bool) -> Benchmark:
    """Returns OpenBookQA; `with_fact` states the science fact before the question."""
    beginning = "Given the fact: {fact1}\n" if with_fact else ""
    # `ppl` and `letter` show the options with letters; `ll` scores the text of each option.
    lettered = Prompt(
        f"{beginning}Question: {{question}}\n{{options}}\nAnswer:",
        " {letter}",
    )

    return Benchmark(
        name=name,
        title=title,
        kind="choice",
        modality="text",
        language="en",
        files=_openbookqa_files(with_fact),
        directories=(
            "openbookqa",
            "OpenBookQA",
            "OpenBookQA-V1-Sep2018",
            "openbookqa_tsv",
            "hf_arrow/openbookqa",
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
    prompt = Prompt(
        "Read the article, and answer the question by replying A, B, C or D.\n\n"
        "Article:\n{article}\n\nQ: {question}\n\n{options}\nA:",
        " {letter}",
    )

    return Benchmark(
        name=f"race_{level}",
        title=f"RACE-{level[0].upper()}",
        kind="choice",
        modality="text",
        language="en",
        files=(
            FilePattern("original", f"test/{level}/*.txt", "json", "test", fields, article),
            FilePattern("original", f"RACE/test/{level}/*.txt", "json", "test", fields, article),
            FilePattern("opencompass", f"test/{level}.jsonl", "json", "test", lines),
            FilePattern("huggingface", f"{level}/test-*.parquet", "parquet", "test", lines),
            FilePattern("huggingface", f"{level}/test/*.arrow", "arrow", "test", lines),
        ),
        directories=("race", "RACE", "hf_arrow/race"),
        prompts={"ppl": prompt, "ll": prompt},
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
WSC = Benchmark(
    name="wsc",
    title="WSC",
    kind="choice",
    modality="text",
    language="en",
    files=tuple(
        FilePattern(form, pattern, reader, "val", WSC_FIELDS, WSC_OPTIONS)
        for form, pattern, reader in (
            ("original", "val.jsonl", "json"),
            ("original", "WSC/val.jsonl", "json"),
            ("huggingface", "**/wsc.fixed/validation-*.parquet", "parquet"),
            ("huggingface", "**/wsc*/validation/*.arrow", "arrow"),
        )
    ),
    directories=("WSC", "SuperGLUE/WSC", "SuperGLUE", "super_glue", "hf_arrow/super_glue"),
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
