"""Runs one model on benchmarks: what is finished is read, what was stopped goes on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wings_jax import distributed, errors
from wings_jax.errors import UserError
from wings_jax.evaluation import models
from wings_jax.evaluation.benchmarks import journals, results, runner, suitability
from wings_jax.evaluation.benchmarks.options import BenchmarkOptions
from wings_jax.evaluation.benchmarks.results import BenchmarkResult
from wings_jax.evaluation.benchmarks.runner import BenchmarkTask
from wings_jax.inference.generator import Generator


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """A task that can be asked, and what is known of its result."""

    # The task.
    task: BenchmarkTask
    # What its result depends on.
    provenance: Mapping[str, Any]
    # Lines of a finished result, None if there is none.
    finished: Sequence[Mapping[str, Any]] | None


def run_model(
    model: models.LazyModel,
    asked: Sequence[BenchmarkTask],
    options: BenchmarkOptions,
    missing: list[str] | None,
) -> Iterator[BenchmarkResult]:
    """Yields the results of one model; nothing is yielded for a shard.

    Args:
      missing: gets a line per task that does not fit the model; None to raise instead.

    Raises:
      UserError: the model cannot be loaded, or a task does not fit it.
    """
    generator, model_hash = open_generator(model, options.rows)

    # What cannot be asked is found before the first answer is computed.
    ready = []
    for task in asked:
        prepared = prepare_task(model, generator, model_hash, task, options)
        try:
            if prepared.finished is None:
                suitability.check_task(model.name, task, generator)
            ready.append(prepared)
        except UserError as error:
            if missing is None:
                raise
            missing.append(str(error))

    for prepared in ready:
        result = run_prepared(model, generator, prepared, options)
        if result is not None:
            yield result


def open_generator(model: models.LazyModel, rows: int) -> tuple[Generator, str]:
    """Returns a model that answers `rows` prompts at once, and the hash of its parameters.

    Raises:
      UserError: the model cannot be loaded.
    """
    with errors.full_memory(models.MEMORY_ADVICE):
        opened = model.open()
        model_hash = results.hash_model(opened)
        generator = Generator.from_checkpoint(
            opened, rows=rows, dtype=model.loading.dtype, mesh=model.loading.mesh, release=True
        )
    return generator, model_hash


def run_task(
    model: models.LazyModel,
    generator: Generator,
    model_hash: str,
    task: BenchmarkTask,
    options: BenchmarkOptions,
) -> BenchmarkResult | None:
    """Returns the result of one task; None for a shard, whose entries stay in its journal."""
    prepared = prepare_task(model, generator, model_hash, task, options)
    return run_prepared(model, generator, prepared, options)


def prepare_task(
    model: models.LazyModel,
    generator: Generator,
    model_hash: str,
    task: BenchmarkTask,
    options: BenchmarkOptions,
) -> PreparedTask:
    """Returns a task with the result of an earlier run that depends on the same.

    Raises:
      UserError: there is a result that depends on something else.
    """
    spec = generator.spec
    provenance = results.make_provenance(
        task, model_hash=model_hash, rows=options.rows, dtype=spec.dtype, kernel=spec.kernel
    )
    distributed.check_same(provenance, f"data or settings of {task.benchmark.name}")
    if options.out is None:
        return PreparedTask(task, provenance, None)

    with distributed.together():
        finished = results.read_finished(options.out, model.name, task.benchmark, provenance)
    finished = distributed.share(finished)

    # Images that could not be read may have been repaired since.
    if finished is not None and suitability.find_repaired(task, generator, _failed(finished)):
        return PreparedTask(task, provenance, None)
    return PreparedTask(task, provenance, finished)


def _failed(lines: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the positions of the items that could not be asked."""
    return [index for index, line in enumerate(lines) if results.error_causes(line)]


def run_prepared(
    model: models.LazyModel,
    generator: Generator,
    prepared: PreparedTask,
    options: BenchmarkOptions,
) -> BenchmarkResult | None:
    """Returns the result of a task; None for a shard, whose entries stay in its journal."""
    task, provenance, finished = prepared.task, prepared.provenance, prepared.finished
    name, out, title = model.name, options.out, f"{model.name}: {prepared.task.benchmark.name}"

    # A result of the same model, data and settings is not computed again.
    if finished is not None:
        return results.make_result(model, task, provenance, finished, 0.0)

    # Without --out there is nothing to resume.
    started = time.perf_counter()
    if out is None:
        store = journals.MemoryStore()
        runner.run_task(generator, task, store, title)
        lines = runner.collect_lines(task, store.answers)
        return results.make_result(model, task, provenance, lines, time.perf_counter() - started)

    with journals.open_journal(out, name, task, provenance, options.shard) as journal:
        repaired = suitability.find_repaired(task, generator, journals.failed_items(task, journal))
        journals.drop_entries(task, journal, repaired)
        runner.run_task(generator, task, journal, title, options.shard)
        if options.shard.count > 1:
            return None
        lines = runner.collect_lines(task, journal.answers)

        # The journal is removed last: a run that is killed before is finished by the next one.
        result = results.make_result(model, task, provenance, lines, time.perf_counter() - started)
        with distributed.together():
            results.write_result(out, result)
            for part in journals.part_journals(out, name, task, provenance):
                part.remove()
            journal.remove()
    return result
