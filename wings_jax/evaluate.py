"""Asks a model what a task asks, and counts the right answers.

    python -m wings_jax.evaluate --checkpoint runs/stage2
    python -m wings_jax.evaluate --base --checkpoint stage1=runs/stage1 stage2=runs/stage2 \\
        --tasks scenes_images,scenes_text --out runs/evaluation --picture runs/answers.png
    python -m wings_jax.evaluate iit --checkpoint runs/stage2
    python -m wings_jax.evaluate forgetting --base runs/stage1 --checkpoint runs/stage2
    python -m wings_jax.evaluate language --base --checkpoint runs/stage2 --out runs/language \\
        [--text FILE.txt] [--choices FILE.jsonl]

Prints a table, a column per model; with --out, report.md, report.json and every answer are
written there. --base adds the LLM and the tower as they were before the first stage, or another
checkpoint to compare with. `iit` asks in interleaved conversations of text and pictures;
`forgetting` shows what changed from the base, question by question, and writes forgetting.md and
forgetting.json besides.

`language` measures any LLM by likelihood: the perplexity of plain English, and multiple choice
without examples, where the likeliest choice counts as the answer (in a row of its own the likeliest
per token). By default it reads the descriptions of data
sets in the installed tensorflow_datasets and asks the questions of `evaluation.everyday`; --text is
a UTF-8 file, and a line of --choices {"question": str, "choices": [str, ...], "answer": index,
"id": str, "kind": str}, the last two as one likes: ARC, MMLU and others take this form. It writes
language.md, language.json, and choices-NAME.jsonl with every decision.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Mapping, Sequence

import tqdm

from wings_jax import cli, files
from wings_jax.errors import UserError
from wings_jax.evaluation import (
    comparison,
    everyday,
    language,
    language_report,
    models,
    picture,
    prose,
    report,
    scoring,
    tasks,
)
from wings_jax.evaluation.tasks import Question
from wings_jax.inference.generator import Generator
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams
from wings_jax.scenes import dataset

LONGEST = 16  # tokens of an answer
ASKED = {"tasks": "scenes_images,scenes_text", "iit": "iit", "forgetting": "scenes_text"}
LANGUAGE = "language"
OF_TASKS, OF_LANGUAGE = ("tasks", "data_root", "picture"), ("text", "choices")  # flags


def parse() -> argparse.Namespace:
    """Returns the flags."""
    parser = argparse.ArgumentParser(
        prog="wings_jax.evaluate", description="Counts right answers, or measures likelihood."
    )
    parser.add_argument("what", nargs="?", choices=(*ASKED, LANGUAGE), default="tasks")
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        action="extend",
        required=True,
        metavar="[NAME=]DIR",
        help="workdir or checkpoint; several give one table side by side",
    )
    parser.add_argument(
        "--base",
        nargs="?",
        const="",
        metavar="[NAME=]DIR",
        help="in front of them; without a DIR, the models before any stage",
    )
    parser.add_argument("--tasks", help=f"of {', '.join(tasks.TASKS)}; default: {ASKED['tasks']}")
    parser.add_argument("--data-root", type=pathlib.Path, help="default: the checkpoint's scenes")
    parser.add_argument("--out", type=pathlib.Path, help="folder for report and answers")
    parser.add_argument("--picture", type=pathlib.Path, metavar="FILE.png")
    parser.add_argument(
        "--text", type=pathlib.Path, metavar="FILE.txt", help="`language`: what is read"
    )
    parser.add_argument(
        "--choices", type=pathlib.Path, metavar="FILE.jsonl", help="`language`: what is asked"
    )
    parser.add_argument("--limit", type=int, help="so many questions of each task, or passages")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="show a mistake's traceback")
    flags = parser.parse_args()
    is_language = flags.what == LANGUAGE
    for name in OF_TASKS if is_language else OF_LANGUAGE:
        if getattr(flags, name) is not None:
            mistake = f"is not for `{LANGUAGE}`" if is_language else f"is for `{LANGUAGE}` only"
            raise UserError(f"--{name.replace('_', '-')} {mistake}")
    flags.tasks = ASKED.get(flags.what) if flags.tasks is None else flags.tasks
    if flags.what == "forgetting" and flags.base is None:
        flags.base = ""
    for name in ("limit", "batch_size"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: {value} is less than 1")
    return flags


def find_questions(flags: argparse.Namespace, scenes_at: str) -> dict[str, list[Question]]:
    """Returns the questions of every task; the embedded data set is written if it is missing."""
    chosen = tasks.find_tasks(flags.tasks)
    root = flags.data_root
    if root is None and any(task.file for task in chosen.values()):
        if not scenes_at:
            raise UserError("--data-root is missing: the checkpoint names no scenes")
        root = dataset.write_scenes(scenes_at)
    return {name: tasks.read_questions(task, root, flags.limit) for name, task in chosen.items()}


def with_pictures(questions: Mapping[str, Sequence[Question]]) -> str | None:
    """Returns the first task that has questions about pictures."""
    return next((task for task in questions if any(q.images for q in questions[task])), None)


def check_outputs(flags: argparse.Namespace, questions: Mapping[str, Sequence[Question]]) -> None:
    """Raises UserError, before anything is asked, if the results could not be written."""
    for flag, path in (("--out", flags.out), ("--picture", flags.picture)):
        if path is None:
            continue
        if flag == "--picture" and (path.suffix.lower() != ".png" or path.is_dir()):
            raise UserError(f"--picture: {path} does not end in .png")
        files.check_writable(path if flag == "--out" else path.parent, flag)
    if flags.picture and with_pictures(questions) is None:
        raise UserError(f"--picture: no question of {flags.tasks} has a picture")


def ask(
    named: models.LazyModel, questions: Mapping[str, Sequence[Question]], rows: int
) -> report.TaskResult:
    """Returns one model's answers and scores."""
    generator = Generator.from_checkpoint(
        named.open(), rows=rows, sampling=SamplingParams(max_new_tokens=LONGEST)
    )
    answers, scores, seconds = {}, {}, {}
    for task, asked in questions.items():
        started = time.perf_counter()
        requests = [Request(question.turns, question.images) for question in asked]
        said = [""] * len(asked)
        title = f"{named.name}: {task}"
        for index, answer in tqdm.tqdm(
            generator.answers(requests), total=len(asked), desc=title, disable=None
        ):
            if isinstance(answer, UserError):
                raise UserError(f"{task}: {asked[index].id}: {answer}") from answer
            said[index] = answer.text
        answers[task] = said
        scores[task] = scoring.score_answers(tasks.TASKS[task], asked, said)
        seconds[task] = time.perf_counter() - started
    return report.TaskResult(named.name, named.origin, named.step, answers, scores, seconds)


