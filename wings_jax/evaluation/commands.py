"""`python -m wings_jax.evaluate language`, after its flags are parsed and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from wings_jax import distributed, files
from wings_jax.evaluation import language, language_report, models, tasks
from wings_jax.evaluation.benchmarks import embedded, model_runs
from wings_jax.evaluation.benchmarks.options import BenchmarkOptions


def evaluate_language(lazy_models: Sequence[models.LazyModel], options: BenchmarkOptions) -> None:
    """Prints and writes perplexity and multiple choice of every model.

    Raises:
      UserError: a file is wrong, does not fit a model, or a result could not be written.
    """
    # The user's files, or those of the package.
    with distributed.together():
        text = embedded.read_language_text(options.text)
        questions = embedded.read_choices(options.choices)
        if options.out:
            files.check_writable(options.out, "--out")
    chosen = tasks.spread_indices(len(questions), options.limit)
    text, questions = text.subset(options.limit), [questions[index] for index in chosen]

    # Models are loaded one after the other, as several may not fit in memory.
    asked = language.make_tasks(text, questions, options.text, options.choices)
    options = dataclasses.replace(options, limit=None)
    results = []
    for model in lazy_models:
        found = list(model_runs.run_model(model, asked, options, None))
        results.append(language.make_result(questions, found))

    print(language_report.text_report(text, results))
    if options.out:
        paths = language_report.write_report(options.out, text, results)
        print("\nwritten: " + ", ".join(map(str, paths)))
