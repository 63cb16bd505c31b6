"""Scores models: benchmarks of papers, the embedded tasks, forgetting, likelihood of text.

    python -m wings_jax.evaluate --checkpoint runs/stage2 --tasks mmlu,piqa,mmbench_en \\
        --data-root DATA --out runs/evaluation
    python -m wings_jax.evaluate --checkpoint runs/stage2 --suite wings --data-root DATA --out DIR
    python -m wings_jax.evaluate --compare runs/evaluation/stage1 runs/evaluation/stage2
    python -m wings_jax.evaluate forgetting --base runs/stage1 --checkpoint runs/stage2 \\
        --tasks mmlu,piqa --data-root DATA --out runs/forgetting
    python -m wings_jax.evaluate --base --checkpoint stage1=runs/stage1 stage2=runs/stage2 \\
        --tasks scenes_images,scenes_text --out runs/evaluation --figure runs/answers.png
    python -m wings_jax.evaluate iit --checkpoint runs/stage2
    python -m wings_jax.evaluate language --base --checkpoint runs/stage2 --out runs/language \\
        [--text FILE.txt] [--choices FILE.jsonl]

Prints a table with a column per model; with --out, reports and every answer are written there.
--base adds the model before any training (the checkpoint that was imported, or the LLM and the
tower of the first config), or another checkpoint to compare with. --adapter puts each FILE (of
`convert export --format adapter`) on the checkpoint and scores that instead. --mesh shares each
model among devices, --dtype is that of its matmuls.

Tasks are benchmarks (--list prints them; their files are below --data-root, in any of the forms
that they are published in) and the embedded ones, scenes_images, scenes_text and iit. --suite
wings is all benchmarks of the paper whose files are there; it lists the others. --protocols
chooses among ppl, ll, ll_chars, ll_bytes, ll_token, letter and generate, --shots the number of
solved examples. A run that was stopped resumes with the same command. --shard I/N computes part I
of N on one of several machines with a common --out; the same command without it writes the report.
`forgetting` compares each model with the base, question by question; --compare does so for
finished results.

`language` measures any LLM by likelihood: the perplexity of English prose, and multiple choice
without examples, where the most likely choice counts as the answer (and, in another row, the most
likely per token). The default text is the descriptions of data sets in the installed
tensorflow_datasets, the default questions are those of `evaluation.everyday`. --text is a UTF-8
file, and a line of --choices is {"question": str, "choices": [str, ...], "answer": index,
"id": str, "kind": str}, where the last two are optional. It writes language.md, language.json, and
choices-NAME.jsonl with every decision.
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
BENCHMARK_FLAGS = ("suite", "protocols", "shots", "shard")
TASK_FLAGS = ("tasks", "data_root", "figure", *BENCHMARK_FLAGS)
LANGUAGE_FLAGS = ("text", "choices")


def main() -> None:
    """Evaluates the models that the flags name."""
    flags = parse_flags()

    # After the flags: these import slowly.
    from wings_jax.evaluation.benchmarks import catalog

    if flags.list:
        print(catalog.text_catalog())
        return
    if flags.compare:
        from wings_jax.evaluation.benchmarks import paired

        paired.print_comparison(flags.compare, flags.out)
        return

    embedded, benchmarks = catalog.split_names(flags.tasks, flags.suite)
    evaluate_models(flags, embedded, benchmarks)


def evaluate_models(flags: argparse.Namespace, embedded: str, benchmarks: Sequence) -> None:
    """Evaluates the models that the flags name.

    Args:
      embedded: names of embedded tasks, separated by commas.
      benchmarks: the other tasks.
    """
    cli.use_compilation_cache()

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

    is_comparison = flags.mode == "forgetting"
    if benchmarks:
        evaluate_benchmarks(flags, lazy_models, benchmarks)
    if embedded:
        # The benchmarks' reports have the same names.
        has_both = bool(benchmarks and flags.out)
        commands.evaluate_tasks(
            lazy_models,
            task_names=embedded,
            data_root=flags.data_root if not benchmarks else None,
            limit=flags.limit,
            rows=flags.batch_size,
            out=flags.out / "embedded" if has_both else flags.out,
            figure=flags.figure,
            compare=is_comparison,
        )


def evaluate_benchmarks(
    flags: argparse.Namespace, lazy_models: Sequence, benchmarks: Sequence
) -> None:
    """Evaluates models on benchmarks. Raises UserError."""
    from wings_jax.evaluation.benchmarks import command, runner

    options = command.BenchmarkOptions(
        flags.data_root,
        flags.out,
        command.parse_protocols(flags.protocols) if flags.protocols else None,
        flags.shots,
        flags.limit,
        flags.batch_size,
        command.parse_shard(flags.shard) if flags.shard else runner.Shard(),
    )
    command.evaluate_benchmarks(
        lazy_models,
        benchmarks,
        options,
        is_suite=flags.suite is not None,
        compare=flags.mode == "forgetting",
    )


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags, with the mode's defaults filled in. Raises UserError."""
    flags = make_parser().parse_args(arguments)
    cli.check_text(flags)
    check_mode(flags)

    if flags.tasks is None and flags.suite is None:
        flags.tasks = DEFAULT_TASKS.get(flags.mode)
    if flags.mode == "forgetting" and flags.base is None:
        flags.base = ""
    if not (flags.checkpoint or flags.compare or flags.list):
        raise UserError("--checkpoint is missing: which model is to be evaluated?")

    least = {"limit": 1, "batch_size": 1, "shots": 0}
    for name, smallest in least.items():
        value = getattr(flags, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')}: {value} is less than {smallest}")
    return flags


def check_mode(flags: argparse.Namespace) -> None:
    """Raises UserError if a flag is of another mode than the one that is run."""
    # A flag without effect would be a silent mistake.
    is_language = flags.mode == LANGUAGE
    problem = f"is not for `{LANGUAGE}`" if is_language else f"is for `{LANGUAGE}` only"
    for name in TASK_FLAGS if is_language else LANGUAGE_FLAGS:
        if getattr(flags, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} {problem}")
    if flags.compare and (flags.checkpoint or flags.tasks or flags.suite):
        raise UserError("--compare: reads finished results, without --checkpoint, --tasks, --suite")
    if flags.shard and not flags.out:
        raise UserError("--shard: needs --out, a directory that all processes write to")


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
    add("--tasks", help=f"benchmarks or {', '.join(TASK_NAMES)}; default: {DEFAULT_TASKS['tasks']}")
    add("--suite", help="wings: all benchmarks of the paper whose files are below --data-root")
    add("--data-root", type=pathlib.Path, help="data sets; default: the checkpoint's scenes")
    add("--protocols", help="of each benchmark, separated by commas; default: all that it has")
    add("--shots", type=int, help="solved examples before a question; default: each benchmark's")
    add("--shard", metavar="I/N", help="compute part I of N, each part in a process of its own")
    add("--list", action="store_true", help="list the benchmarks, with what they read")
    add(
        "--compare",
        nargs="+",
        type=pathlib.Path,
        metavar="DIR",
        help="compare finished results, OUT/NAME of each model, with the first",
    )
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
