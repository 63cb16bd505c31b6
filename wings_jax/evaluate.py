"""Scores models: right answers to tasks, text-only forgetting, or likelihood of text and choices.

    python -m wings_jax.evaluate --checkpoint runs/stage2
    python -m wings_jax.evaluate --base --checkpoint stage1=runs/stage1 stage2=runs/stage2 \\
        --tasks scenes_images,scenes_text --out runs/evaluation --figure runs/answers.png
    python -m wings_jax.evaluate iit --checkpoint runs/stage2
    python -m wings_jax.evaluate forgetting --base runs/stage1 --checkpoint runs/stage2
    python -m wings_jax.evaluate language --base --checkpoint runs/stage2 --out runs/language \\
        [--text FILE.txt] [--choices FILE.jsonl]

Prints a table with a column per model; with --out, report.md, report.json and every answer are
written there. --base adds the model before any training (the checkpoint that was imported, or the
LLM and the tower of the first config), or another checkpoint to compare with. --adapter puts each
FILE (of `convert export --format adapter`) on the checkpoint and scores that instead. --mesh shares
each model among devices, --dtype is that of its matmuls. `iit` asks in interleaved conversations of
text and images; `forgetting` compares each model with the base, question by question, and writes
forgetting.md and forgetting.json too.

`language` measures any LLM by likelihood: the perplexity of English prose, and multiple choice
without examples, where the most likely choice counts as the answer (and, in another row, the most
likely per token). The default text is the descriptions of data sets in the installed
tensorflow_datasets, the default questions are those of `evaluation.everyday`. --text is a UTF-8
file, and a line of --choices is {"question": str, "choices": [str, ...], "answer": index,
"id": str, "kind": str}, where the last two are optional: ARC, MMLU and others take this form. It
writes language.md, language.json, and choices-NAME.jsonl with every decision.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from wings_jax import cli
from wings_jax.errors import UserError

PROGRAM = cli.program_name("wings_jax.evaluate")
TASK_NAMES = ("scenes_images", "scenes_text", "iit")  # of `evaluation.tasks`, which imports slowly
DEFAULT_TASKS = {"tasks": "scenes_images,scenes_text", "iit": "iit", "forgetting": "scenes_text"}
LANGUAGE = "language"
TASK_FLAGS, LANGUAGE_FLAGS = ("tasks", "data_root", "figure"), ("text", "choices")


def main() -> None:
    """Evaluates the models that the flags name."""
    flags = parse_flags()
    cli.use_compilation_cache()

    # After the flags: these import slowly.
    from wings_jax import axes
    from wings_jax.evaluation import commands, models
    from wings_jax.model import parameters

    mesh = axes.make_mesh(axes.parse_mesh(flags.mesh)) if flags.mesh else None
    lazy_models = models.find_models(
        flags.checkpoint,
        with_base=flags.base is not None,
        base=flags.base or None,
        adapters=flags.adapter,
        loading=models.LoadOptions(flags.dtype or parameters.default_dtype(), mesh),
    )
    if flags.mode == LANGUAGE:
        commands.evaluate_language(
            lazy_models,
            text_file=flags.text,
            choices=flags.choices,
            limit=flags.limit,
            rows=flags.batch_size,
            out=flags.out,
        )
        return

    commands.evaluate_tasks(
        lazy_models,
        task_names=flags.tasks,
        data_root=flags.data_root,
        limit=flags.limit,
        rows=flags.batch_size,
        out=flags.out,
        figure=flags.figure,
        compare=flags.mode == "forgetting",
    )


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags, with the mode's defaults filled in. Raises UserError."""
    flags = make_parser().parse_args(arguments)
    cli.check_text(flags)
    check_mode(flags)

    if flags.tasks is None:
        flags.tasks = DEFAULT_TASKS.get(flags.mode)
    if flags.mode == "forgetting" and flags.base is None:
        flags.base = ""

    for name in ("limit", "batch_size"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: {value} is less than 1")
    return flags


def check_mode(flags: argparse.Namespace) -> None:
    """Raises UserError if a flag is of another mode than the one that is run."""
    # A flag without effect would be a silent mistake.
    is_language = flags.mode == LANGUAGE
    problem = f"is not for `{LANGUAGE}`" if is_language else f"is for `{LANGUAGE}` only"
    for name in TASK_FLAGS if is_language else LANGUAGE_FLAGS:
        if getattr(flags, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} {problem}")


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Counts right answers, or measures likelihood."
    )
    add = parser.add_argument
    add("mode", nargs="?", choices=(*DEFAULT_TASKS, LANGUAGE), default="tasks")

    # Models.
    add(
        "--checkpoint",
        nargs="+",
        action="extend",
        required=True,
        metavar="[NAME=]DIR",
        help="workdir or checkpoint; several give one table side by side",
    )
    cli.add_adapter_flag(add)
    add(
        "--base",
        nargs="?",
        const="",
        metavar="[NAME=]DIR",
        help="first column: this checkpoint or, without a DIR, the model before any training",
    )
    add("--mesh", help="devices that share each model, e.g. data=2,tensor=4")
    add("--dtype", choices=("float32", "bfloat16"), help="of the matmuls")

    # Questions and text.
    add("--tasks", help=f"of {', '.join(TASK_NAMES)}; default: {DEFAULT_TASKS['tasks']}")
    add("--data-root", type=pathlib.Path, help="default: the scenes of the checkpoint's config")
    add("--text", type=pathlib.Path, metavar="FILE.txt", help="`language`: text to score")
    add("--choices", type=pathlib.Path, metavar="FILE.jsonl", help="`language`: questions")
    add("--limit", type=int, help="use only about this many questions of each task, or passages")
    add("--batch-size", type=int, default=64, help="default: %(default)s")

    # Outputs.
    add("--out", type=pathlib.Path, help="directory for the report and the answers")
    add("--figure", type=pathlib.Path, metavar="FILE.png", help="some questions with their images")
    add("--picture", type=pathlib.Path, dest="figure", help=argparse.SUPPRESS)  # the old name
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    cli.run_main(PROGRAM, main)
