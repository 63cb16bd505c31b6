"""Declarations of English text benchmarks: HellaSwag, SIQA, PIQA, GSM8K, MBPP.

Prompts are those of OpenCompass and lm-eval, as in `text`.
"""

from __future__ import annotations

from wings_jax.evaluation.benchmarks import worked_examples
from wings_jax.evaluation.benchmarks.declarations import english_choice, file_patterns
from wings_jax.evaluation.benchmarks.record import Benchmark, FilePattern, Prompt, Shots

# Where Hugging Face's forms of a validation split lie.
VALIDATION = ("**/validation-*.parquet", "**/validation/*.arrow")

HELLASWAG_FIELDS = {
    "id": "ind?",
    "question": "passage",
    "options": "options",
    "answer": "label",
    "query": "query",
    "group": "activity_label?",
    "cluster": "source_id?",
}
HELLASWAG_QUERY = {"question": "passage", "options": "choices", "answer": "gold", "query": "query"}
HELLASWAG_OPTIONS = {"answers": "index", "rewrite": "hellaswag"}
HELLASWAG = english_choice(
    name="hellaswag",
    title="HellaSwag",
    files=(
        FilePattern(
            "original", "hellaswag_val.jsonl", "json", "val", HELLASWAG_FIELDS, HELLASWAG_OPTIONS
        ),
        *file_patterns("huggingface", VALIDATION, "val", HELLASWAG_FIELDS, HELLASWAG_OPTIONS),
        FilePattern(
            "opencompass",
            "hellaswag.jsonl",
            "json",
            "val",
            HELLASWAG_QUERY,
            {"answers": "index", "rewrite": "hellaswag_query"},
        ),
    ),
    directories=("hellaswag",),
    prompts={"ppl": Prompt("{question}"), "ll": Prompt("{query}")},
    split="val",
    size=10042,
    source="rowanz/hellaswag, or Rowan/hellaswag at Hugging Face",
    license="MIT",
    notes="OpenCompass hellaswag_ppl_47bff9. [title] and [step] marks are removed as lm-eval does.",
)

SIQA_FIELDS = {
    "question": "question",
    "options": ["answerA", "answerB", "answerC"],
    "answer": "label",
    "context": "context",
}
SIQA = english_choice(
    name="siqa",
    title="SIQA",
    files=(
        *file_patterns(
            "original",
            ("dev.jsonl", "socialiqa-train-dev/dev.jsonl"),
            "dev",
            SIQA_FIELDS,
            {"answers": "number", "labels": {"file": "dev-labels.lst", "reader": "lines"}},
        ),
        *file_patterns("huggingface", VALIDATION, "dev", SIQA_FIELDS, {"answers": "number"}),
    ),
    directories=("siqa", "socialiqa", "social_i_qa", "socialiqa-train-dev"),
    prompts={
        "ppl": Prompt("{context}\nQuestion: {question}\nAnswer:"),
        "ll": Prompt("Q: {context} {question}\nA:"),
    },
    split="dev",
    size=1954,
    source="AI2's socialiqa-train-dev.zip, or allenai/social_i_qa at Hugging Face",
    license="CC BY 4.0",
    notes="OpenCompass siqa_ppl_ced5f6.",
)

PIQA_FIELDS = {"question": "goal", "options": ["sol1", "sol2"], "answer": "label"}
PIQA = english_choice(
    name="piqa",
    title="PIQA",
    files=(
        *(
            FilePattern(
                "original",
                pattern,
                "json",
                "val",
                PIQA_FIELDS,
                {"answers": "index", "labels": {"file": labels, "reader": "lines"}},
            )
            for pattern, labels in (
                ("valid.jsonl", "valid-labels.lst"),
                ("physicaliqa-train-dev/dev.jsonl", "dev-labels.lst"),
                ("dev.jsonl", "dev-labels.lst"),
            )
        ),
        *file_patterns("huggingface", VALIDATION, "val", PIQA_FIELDS, {"answers": "index"}),
    ),
    directories=("piqa", "physicaliqa-train-dev"),
    prompts={
        "ppl": Prompt("The following makes sense: \nQ: {question}\nA:", " {option}\n"),
        "ll": Prompt("Question: {question}\nAnswer:"),
    },
    split="val",
    size=1838,
    source="ybisk/ybisk.github.io (piqa/data), or ybisk/piqa at Hugging Face",
    license="AFL-3.0",
    notes="OpenCompass piqa_ppl_1cf9f0.",
)

GSM8K_FIELDS = {"question": "question", "answer": "number", "solution": "solution"}
GSM8K_OPTIONS = {"answers": "text", "rewrite": "gsm8k"}
GSM8K = Benchmark(
    name="gsm8k",
    title="GSM8K",
    kind="generate",
    modality="text",
    language="en",
    files=(
        FilePattern("original", "test.jsonl", "json", "test", GSM8K_FIELDS, GSM8K_OPTIONS),
        *file_patterns(
            "huggingface",
            ("main/test-*.parquet", "**/test-*.parquet", "**/test/*.arrow"),
            "test",
            GSM8K_FIELDS,
            GSM8K_OPTIONS,
        ),
    ),
    directories=("gsm8k", "GSM8K"),
    prompts={
        "generate": Prompt(
            "Question: {question}\nLet's think step by step\nAnswer:",
            " {solution}",
            examples=worked_examples.GSM8K,
            stop=("Question:",),
            max_new_tokens=512,
            extraction="number",
        ),
    },
    split="test",
    headline="generate",
    size=1319,
    source="openai/grade-school-math, or openai/gsm8k at Hugging Face",
    license="MIT",
    notes="OpenCompass gsm8k_gen_1d7fe4: four worked examples; the last number of the answer "
    "counts. Commas between thousands are removed, which OpenCompass does not do.",
)


def _mbpp_files(split: str, first: int, last: int) -> tuple[FilePattern, ...]:
    """Returns the forms of the tasks `first` to `last`."""
    fields = {
        "id": "task_id",
        "question": "text",
        "answer": "code",
        "tests": "tests",
        "test_lines": "test_lines",
        "setup": "setup",
    }
    options = {"answers": "text", "rewrite": "mbpp", "between": {"task_id": (first, last)}}
    tables = (f"full/{split}-*.parquet", f"**/{split}-*.parquet", f"**/{split}/*.arrow")
    return (
        FilePattern("original", "mbpp.jsonl", "json", split, fields, options),
        *file_patterns("huggingface", tables, split, fields, options),
    )


MBPP = Benchmark(
    name="mbpp",
    title="MBPP",
    kind="code",
    modality="text",
    language="en",
    files=(*_mbpp_files("test", 11, 510), *_mbpp_files("prompt", 1, 10)),
    directories=("mbpp", "MBPP"),
    prompts={
        "generate": Prompt(
            "You are an expert Python programmer, and here is your task: {question} Your code "
            "should pass these tests:\n\n {test_lines}  \n[BEGIN]\n",
            " '{answer}' \n[DONE] \n\n ",
            separator="\n",
            stop=("[DONE]",),
            max_new_tokens=512,
            extraction="code",
        ),
    },
    split="test",
    shots=Shots(3, "prompt", (1, 2, 3)),
    headline="generate",
    size=500,
    source="google-research/google-research (mbpp/mbpp.jsonl), or "
    "google-research-datasets/mbpp at Hugging Face",
    license="CC BY 4.0",
    notes="OpenCompass mbpp_gen_830460: tasks 2, 3 and 4 as examples; pass@1 of one greedy answer.",
)