def tell(
    flags: argparse.Namespace,
    results: Sequence[report.TaskResult],
    questions: Mapping[str, Sequence[Question]],
) -> list[pathlib.Path]:
    """Prints the results, writes them if asked to, and returns the paths."""
    made = report.save(flags.out, results, questions) if flags.out else []
    if flags.what != "forgetting":
        print(report.as_text(results))
        return made
    before, *others = results
    changes = [(after, comparison.compare(questions, before, after)) for after in others]
    print("\n\n".join(comparison.as_text(before, *found) for found in changes))
    return made + (comparison.save(flags.out, before, changes) if flags.out else [])


def measure_language(flags: argparse.Namespace, found: Sequence[models.LazyModel]) -> None:
    """Prints what the models know of language, and writes it if asked to."""
    text = (prose.read_text(flags.text) if flags.text else prose.installed()).some(flags.limit)
    items = everyday.read_items(flags.choices) if flags.choices else everyday.items()
    items = [items[index] for index in tasks.spread(len(items), flags.limit)]
    if flags.out:
        files.check_writable(flags.out, "--out")
    results = [language.ask(named, text, items, flags.batch_size) for named in found]
    print(language_report.as_text(text, results))
    if flags.out:
        made = language_report.save(flags.out, text, results)
        print("\nwritten: " + ", ".join(map(str, made)))


def main() -> None:
    """Evaluates what the flags say."""
    flags = parse()
    cli.use_compilation_cache()
    found = models.find_models(
        flags.checkpoint, with_base=flags.base is not None, base=flags.base or None
    )
    if flags.what == LANGUAGE:
        measure_language(flags, found)
        return
    questions = find_questions(flags, found[-1].scenes)
    check_outputs(flags, questions)
    results = [ask(named, questions, flags.batch_size) for named in found]
    made = tell(flags, results, questions)
    if made:
        print("\nwritten: " + ", ".join(str(path) for path in made))
    if flags.picture:
        last, task = results[-1], with_pictures(questions)
        title = f"{last.name}: "
        picture.draw(flags.picture, questions[task], last.answers[task], title=title)
        print(f"picture: {flags.picture}")


if __name__ == "__main__":
    cli.run_main("wings_jax.evaluate", main)
