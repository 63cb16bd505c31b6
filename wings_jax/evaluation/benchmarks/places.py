"""Where the files of a data set may lie below --data-root."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator

from wings_jax.evaluation.benchmarks.record import Benchmark
from wings_jax.evaluation.benchmarks.records import BENCHMARKS

# Directories of many data sets: VLMEvalKit's, LLaVA's, and one of copies by `save_to_disk`.
COLLECTIONS = ("LMUData", "vlmevalkit", "llava_eval", "hf_arrow")


@dataclasses.dataclass(frozen=True)
class Place:
    """A directory that may have files of a data set."""

    # The directory.
    directory: pathlib.Path
    # Whether its files are of this data set alone; files of others may fit the patterns too.
    is_own: bool
    # Whether it is named like the data set, so that files in another form are a mistake.
    is_named: bool


def find_places(benchmark: Benchmark, data_root: pathlib.Path) -> Iterator[Place]:
    """Yields the directories of a data set, then --data-root itself, then those in collections."""
    yield from _named_places(benchmark, data_root)
    yield Place(data_root, is_own=_is_of_one(data_root), is_named=not benchmark.directories)

    for name in COLLECTIONS:
        collection = find_directory(data_root, name)
        if collection:
            yield from _named_places(benchmark, collection)
            yield Place(collection, is_own=False, is_named=False)


def _named_places(benchmark: Benchmark, directory: pathlib.Path) -> Iterator[Place]:
    for name in benchmark.directories:
        found = find_directory(directory, name)
        if found:
            yield Place(found, is_own=True, is_named=True)


def _is_of_one(data_root: pathlib.Path) -> bool:
    """Returns whether a directory is that of one data set: it has no directory of any."""
    names = {name for other in BENCHMARKS.values() for name in other.directories} | {*COLLECTIONS}
    return not any(find_directory(data_root, name) for name in names)


def find_directory(parent: pathlib.Path, name: str) -> pathlib.Path | None:
    """Returns a directory below another one by its name, in any case; None if there is none."""
    if (parent / name).is_dir():
        return parent / name

    for part in name.split("/"):
        entries = sorted(parent.iterdir()) if parent.is_dir() else []
        same = [entry for entry in entries if entry.name.lower() == part.lower()]
        parent = next((entry for entry in same if entry.is_dir()), parent / part)
    return parent if parent.is_dir() else None
