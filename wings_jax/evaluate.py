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
    python -m wings_jax.evaluate iit build --data-root DATA --out iit.jsonl
    python -m wings_jax.evaluate iit --manifest iit.jsonl --data-root DATA --checkpoint runs/stage2
    python -m wings_jax.evaluate language --base --checkpoint runs/stage2 --out runs/language \\
        [--text FILE.txt] [--choices FILE.jsonl]

Prints a table with a column per model; with --out, reports and every answer are written there.
--base adds the model before any training (the checkpoint that was imported, or the LLM and the
tower of the first config), or another checkpoint to compare with. --adapter puts each FILE (of
`convert export --format adapter`) on the checkpoint and scores that instead. --mesh shares each
model among devices, --dtype is that of its matmuls.

Tasks are benchmarks (--list prints them; their files are below --data-root, in any of the forms
that they are published in) and the embedded ones, scenes_images, scenes_text, iit, language_text
and language_choices: one report for all. --suite wings is all benchmarks of the paper whose files
are there; it lists the others. --protocols chooses among ppl, ll, ll_chars, ll_bytes, ll_token,
letter and generate, --shots the number of solved examples. A run that was stopped resumes with the
same command. --shard I/N computes part I of N on one of several machines with a common --out; the
same command without it writes the report. --distributed shares each model among the devices of
several machines instead: the same command on each, with the same files. `forgetting` compares each
model with the base, question by question; --compare does so for finished results.

`iit` runs interleaved conversations of text and images: embedded ones or, with --manifest, those
that `iit build` made of the data sets below --data-root. A manifest has identifiers and hashes
only. --history chooses the earlier answers: the true ones (gold), the model's own (model), or the
true ones to random questions (shuffled).

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
from typing import TYPE_CHECKING

from wings_jax import cli, hosts, process
from wings_jax.errors import UserError

if TYPE_CHECKING:
    from wings_jax.evaluation.benchmarks.options import BenchmarkOptions
    from wings_jax.evaluation.benchmarks.record import Benchmark

PROGRAM = cli.program_name("wings_jax.evaluate")
# Of `evaluation.benchmarks.embedded`, which imports slowly.
TASK_NAMES = ("scenes_images", "scenes_text", "iit", "language_text", "language_choices")
DEFAULT_TASKS = {"tasks": "scenes_images,scenes_text", "iit": "iit", "forgetting": "scenes_text"}
LANGUAGE = "language"
BENCHMARK_FLAGS = ("suite", "protocols", "shots", "shard")
TASK_FLAGS = ("tasks", "data_root", "figure", *BENCHMARK_FLAGS)
LANGUAGE_FLAGS = ("text", "choices")
BUILD = "build"
BUILD_FLAGS = ("sources", "seed", "anchors", "embedder")
MANIFEST_FLAGS = ("manifest", "history")


def main() -> None:
    """Evaluates the models that the flags name."""
    flags = parse_flags()

    if flags.action == BUILD:
        build_manifest(flags)
        return

    # After the flags: these import slowly.
    from wings_jax.evaluation.benchmarks import catalog

    if flags.list:
        print(catalog.text_catalog())
        return
    if flags.compare:
        from wings_jax.evaluation.benchmarks import paired

        paired.print_comparison(flags.compare, flags.out)
        return

    from wings_jax import distributed

    benchmarks = catalog.find_benchmarks(flags.tasks, flags.suite)
    cli.use_compilation_cache()
    job = hosts.read_flags(flags)
    process.run_in_caller_thread()  # also one program with collectives after the other
    if job:
        distributed.join_job(job)
        flags.mesh = flags.mesh or distributed.MESH

    with distributed.lost_hosts(), distributed.first_writes() as own_path:
        distributed.check_flags(flags)
        flags.out = flags.out and own_path(flags.out)
        flags.figure = flags.figure and own_path(flags.figure)
        evaluate_models(flags, benchmarks)


def evaluate_models(flags: argparse.Namespace, benchmarks: Sequence[Benchmark]) -> None:
    """Evaluates the models that the flags name."""
    from wings_jax import axes, distributed
    from wings_jax.evaluation import commands, models
    from wings_jax.model import parameters

    mesh = axes.make_mesh(axes.parse_mesh(flags.mesh)) if flags.mesh else None
    with distributed.together():
        lazy_models = models.find_models(
            flags.checkpoint,
            with_base=flags.base is not None,
            base=flags.base or None,
            adapters=flags.adapter,
            loading=models.LoadOptions(flags.dtype or parameters.default_dtype(), mesh),
        )
    distributed.check_same([[model.name, model.step] for model in lazy_models], "checkpoints")
    process.keep_freed_memory()
    if flags.mode == LANGUAGE:
        commands.evaluate_language(lazy_models, benchmark_options(flags))
        return

    if flags.manifest:
        from wings_jax.evaluation.interleaved import command as interleaved_command

        options = benchmark_options(flags)
        interleaved_command.evaluate_manifest(
            lazy_models, flags.manifest, options, history=flags.history or "gold"
        )
        return

    from wings_jax.evaluation.benchmarks import command

    command.evaluate_benchmarks(
        lazy_models,
        benchmarks,
        benchmark_options(flags),
        is_suite=flags.suite is not None,
        compare=flags.mode == "forgetting",
    )


def benchmark_options(flags: argparse.Namespace) -> BenchmarkOptions:
    """Returns the benchmarks' options of the flags. Raises UserError."""
    from wings_jax.evaluation.benchmarks import options
    from wings_jax.inference import shards

    return options.BenchmarkOptions(
        flags.data_root,
        flags.out,
        options.parse_protocols(flags.protocols) if flags.protocols else None,
        flags.shots,
        flags.limit,
        flags.batch_size,
        shards.parse_shard(flags.shard) if flags.shard else shards.WHOLE,
        flags.figure,
        flags.text,
        flags.choices,
    )


