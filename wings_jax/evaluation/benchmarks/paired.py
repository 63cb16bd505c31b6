"""Two models on the same items: differences of paired credits, and McNemar's test."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wings_jax import files, formatting
from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import results, summary
from wings_jax.evaluation.benchmarks.embedded import EMBEDDED
from wings_jax.evaluation.benchmarks.passes import PERPLEXITY
from wings_jax.evaluation.benchmarks.text_likelihood import (
    TEXT_HEADING,
    TEXT_LEGEND,
    TextChange,
    TextLikelihood,
)
from wings_jax.formatting import Interval

HEADING = ("", "n", "before", "after", "change", "lost", "gained", "p")
LEGEND = (
    "Scores in % (mean over items); the change in points with its 95 % interval (paired "
    "bootstrap); lost: right only before, gained: only after; p: McNemar's exact test."
)


@dataclasses.dataclass(frozen=True)
class PairedChange:
    """The change of one benchmark's score under one protocol."""

    # Name of the benchmark.
    task: str
    # The protocol.
    protocol: str
    # Items that both models were asked and that have an answer.
    count: int
    # Mean credit of the first model.
    before: float
    # Mean credit of the second model.
    after: float
    # 95 % interval of the difference; None for fewer than two items.
    interval: Interval | None
    # Items with more credit before.
    lost: int
    # Items with more credit after.
    gained: int
    # Two-sided p-value of McNemar's exact test.
    p_value: float
    # Row of the benchmark, "" for all items.
    row: str = ""

    @property
    def change(self) -> float:
        """Returns the difference of the means."""
        return self.after - self.before

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as they are written to JSON."""
        return {
            "task": self.task,
            "protocol": self.protocol,
            **({"row": self.row} if self.row else {}),
            "n": self.count,
            "before": formatting.round_for_json(self.before),
            "after": formatting.round_for_json(self.after),
            "change": formatting.round_for_json(self.change),
            "interval95": formatting.round_interval(self.interval),
            "lost": self.lost,
            "gained": self.gained,
            "mcnemar_p": formatting.round_for_json(self.p_value),
        }


Change = PairedChange | TextChange


def compare_task(
    task: str,
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    order: Sequence[str] = (),
) -> Sequence[Change]:
    """Returns what `compare_lines` does or, of plain text, the change of its likelihood."""
    if not before or PERPLEXITY not in before[0]:
        return compare_lines(task, before, after, order)

    _check_items(task, before, after)
    likelihoods = (TextLikelihood.from_lines(lines) for lines in (before, after))
    return [TextChange(task, *likelihoods)]


def compare_lines(
    task: str,
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    order: Sequence[str] = (),
) -> list[PairedChange]:
    """Returns the change under every protocol that both have.

    Args:
      order: rows of the benchmark in the order of reports.

    Raises:
      UserError: they are results of different items.
    """
    _check_items(task, before, after)

    # Protocols of both; without items there is none.
    common = [name for name in before[0]["credit"] if name in after[0]["credit"]] if before else []

    changes = []
    for protocol in common:
        for row, pairs in _pairs_by_row(before, after, order).items():
            # An item whose answer is withheld has no credit.
            credits = [
                (first["credit"][protocol], second["credit"][protocol], first.get("cluster", ""))
                for first, second in pairs
                if first["credit"][protocol] is not None and second["credit"][protocol] is not None
            ]
            if credits:
                changes.append(_compare_credits(task, protocol, row, credits))
    return changes


def _check_items(
    task: str, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> None:
    """Raises UserError if two results are of different items."""
    if [line["id"] for line in before] != [line["id"] for line in after]:
        raise UserError(
            f"{task}: the two results have different items ({len(before)} and {len(after)}): "
            "compare runs with the same files and --limit"
        )


def _pairs_by_row(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], order: Sequence[str]
) -> dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """Returns row -> lines of both results; "" for all items, others where items declare rows."""
    pairs = list(zip(before, after, strict=True))
    by_row: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {"": pairs}
    by_row |= {row: [] for row in order}
    for pair in pairs:
        for row in pair[0].get("rows", ()):
            by_row.setdefault(row, []).append(pair)
    return by_row


def _compare_credits(
    task: str, protocol: str, row: str, rows: Sequence[tuple[float, float, str]]
) -> PairedChange:
    """Returns the change of (credit before, credit after, cluster) of every item."""
    from scipy import stats  # takes a second to import

    # Items are paired: the bootstrap resamples their differences.
    before, after = (np.array([row[i] for row in rows], float) for i in (0, 1))

    # An item without a cluster is a cluster of its own; "\0" occurs in no other name.
    clusters = [row[2] or f"\0{index}" for index, row in enumerate(rows)]
    draws = summary.resample_means(after - before, clusters, seed=summary.SEED)
    interval = summary.change_interval(after - before, clusters, draws)

    # Under the null hypothesis a difference is a loss or a gain with the same probability.
    lost, gained = int((after < before).sum()), int((after > before).sum())
    p_value = stats.binomtest(gained, lost + gained).pvalue if lost + gained else 1.0

    return PairedChange(
        task,
        protocol,
        len(rows),
        float(before.mean()),
        float(after.mean()),
        interval,
        lost,
        gained,
        float(p_value),
        row,
    )


def change_tables(changes: Sequence[Change]) -> list[list[Sequence[str]]]:
    """Returns the tables of changes: a row per benchmark and protocol, then a row per text."""
    credits = [change for change in changes if isinstance(change, PairedChange)]
    texts = [change for change in changes if isinstance(change, TextChange)]
    tables = [change_cells(credits)] if credits else []
    return tables + ([[TEXT_HEADING, *(text.cells() for text in texts)]] if texts else [])


def change_legend(compared: Mapping[str, Sequence[Change]]) -> str:
    """Returns what the columns of the tables mean."""
    kinds = {type(change) for changes in compared.values() for change in changes}
    legends = {PairedChange: LEGEND, TextChange: TEXT_LEGEND}
    return " ".join(legend for kind, legend in legends.items() if kind in kinds)


def change_cells(changes: Sequence[PairedChange]) -> list[Sequence[str]]:
    """Returns the table of changes, a row per benchmark and protocol."""
    cells: list[Sequence[str]] = [HEADING]
    for change in changes:
        before, after = (
            formatting.format_number(value, scale=100) for value in (change.before, change.after)
        )

        difference = formatting.format_estimate(change.change, change.interval, scale=100, sign="+")
        p_value = "< 0.001" if change.p_value < 0.001 else f"{change.p_value:.3f}"
        name = f"{change.task} ({change.protocol})" + (f": {change.row}" if change.row else "")
        counts = (str(change.lost), str(change.gained))
        cells.append((name, str(change.count), before, after, difference, *counts, p_value))
    return cells


def compare_directories(directories: Sequence[pathlib.Path]) -> dict[str, list[Change]]:
    """Returns "A -> B" -> changes, from the first directory of results to each other one.

    Raises:
      UserError: a directory has no results, or two have no benchmark in common.
    """
    found = [_find_results(directory) for directory in directories]
    names = [_result_name(path) for path in directories]

    compared = {}
    for directory, name, other in zip(directories[1:], names[1:], found[1:], strict=True):
        # The first directory is what each other one is compared with.
        common = [task for task in found[0] if task in other]
        if not common:
            raise UserError(
                f"--compare: {directories[0]} and {directory} have no benchmark in common"
            )

        changes = [
            change
            for task in common
            for change in compare_task(
                task,
                results.read_lines(found[0][task]),
                results.read_lines(other[task]),
                EMBEDDED[task].rows if task in EMBEDDED else (),
            )
        ]
        compared[f"{names[0]} -> {name}"] = changes
    return compared


def _result_name(directory: pathlib.Path) -> str:
    return directory.resolve().name


def _find_results(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns task -> file of lines in a model's directory of results. Raises UserError."""
    finished = {
        path.stem: path
        for path in sorted(directory.glob("*.jsonl"))
        if path.with_suffix(".json").exists()
    }
    if finished:
        return finished

    # The --out of an evaluation has a directory per model.
    models = sorted(path.name for path in directory.glob("*/") if list(path.glob("*.jsonl")))
    hint = f"; did you mean {directory / models[0]}?" if models else ""
    raise UserError(f"--compare: {directory} has no results (TASK.jsonl and TASK.json){hint}")


