"""Evaluation during training: accuracy on tasks every few steps, among the metrics of the run."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from wings_jax import distributed, tree
from wings_jax.config import Config
from wings_jax.data import chat_template
from wings_jax.errors import UserError
from wings_jax.evaluation import models
from wings_jax.evaluation.benchmarks import (
    catalog,
    command,
    journals,
    results,
    runner,
    suitability,
    summary,
)
from wings_jax.evaluation.benchmarks.options import BenchmarkOptions
from wings_jax.evaluation.benchmarks.record import Benchmark
from wings_jax.evaluation.benchmarks.runner import BenchmarkTask
from wings_jax.inference.generator import Generator
from wings_jax.model.presets import WingsArch

FLAG = "config.eval"
BASE_FLAG = "config.eval.base"

Scalars = dict[str, float]
FetchScalars = Callable[[], Scalars]


def make_metric(
    config: Config, arch: WingsArch, tokenizer: Any, mesh: Mesh
) -> Callable[[Mapping[str, jax.Array]], FetchScalars]:
    """Returns measure(flat params), which answers all questions and returns their scalars.

    eval/TASK/accuracy  share of right answers, or the benchmark's headline score, 0 to 1
    eval/TASK/change    that minus the same of `config.eval.base`; negative where it was forgotten
    eval/seconds        what the measurement took

    The parameters are only read: training continues as if nothing had been measured. The base is
    evaluated here, once per start.

    Raises:
      UserError: a task or its data are missing, the base is not a checkpoint, or `check_config`
        raises it.
    """
    check_config(config)
    with distributed.together():
        asked = read_tasks(config)
    template = chat_template.template_from_settings(config.data, tokenizer)
    shared_mesh = mesh if mesh.size > 1 else None

    base: Scalars = {}
    if config.eval.base:
        loading = models.LoadOptions(config.compute_dtype or None, shared_mesh)
        with distributed.together():
            model = models.parse_model(config.eval.base, flag=BASE_FLAG, loading=loading)
        distributed.check_same([model.name, model.step], f"checkpoints ({BASE_FLAG})")
        generator = models.open_generator(model, rows=config.eval.batch_size)
        base = measure_accuracies(generator, asked, "base")

    def measure(flat: Mapping[str, jax.Array]) -> FetchScalars:
        started = time.perf_counter()
        generator = Generator(
            arch,
            tree.nest(flat),
            tokenizer,
            template,
            dtype=config.compute_dtype or None,
            rows=config.eval.batch_size,
            mesh=shared_mesh,
        )
        accuracies = measure_accuracies(generator, asked, "evaluation")

        scalars = {f"eval/{name}/accuracy": value for name, value in accuracies.items()}
        for name in base:
            scalars[f"eval/{name}/change"] = accuracies[name] - base[name]
        scalars["eval/seconds"] = time.perf_counter() - started
        return lambda: scalars

    return measure


def check_config(config: Config) -> None:
    """Checks what can be checked before the minutes of setting up.

    Raises:
      UserError: a name is not that of a task.
    """
    with _keys_for_flags():
        find_benchmarks(config)


def find_benchmarks(config: Config) -> list[Benchmark]:
    """Returns the benchmarks of `config.eval`. Raises UserError in the words of `evaluate`."""
    benchmarks = catalog.find_benchmarks(config.eval.tasks, None)
    published = [benchmark.name for benchmark in benchmarks if not benchmark.is_embedded]
    if published and not config.eval.data_root:
        raise UserError(f"--data-root is missing: the files of {published[0]}")
    if any(benchmark.kind == "text" for benchmark in benchmarks):
        raise UserError("--tasks: a perplexity is no accuracy: see the loss of training")
    return benchmarks


def read_tasks(config: Config) -> list[BenchmarkTask]:
    """Returns the tasks of `config.eval`.

    Raises:
      UserError: a name is not that of a task, or its data are missing; it names the config's key.
    """
    settings = config.eval
    root = pathlib.Path(settings.data_root) if settings.data_root else None
    limit = settings.limit or None

    asked: list[BenchmarkTask] = []
    with _keys_for_flags():
        for benchmark in find_benchmarks(config):
            # Of several protocols, only that of the headline score.
            protocol = benchmark.headline
            if protocol not in benchmark.protocols:
                protocol = benchmark.protocols[0]
            options = BenchmarkOptions(
                root, protocols=(protocol,), limit=limit, rows=settings.batch_size
            )
            asked += command.read_tasks([benchmark], options, config.data.scenes, None)
    return asked


@contextlib.contextmanager
def _keys_for_flags() -> Iterator[None]:
    """Gives the flags of `python -m wings_jax.evaluate` in errors the names that they have here."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for flag, key in (("--data-root", "data_root"), ("--tasks", "tasks")):
            message = message.replace(flag, f"{FLAG}.{key}")
        raise UserError(message) from error


def measure_accuracies(generator: Generator, asked: Sequence[BenchmarkTask], name: str) -> Scalars:
    """Returns task -> accuracy, 0 to 1.

    Raises:
      UserError: questions do not fit the model; the message begins with `name`.
    """
    accuracies = {}
    for task in asked:
        suitability.check_vision(name, task, generator)
        store = journals.MemoryStore()
        runner.run_task(generator, task, store, name)

        lines = runner.collect_lines(task, store.answers)
        scores = summary.score_protocols(task.benchmark, task.data.items, lines)
        protocol = results.headline_protocol(task.benchmark, scores)
        accuracies[task.benchmark.name] = scores[protocol].headline(task.benchmark).value
    return accuracies
