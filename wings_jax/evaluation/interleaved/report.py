"""Reports of IIT: accuracy by source and language, and paired differences between settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from wings_jax import formatting
from wings_jax.evaluation import iit
from wings_jax.evaluation.benchmarks import paired, summary
from wings_jax.evaluation.benchmarks.paired import PairedChange
from wings_jax.evaluation.benchmarks.summary import Mean
from wings_jax.evaluation.interleaved import conversation

Lines = Sequence[Mapping[str, Any]]
LEGEND = (
    "The same questions in other settings, paired: change of the accuracy in points with its 95 % "
    "interval."
)


def compare_settings(lines: Lines) -> list[PairedChange]:
    """Returns the change from the question alone to every longer setting that ends with it."""
    # The setting is cut off from the identifier, so that the same anchors are compared.
    by_setting: dict[str, dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        anchor, _, setting = line["id"].rpartition("/")
        by_setting.setdefault(setting, {})[anchor] = {**line, "id": anchor}

    changes = []
    for modality in ("T", "V"):
        alone, *longer = conversation.settings_of(modality)
        for setting in longer:
            before, after = by_setting.get(alone, {}), by_setting.get(setting, {})
            common = [anchor for anchor in before if anchor in after]

            name = f"{iit.format_setting(setting)} - {iit.format_setting(alone)}"
            changes += paired.compare_lines(
                name, [before[anchor] for anchor in common], [after[anchor] for anchor in common]
            )
    return changes


def mean_by(lines: Lines, protocol: str, key: Callable[[str], str]) -> dict[str, Mean]:
    """Returns the accuracy of the lines that have the same key of their anchor's uid."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        # "00012-mmlu:test:3/TTV": the number, the uid of the anchor, and the setting.
        uid = line["id"].rpartition("/")[0].partition("-")[2]
        groups.setdefault(key(uid), []).append(line)

    means = {}
    for name, members in sorted(groups.items()):
        # Settings of one anchor are one cluster, as they are not independent.
        credits = np.array([line["credit"][protocol] for line in members], float)
        clusters = [line.get("cluster", line["id"]) for line in members]

        draws = summary.resample_means(credits, clusters, seed=summary.SEED)
        interval = summary.mean_interval(credits, clusters, draws)
        means[name] = Mean(float(credits.mean()), interval, len(members))
    return means


def source_of(uid: str) -> str:
    """Returns the benchmark of a uid.

    >>> source_of("mmlu:test:sociology-12")
    'mmlu'
    """
    return uid.partition(":")[0]


def source_cells(found: Mapping[str, Lines], protocol: str) -> list[Sequence[str]]:
    """Returns a table with a row per source of the scored question, a column per model."""
    means = {name: mean_by(lines, protocol, source_of) for name, lines in found.items()}
    first = next(iter(means.values()))

    cells: list[Sequence[str]] = [("scored question of", "n", *means)]
    for source, mean in first.items():
        values = [summary.format_mean(of_model[source]) for of_model in means.values()]
        cells.append((source, str(mean.count), *values))
    return cells


def text_report(found: Mapping[str, Lines]) -> str:
    """Returns the tables of every model for a terminal, beside those of all benchmarks."""
    protocols = next(iter(found.values()))[0]["credit"]
    parts = [
        f"{protocol}\n{formatting.text_table(source_cells(found, protocol))}"
        for protocol in protocols
    ]

    parts.append(LEGEND)
    parts += [
        f"{name}\n{formatting.text_table(paired.change_cells(compare_settings(lines)))}"
        for name, lines in found.items()
    ]
    return "\n\n".join(parts)