def text_changes(compared: Mapping[str, Sequence[Change]]) -> str:
    """Returns the tables for a terminal."""
    parts = [change_legend(compared)]
    for name, changes in compared.items():
        tables = [formatting.text_table(cells) for cells in change_tables(changes)]
        parts.append(f"{name}\n" + "\n\n".join(tables))
    return "\n\n".join(parts)


def write_changes(
    directory: pathlib.Path,
    compared: Mapping[str, Sequence[Change]],
    *,
    stem: str,
    more: Mapping[str, Any] | None = None,
) -> list[pathlib.Path]:
    """Writes STEM.md and STEM.json, in which `more` has other keys; returns the paths."""
    markdown = [f"# {stem.capitalize()}", "", change_legend(compared)]
    for name, changes in compared.items():
        markdown += ["", f"## {name}"]
        for cells in change_tables(changes):
            markdown += ["", formatting.markdown_table(cells)]

    changed = {name: [change.to_dict() for change in changes] for name, changes in compared.items()}
    content = {**(more or {}), **changed}
    return [
        files.write_text(directory / f"{stem}.md", "\n".join(markdown) + "\n"),
        files.write_text(directory / f"{stem}.json", formatting.json_text(content)),
    ]


def print_comparison(directories: Sequence[pathlib.Path], out: pathlib.Path | None) -> None:
    """Prints, and writes to `out`, the changes between finished results. Raises UserError."""
    if len(directories) < 2:
        raise UserError("--compare: needs two or more directories of results")

    compared = compare_directories(directories)
    print(text_changes(compared))

    if out:
        paths = write_changes(out, compared, stem="comparison")
        print("\nwritten: " + ", ".join(map(str, paths)))
