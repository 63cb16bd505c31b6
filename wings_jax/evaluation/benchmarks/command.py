"""Evaluates models on benchmarks: from names of tasks to reports, resuming what was stopped."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from wings_jax import distributed, files
from wings_jax.errors import UserError
from wings_jax.evaluation import models, tasks
from wings_jax.evaluation.benchmarks import (
    answer_figure,
    embedded,
    journals,
    legacy,
    model_runs,
    paired,
    readers,
    tables,
)
from wings_jax.evaluation.benchmarks.options import BenchmarkOptions
from wings_jax.evaluation.benchmarks.record import Benchmark, DataSet
from wings_jax.evaluation.benchmarks.results import BenchmarkResult
from wings_jax.evaluation.benchmarks.runner import BenchmarkTask


class UnsuitableFlagsError(UserError):
    """A task cannot be asked as the flags say; one of a suite is left out and listed."""


def evaluate_benchmarks(
    lazy_models: Sequence[models.LazyModel],
    benchmarks: Sequence[Benchmark],
    options: BenchmarkOptions,
    *,
    is_suite: bool = False,
    compare: bool = False,
) -> None:
    """Prints and writes the scores of every model; with `compare` their changes from the first.

    Of a suite, benchmarks whose files are missing or that a model cannot be asked are listed.

    Raises:
      UserError: a data set is missing, does not fit a model, or a result cannot be written.
    """
    # Everything that can be wrong is checked before the first model is loaded.
    published = [benchmark.name for benchmark in benchmarks if not benchmark.is_embedded]
    if options.data_root is None and published:
        names = ", ".join(published[:3])
        raise UserError(f"--data-root is missing: the directory with the files of {names}")
    missing: list[str] = []
    with distributed.together():
        if options.out:
            files.check_writable(options.out, journals.FLAG)
        scenes = lazy_models[-1].scenes
        asked = read_tasks(benchmarks, options, scenes, missing if is_suite else None)
        if not asked:
            root = options.data_root
            raise UserError(f"--data-root: {root} has none of the data sets: {missing[0]}")

        figure_task = answer_figure.find_task(options.figure, asked) if options.figure else None

    # Models are loaded one after the other, as several may not fit in memory.
    found: dict[str, list[BenchmarkResult]] = {task.benchmark.name: [] for task in asked}
    for model in lazy_models:
        for result in model_runs.run_model(model, asked, options, missing if is_suite else None):
            found[result.benchmark.name].append(result)

    # The scores of a part alone would be misleading.
    if options.shard.count > 1:
        print(
            f"part {options.shard.index} of {options.shard.count} is done; when all are, the same "
            "command without --shard writes the report"
        )
        return

    # Only benchmarks that every model was asked have a row.
    complete = {
        name: of_models for name, of_models in found.items() if len(of_models) == len(lazy_models)
    }
    print_report(complete, missing, options, figure_task, compare=compare)


def print_report(
    found: tables.Results,
    missing: Sequence[str],
    options: BenchmarkOptions,
    figure_task: BenchmarkTask | None,
    *,
    compare: bool,
) -> None:
    """Prints and writes the scores of all models, with `compare` their changes.

    Args:
      figure_task: task of the figure, None for no figure.
    """
    print(tables.text_report(found, missing))
    paths = tables.write_report(options.out, found, missing) if options.out else []
    if compare:
        paths += print_changes(found, options.out)

    if figure_task and options.figure and figure_task.benchmark.name in found:
        # Of the last model, which is the newest one on the usual command line.
        answer_figure.draw_result(
            options.figure, figure_task, found[figure_task.benchmark.name][-1]
        )
        paths.append(options.figure)
    if paths:
        print("\nwritten: " + ", ".join(map(str, paths)))


def print_changes(found: tables.Results, out: pathlib.Path | None) -> list[pathlib.Path]:
    """Prints the changes from the first model to each other; returns the paths written."""
    compared: dict[str, list[paired.Change]] = {}
    for task, (before, *others) in found.items():
        for after in others:
            changes = paired.compare_task(task, before.lines, after.lines, before.benchmark.rows)
            compared.setdefault(f"{before.model} -> {after.model}", []).extend(changes)

    print("\n" + paired.text_changes(compared))
    if not out:
        return []
    return paired.write_changes(
        out, compared, stem="forgetting", more=legacy.changes_to_dict(found)
    )


def read_tasks(
    benchmarks: Sequence[Benchmark],
    options: BenchmarkOptions,
    scenes: str,
    missing: list[str] | None,
) -> list[BenchmarkTask]:
    """Returns the tasks whose files are there, and that the flags suit.

    Args:
      scenes: the embedded data set of the checkpoint's config, "" for none.
      missing: gets a line per task that is left out; None to raise instead.

    Raises:
      UserError: a data set is missing or malformed.
    """
    asked = []
    is_alone = all(benchmark.is_embedded for benchmark in benchmarks)
    sources = embedded.EmbeddedSources(
        options.data_root, scenes, options.text, options.choices, is_alone
    )
    for benchmark in benchmarks:
        try:
            asked.append(_read_task(benchmark, options, sources))
        except (readers.MissingDataError, UnsuitableFlagsError) as error:
            if missing is None:
                raise
            missing.append(str(error))
    return asked


def _read_task(
    benchmark: Benchmark, options: BenchmarkOptions, sources: embedded.EmbeddedSources
) -> BenchmarkTask:
    if benchmark.is_embedded:
        return make_task(*embedded.read_embedded(benchmark, sources), options)

    assert options.data_root is not None  # checked by `evaluate_benchmarks`
    return make_task(benchmark, readers.read_data_set(benchmark, options.data_root), options)


def make_task(benchmark: Benchmark, data: DataSet, options: BenchmarkOptions) -> BenchmarkTask:
    """Returns the task of a benchmark by the options.

    Raises:
      UnsuitableFlagsError: it has none of the protocols, or nothing that shots come from.
    """
    protocols = options.protocols or benchmark.protocols
    kept = tuple(name for name in protocols if name in benchmark.protocols)
    if not kept:
        raise UnsuitableFlagsError(
            f"--protocols: {benchmark.name} has {', '.join(benchmark.protocols)}, none of "
            f"{', '.join(protocols)}"
        )

    shots = benchmark.shots.count if options.shots is None else options.shots
    if shots and not data.shots:
        raise UnsuitableFlagsError(f"--shots: {benchmark.name} has no split that shots come from")

    limited = dataclasses.replace(data, items=limit_items(data, options.limit))
    return BenchmarkTask(benchmark, limited, kept, shots)


def limit_items(data: DataSet, limit: int | None) -> list[Any]:
    """Returns all items, or about `limit` of them, spread evenly; clusters are kept whole."""
    # An item without a cluster is a cluster of its own.
    clusters: dict[str, list[Any]] = {}
    for index, item in enumerate(data.items):
        clusters.setdefault(item.cluster or f"\0{index}", []).append(item)
    groups = list(clusters.values())
    if not limit or limit >= len(data.items):
        return list(data.items)

    # As many clusters as give about `limit` items.
    count = max(1, limit * len(groups) // len(data.items))
    chosen = {id(item) for i in tasks.spread_indices(len(groups), count) for item in groups[i]}
    return [item for item in data.items if id(item) in chosen]
