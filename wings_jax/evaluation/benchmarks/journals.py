"""Journals of benchmark tasks: where a run that was stopped goes on, and what its parts share."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Container, Iterator, Mapping
from typing import Any

from wings_jax import distributed
from wings_jax.evaluation.benchmarks import passes, results
from wings_jax.evaluation.benchmarks.runner import BenchmarkTask, EntryStore
from wings_jax.inference.jobs import Journal
from wings_jax.inference.shards import Shard

FLAG = "--out"


class MemoryStore:
    """Entries of a run that writes no files."""

    def __init__(self) -> None:
        self.answers: dict[int, dict[str, Any]] = {}

    def add(self, number: int, answer: Mapping[str, Any]) -> None:
        """Adds an entry."""
        self.answers[number] = dict(answer)


@contextlib.contextmanager
def open_journal(
    out: pathlib.Path, name: str, task: BenchmarkTask, provenance: Mapping[str, Any], shard: Shard
) -> Iterator[Journal]:
    """Yields the journal of a task, with the entries of an earlier run and of other processes."""
    lines_path, scores_path = results.result_paths(out, name, task.benchmark.name)
    if shard.count > 1:
        lines_path = lines_path.with_name(part_name(task, shard))
    with distributed.together():
        # Lines without scores are of a run that was killed while it wrote. A result that is
        # computed again loses its scores first, as scores mean that the lines are complete.
        if shard.count == 1:
            scores_path.unlink(missing_ok=True)
        lines_path.unlink(missing_ok=True)
        journal = Journal(lines_path, provenance, FLAG, replace=task.benchmark.is_embedded)

    try:
        # Without --shard, the entries of all parts are put together.
        if shard.count == 1:
            with distributed.together():
                for part in part_journals(out, name, task, provenance):
                    journal.answers.update(part.answers)
                    part.close()
        # The first process of a job has them; all have to compute the same batches.
        journal.answers = dict(distributed.share(list(journal.answers.items())))
        yield journal
    finally:
        journal.close()


def part_name(task: BenchmarkTask, shard: Shard) -> str:
    """Returns the name of the output that a shard's journal belongs to."""
    return f"{task.benchmark.name}.part-{shard.index}-of-{shard.count}"


def part_journals(
    out: pathlib.Path, name: str, task: BenchmarkTask, provenance: Mapping[str, Any]
) -> list[Journal]:
    """Returns the journals that shards have written. Raises UserError if one is another run's."""
    pattern = f"{task.benchmark.name}.part-*-of-*.partial"
    return [
        Journal(path.with_suffix(""), provenance, FLAG)
        for path in sorted((out / name).glob(pattern))
    ]


def failed_items(task: BenchmarkTask, store: EntryStore) -> list[int]:
    """Returns the positions of the items that an earlier run could not ask."""
    failed = [number for number, entry in store.answers.items() if "error" in entry]
    return sorted({passes.entry_item(number, len(task.data.items)) for number in failed})


def drop_entries(task: BenchmarkTask, store: EntryStore, items: Container[int]) -> None:
    """Removes the entries of items, which are then asked again."""
    count = len(task.data.items)
    for number in list(store.answers):
        if passes.entry_item(number, count) in items:
            del store.answers[number]
