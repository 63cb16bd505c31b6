"""Names of tasks: benchmarks, suites, and the tasks that the package embeds."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from wings_jax import formatting
from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks.embedded import EMBEDDED
from wings_jax.evaluation.benchmarks.record import Benchmark
from wings_jax.evaluation.benchmarks.records import BENCHMARKS

SUITES = ("wings",)


def find_benchmarks(names: str | None, suite: str | None) -> list[Benchmark]:
    """Returns the benchmarks of both flags, embedded tasks among them.

    Raises:
      UserError: there is no task or suite of a name.
    """
    chosen = find_suite(suite) if suite is not None else []

    known = {**EMBEDDED, **BENCHMARKS}
    # A benchmark of the suite that is named as well is asked once.
    for name in [name.strip() for name in (names or "").split(",")]:
        if name in known:
            chosen += [] if known[name] in chosen else [known[name]]
        elif name:
            raise UserError(_unknown_name(name))

    if names is not None and not chosen:
        listed = ", ".join(EMBEDDED)
        raise UserError(f"--tasks: {names!r} has no name of a task; there are {listed}")
    return chosen


def _unknown_name(name: str) -> str:
    near = difflib.get_close_matches(name, [*EMBEDDED, *BENCHMARKS], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join([*EMBEDDED, *BENCHMARKS])
    return f"--tasks: no such task: {name!r}; {hint}there are {listed}"


def find_suite(name: str) -> list[Benchmark]:
    """Returns the benchmarks of a suite. Raises UserError if there is none of that name."""
    if name not in SUITES:
        raise UserError(f"--suite: no suite {name!r}; there is {', '.join(SUITES)}")
    return [benchmark for benchmark in BENCHMARKS.values() if benchmark.in_paper]


def text_catalog() -> str:
    """Returns a table of the benchmarks: what they are, and where their files come from."""
    cells: list[Sequence[str]] = [("task", "protocols", "items", "files", "license")]
    for name, benchmark in BENCHMARKS.items():
        size = str(benchmark.size) if benchmark.size else "?"
        protocols = ", ".join(benchmark.protocols)
        cells.append((name, protocols, size, benchmark.source, benchmark.license))

    embedded = ", ".join(EMBEDDED)
    return f"{formatting.text_table(cells)}\n\nembedded, without files: {embedded}"
