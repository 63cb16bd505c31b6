"""The modes of `python -m wings_jax.evaluate`, after its flags are parsed and checked."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping, Sequence

import tqdm

from wings_jax import errors, files
from wings_jax.errors import UserError
from wings_jax.evaluation import (
    answer_figure,
    choice_file,
    comparison,
    everyday,
    language,
    language_report,
    models,
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

MAX_NEW_TOKENS = 16  # of an answer

Questions = Mapping[str, Sequence[Question]]  # task -> its questions


def evaluate_tasks(
    lazy_models: Sequence[models.LazyModel],
    *,
    task_names: str,
    data_root: pathlib.Path | None,
    limit: int | None,
    rows: int,
    out: pathlib.Path | None,
    figure: pathlib.Path | None,
    compare: bool,
) -> None:
    """Prints and writes the scores of every model; with `compare` their changes from the first.

    Raises:
      UserError: a task or its data are missing, or a result could not be written.
    """
    # Everything that can be wrong is checked before the first model is loaded.
    questions = read_all_questions(task_names, data_root, limit, lazy_models[-1].scenes)
    check_outputs(out, figure, questions)

    # Models are loaded one after the other, as several may not fit in memory.
    results = [answer_questions(model, questions, rows) for model in lazy_models]
    paths = report.write_report(out, results, questions) if out else []
    if compare:
        paths += print_comparison(results, questions, out)
    else:
        print(report.text_report(results))
    print_paths(paths)

    task_name = first_task_with_images(questions)
    if figure and task_name:  # `check_outputs` refuses a figure without images
        # Of the last model, which is the newest one on the usual command line.
        last_result = results[-1]
        answer_figure.draw_answers(
            figure,
            questions[task_name],
            last_result.answers[task_name],
            title=f"{last_result.name}: ",
        )
        print(f"figure: {figure}")


def evaluate_language(
    lazy_models: Sequence[models.LazyModel],
    *,
    text_file: pathlib.Path | None,
    choices: pathlib.Path | None,
    limit: int | None,
    rows: int,
    out: pathlib.Path | None,
) -> None:
    """Prints and writes perplexity and multiple choice of every model.

    Raises:
      UserError: a file is wrong, does not fit a model, or a result could not be written.
    """
    # The user's files, or those of the package.
    text = prose.read_text(text_file) if text_file else prose.installed_text()
    questions = choice_file.read_choice_file(choices) if choices else everyday.embedded_questions()
    chosen = tasks.spread_indices(len(questions), limit)
    text, questions = text.subset(limit), [questions[index] for index in chosen]
    if out:
        files.check_writable(out, "--out")

    # Models are loaded one after the other, as several may not fit in memory.
    results = [language.measure_language(model, text, questions, rows) for model in lazy_models]
    print(language_report.text_report(text, results))
    if out:
        print_paths(language_report.write_report(out, text, results))


def read_all_questions(
    task_names: str, data_root: pathlib.Path | None, limit: int | None, scenes: str
) -> Questions:
    """Returns the questions of every task.

    Without `data_root` the data set is that in `scenes`, which is written if it is missing.
    """
    chosen = tasks.find_tasks(task_names)
    if data_root is None and any(task_name.file for task_name in chosen.values()):
        if not scenes:
            raise UserError(
                "--data-root is missing, and the checkpoint's config names no scenes: write them "
                "with python -m wings_jax.scenes DIR"
            )
        data_root = dataset.write_scenes(scenes)

    return {
        name: tasks.read_questions(task_name, data_root, limit)
        for name, task_name in chosen.items()
    }


def first_task_with_images(questions: Questions) -> str | None:
    """Returns the first task that has questions about images, None if there is none."""
    for task_name, task_questions in questions.items():
        if any(question.images for question in task_questions):
            return task_name
    return None


def check_outputs(
    out: pathlib.Path | None, figure: pathlib.Path | None, questions: Questions
) -> None:
    """Raises UserError, before any model is loaded, if the results could not be written."""
    if out:
        files.check_writable(out, "--out")
    if not figure:
        return

    # matplotlib chooses the format by the suffix; only PNG is documented.
    if figure.suffix.lower() != ".png" or figure.is_dir():
        raise UserError(f"--figure: {figure} does not end in .png")
    files.check_writable(figure.parent, "--figure")
    if first_task_with_images(questions) is None:
        raise UserError(f"--figure: no question of {', '.join(questions)} has an image")


def answer_questions(model: models.LazyModel, questions: Questions, rows: int) -> report.TaskResult:
    """Returns one model's answers and scores; `rows` questions are answered at a time.

    Raises:
      UserError: the model cannot be loaded, or a question does not fit it.
    """
    sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    generator = models.open_generator(model, rows=rows, sampling=sampling)
    answers, scores, seconds = {}, {}, {}

    for task_name, task_questions in questions.items():
        started = time.perf_counter()
        answers[task_name] = _generate(generator, task_questions, f"{model.name}: {task_name}")
        scores[task_name] = scoring.score_answers(
            tasks.TASKS[task_name], task_questions, answers[task_name]
        )
        seconds[task_name] = time.perf_counter() - started

    return report.TaskResult(model.name, model.origin, model.step, answers, scores, seconds)


def _generate(generator: Generator, questions: Sequence[Question], title: str) -> list[str]:
    """Returns an answer per question."""
    requests = [Request(question.turns, question.images) for question in questions]
    answers = [""] * len(questions)

    # They arrive in the order in which they are done.
    generated = generator.answers(requests)
    with errors.full_memory(models.MEMORY_ADVICE):
        for index, answer in tqdm.tqdm(generated, total=len(questions), desc=title, disable=None):
            if isinstance(answer, UserError):
                raise UserError(f"{title}: {questions[index].id}: {answer}") from answer
            answers[index] = answer.text
    return answers


def print_comparison(
    results: Sequence[report.TaskResult], questions: Questions, out: pathlib.Path | None
) -> list[pathlib.Path]:
    """Prints the changes from the first model to each other; returns the paths written."""
    before, *others = results
    compared = [(after, comparison.compare_answers(questions, before, after)) for after in others]
    print("\n\n".join(comparison.text_comparison(before, *pair) for pair in compared))
    return comparison.write_comparison(out, before, compared) if out else []


def print_paths(paths: Sequence[pathlib.Path]) -> None:
    """Prints the paths of the files that were written, if there are any."""
    if paths:
        print("\nwritten: " + ", ".join(map(str, paths)))
