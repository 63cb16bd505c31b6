"""Journals of benchmark tasks: where a run that was stopped goes on, and what its parts share."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from wings_jax import distributed
from wings_jax.evaluation.benchmarks import results
from wings_jax.evaluation.benchmarks.runner import BenchmarkTask
from wings_jax.inference.jobs import Journal
from wings_jax.inference.shards import Shard

FLAG = "--out"


@contextlib.contextmanager
def open_journal(
    out: pathlib.Path, name: str, task: BenchmarkTask, provenance: Mapping[str, Any], shard: Shard
) -> Iterator[Journal]:
    """Yields the journal of a task, with the entries of an earlier run and of other processes."""
    lines_path, _ = results.result_paths(out, name, task.benchmark.name)
    if shard.count > 1:
        lines_path = lines_path.with_name(part_name(task, shard))
    with distributed.together():
        # Lines without scores are of a run that was killed while it wrote.
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
