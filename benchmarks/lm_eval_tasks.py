"""Tasks of lm-eval that read local files, for `lm_eval_backends.py`.

Each task includes lm-eval's own file, so that prompts, examples and metrics are its; the data are
written in the form of the hub's data set. MBPP's file is repeated, as importing its metric fetches
another; here its code runs in the sandbox of wings_jax, with lm-eval's three examples.
"""

from __future__ import annotations

import csv
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import lm_eval
import yaml

TASKS = pathlib.Path(lm_eval.__file__).parent / "tasks"
MMLU = "mmlu_"  # a subject follows
# Task -> lm-eval's file.
INCLUDED = {
    "piqa": "piqa/piqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "gsm8k": "gsm8k/gsm8k-cot.yaml",
}
MBPP = r"""
output_type: generate_until
doc_to_text: "You are an expert Python programmer, and here is your task: {{text}} Your code \
  should pass these tests:\n\n{{test_list[0]}}\n{{test_list[1]}}\n{{test_list[2]}}\n[BEGIN]\n"
doc_to_target: "{{code}}\n[DONE]"
target_delimiter: ""
process_results: !function code_metric.process_results
metric_list:
  - {metric: pass_at_1, aggregation: mean, higher_is_better: true}
generation_kwargs: {until: ["[DONE]"], do_sample: false, max_gen_toks: 256}
num_fewshot: 3
fewshot_split: validation
fewshot_config: {sampler: first_n}
metadata: {version: 1.0}
"""
CODE_METRIC = '''
from wings_jax.evaluation.benchmarks import extraction, sandbox


def process_results(doc, results):
    """Returns 1 if the code passes the tests."""
    code = extraction.extract_code(results[0])
    outcome = sandbox.run_tests(code, doc["test_list"], doc["test_setup_code"])
    return {"pass_at_1": float(outcome.passed)}
'''


def write_tasks(
    directory: pathlib.Path, data_root: pathlib.Path, names: list[str]
) -> dict[str, str]:
    """Writes the task files and their data; returns task -> its name in lm-eval."""
    (directory / "code_metric.py").write_text(CODE_METRIC)
    return {name: write_task(directory, data_root, name) for name in names}


def write_task(directory: pathlib.Path, data_root: pathlib.Path, name: str) -> str:
    """Writes one task; returns its name in lm-eval."""
    test, examples = read_rows(data_root, name)
    splits = {"validation" if name == "piqa" else "test": test}
    if examples:
        splits["dev" if name.startswith(MMLU) else "validation"] = examples

    # One JSONL file per split.
    files = {}
    for split, rows in splits.items():
        files[split] = str(directory / f"{name}-{split}.jsonl")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        pathlib.Path(files[split]).write_text(text, encoding="utf-8")

    local_name = f"local_{name}"
    entries: dict[str, Any] = {
        "task": local_name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": None,
        "validation_split": "validation" if "validation" in splits else None,
        "test_split": "test" if "test" in splits else None,
    }
    if name.startswith(MMLU):
        entries |= {"include": str(TASKS / f"mmlu/default/{name}.yaml"), "num_fewshot": 5}
        entries |= {"tag": None}
    elif name in INCLUDED:
        entries["include"] = str(TASKS / INCLUDED[name])

    text = yaml.safe_dump(entries, allow_unicode=True)
    (directory / f"{name}.yaml").write_text(text + (MBPP if name == "mbpp" else ""))
    return local_name


def read_rows(
    data_root: pathlib.Path, name: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the scored rows of a task, and the rows that its examples come from."""
    if name.startswith(MMLU):
        subject = name.removeprefix(MMLU)
        return read_mmlu(data_root, subject, "test"), read_mmlu(data_root, subject, "dev")
    if name == "piqa":
        rows = read_json_lines(data_root / "piqa/valid.jsonl")
        labels = (data_root / "piqa/valid-labels.lst").read_text().split()
        return [row | {"label": int(label)} for row, label in zip(rows, labels, strict=True)], []
    if name == "openbookqa":
        return read_openbookqa(data_root / "openbookqa/Main/test.tsv"), []
    if name == "gsm8k":
        return read_json_lines(data_root / "gsm8k/test.jsonl"), []

    # The test split, and the examples that lm-eval has.
    rows = {row["task_id"]: row for row in read_json_lines(data_root / "mbpp/mbpp.jsonl")}
    return [rows[number] for number in range(11, 511)], [rows[number] for number in (2, 3, 4)]


def read_json_lines(file: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the objects of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def read_mmlu(data_root: pathlib.Path, subject: str, split: str) -> list[dict[str, Any]]:
    """Returns the questions of a subject, of CSV files with or without a header."""
    file = data_root / f"mmlu/{split}/{subject}_{split}.csv"
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.reader(opened))
    if rows[0][0] == "question":
        rows = rows[1:]
    return [
        {
            "question": question,
            "choices": choices,
            "answer": int(answer) if answer.isdecimal() else "ABCD".index(answer),
        }
        for question, *choices, answer in rows
    ]


def read_openbookqa(file: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the questions of a TSV file, whose choices are in one cell."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows: Iterable[dict[str, str]] = list(csv.DictReader(opened, delimiter="\t"))
    return [
        {
            "question_stem": row["Question Stem"],
            "choices": {
                "label": list("ABCD"),
                "text": re.split(r"\s*\([A-D]\) ", row["Choices"])[1:],
            },
            "answerKey": row["Answer Key"],
        }
        for row in rows
    ]