def build_manifest(flags: argparse.Namespace) -> None:
    """Writes a manifest of interleaved conversations. Raises UserError."""
    from wings_jax.evaluation.interleaved import command

    command.build_manifest(
        flags.out,
        flags.data_root,
        sources=split_list(flags.sources) if flags.sources else None,
        seed=flags.seed or 0,
        anchors=parse_anchors(flags.anchors) if flags.anchors else None,
        embedder=flags.embedder or "auto",
    )


def split_list(text: str) -> list[str]:
    """Returns the names of a comma-separated list.

    >>> split_list("mmlu, piqa")
    ['mmlu', 'piqa']
    """
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_anchors(text: str) -> dict[str, int]:
    """Returns language -> number of scored questions of "EN" or "EN,ZH". Raises UserError.

    >>> parse_anchors("500,100")
    {'en': 500, 'zh': 100}
    """
    parts = split_list(text)
    if not 1 <= len(parts) <= 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--anchors: {text!r} is not a number, or two separated by a comma")
    return dict(zip(("en", "zh"), map(int, parts), strict=False))


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags, with the mode's defaults filled in. Raises UserError."""
    flags = make_parser().parse_args(arguments)
    cli.check_text(flags)
    check_mode(flags)

    # A suite or a manifest names its questions itself.
    if flags.tasks is None and flags.suite is None and not flags.manifest:
        flags.tasks = DEFAULT_TASKS.get(flags.mode)
    # By default, forgetting is measured against the model before any training.
    if flags.mode == "forgetting" and flags.base is None:
        flags.base = ""
    if not (flags.checkpoint or flags.compare or flags.list or flags.action):
        raise UserError("--checkpoint is missing: which model is to be evaluated?")

    # No shots is a setting; no questions or an empty batch is a mistake.
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
    # The tasks of `language` may be named among others.
    forbidden: tuple[str, ...] = TASK_FLAGS if is_language else LANGUAGE_FLAGS
    if not is_language and f"{LANGUAGE}_" in (flags.tasks or ""):
        forbidden = ()
    for name in forbidden:
        if getattr(flags, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} {problem}")
    check_iit_flags(flags)
    if flags.compare and (flags.checkpoint or flags.tasks or flags.suite):
        raise UserError("--compare: reads finished results, without --checkpoint, --tasks, --suite")
    if flags.shard and not flags.out:
        raise UserError("--shard: needs --out, a directory that all processes write to")
    if not hosts.read_flags(flags):
        return
    if flags.shard:
        raise UserError("--shard: each part is computed by itself, without --distributed")
    if flags.compare or flags.list or flags.action:
        raise UserError("--distributed: not with --compare, --list, `iit build`: they run no model")


def check_iit_flags(flags: argparse.Namespace) -> None:
    """Raises UserError if a flag of `iit` has no effect, or one is missing."""
    is_build = flags.action == BUILD
    if is_build and flags.mode != "iit":
        raise UserError(f"{BUILD}: is for `iit` only: evaluate iit {BUILD}")
    for name in BUILD_FLAGS:
        if getattr(flags, name) is not None and not is_build:
            raise UserError(f"--{name}: is for `iit {BUILD}` only")
    for name in MANIFEST_FLAGS:
        if getattr(flags, name) is not None and (flags.mode != "iit" or is_build):
            raise UserError(f"--{name}: is for `iit` with a manifest only")

    if flags.history and not flags.manifest:
        raise UserError("--history: needs --manifest")
    if flags.manifest and flags.tasks:
        raise UserError("--tasks: not with --manifest, which lists the questions")
    # A manifest is built from files alone, without a model.
    if is_build:
        unused = [name for name in ("checkpoint", "tasks") if getattr(flags, name)]
        if unused:
            raise UserError(f"--{unused[0]}: is not for `iit {BUILD}`, which runs no model")
        for name in ("data_root", "out"):
            if getattr(flags, name) is None:
                raise UserError(f"--{name.replace('_', '-')} is missing: `iit {BUILD}` needs it")


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Counts right answers, or measures likelihood."
    )
    add = parser.add_argument
    add("mode", nargs="?", choices=(*DEFAULT_TASKS, LANGUAGE), default="tasks")
    add("action", nargs="?", choices=(BUILD,), help="`iit build`: make a manifest")

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

    # Interleaved conversations.
    add("--manifest", type=pathlib.Path, metavar="FILE.jsonl", help="`iit`: what is asked")
    add("--history", help="`iit --manifest`: earlier answers: gold, model or shuffled")
    add("--sources", help="`iit build`: benchmarks; default: those of the paper that are there")
    add("--seed", type=int, help="`iit build`: default: 0")
    add("--anchors", metavar="EN[,ZH]", help="`iit build`: scored questions; default: 500,100")
    add("--embedder", help="`iit build`: wordllama, tfidf or auto")

    # Outputs.
    add("--out", type=pathlib.Path, help="directory for the report and the answers")
    figure_help = "some questions with images and the last model's answers"
    add("--figure", type=pathlib.Path, metavar="FILE.png", help=figure_help)
    add("--picture", type=pathlib.Path, dest="figure", help=argparse.SUPPRESS)  # the old name
    add("--debug", action="store_true", help="show the traceback of an error")
    hosts.add_flags(parser)
    return parser


if __name__ == "__main__":
    cli.run_main(PROGRAM, main)
