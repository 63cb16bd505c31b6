"""Reports of benchmarks: tables for the terminal and Markdown, JSON, and a bar chart."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax import files, formatting
from wings_jax.evaluation.benchmarks import legacy, results, summary
from wings_jax.evaluation.benchmarks.results import BenchmarkResult
from wings_jax.evaluation.benchmarks.summary import ProtocolScore

LEGEND = (
    "Scores in %, perplexity as it is [95 % interval, bootstrap]; * is the paper's protocol or the "
    "task's own."
)
GROUPS_SHOWN = 80  # rows of a table per group

# Task -> a result per model, in the order of the models.
Results = Mapping[str, Sequence[BenchmarkResult]]


def score_cells(found: Results) -> list[list[str]]:
    """Returns the main table: a row per benchmark, protocol and average, a column per model."""
    models = [result.model for result in next(iter(found.values()))]
    cells = [["", "n", *models]]

    for task, of_models in found.items():
        first = of_models[0]
        for protocol, score in first.scores.items():
            # The asterisk marks the protocol of the paper's setting.
            mark = "*" if protocol == first.benchmark.headline else ""
            scores = [result.scores[protocol] for result in of_models]
            for name in _row_names(score):
                values = [_row_value(one, name) for one in scores]
                cells.append([f"{task} {protocol}{mark}{name}", _row_count(score, name), *values])
    return cells


def _row_names(score: ProtocolScore) -> list[str]:
    """Returns the suffixes of a protocol's rows: its mean, the macro mean, its own metrics."""
    macro = [", macro"] if score.macro else []
    return ["", *macro, *(f", {value.name}" for value in score.metrics)]


def _row_count(score: ProtocolScore, name: str) -> str:
    """Returns what a row is a mean over: items, or the questions or figures of a metric."""
    counts = {f", {value.name}": value.count for value in score.metrics}
    return str(counts.get(name, score.micro.count))


def _row_value(score: ProtocolScore, name: str) -> str:
    """Returns the cell of a row."""
    if not name and not score.is_share:
        return formatting.format_estimate(score.micro.value, score.micro.interval, digits=3)
    if not name:
        return summary.format_mean(score.micro)
    if name == ", macro" and score.macro:
        return summary.format_mean(score.macro)

    # A metric of the benchmark itself: a share, or points of a maximum.
    (value,) = (value for value in score.metrics if f", {value.name}" == name)
    if not value.scale:
        return formatting.format_number(value.value, digits=4)
    if value.scale == 1:
        return formatting.format_number(value.value, scale=100)
    return f"{formatting.format_number(value.value)} of {value.scale:g}"


def group_cells(of_models: Sequence[BenchmarkResult], protocol: str) -> list[list[str]]:
    """Returns the table of a benchmark's groups, a column per model."""
    first = of_models[0]
    cells = [[first.benchmark.grouping or "group", "n", *(result.model for result in of_models)]]

    # All models were asked the same items, and have the same groups.
    for name, mean in list(first.scores[protocol].groups.items())[:GROUPS_SHOWN]:
        values = [summary.format_mean(result.scores[protocol].groups[name]) for result in of_models]
        title = f"{formatting.TOTAL}{name}" if name in first.benchmark.totals else name
        cells.append([title, str(mean.count), *values])
    return cells


def text_report(found: Results, missing: Sequence[str] = ()) -> str:
    """Returns the main table for a terminal, with what could not be asked."""
    parts = [LEGEND, formatting.text_table(score_cells(found))] if found else []

    # Rows of the embedded tasks are what they are about; groups of others are in the files.
    for of_models in found.values():
        first = of_models[0]
        if first.benchmark.rows and first.scores:
            cells = group_cells(of_models, first.headline_protocol)
            parts += [f"\n{first.benchmark.title}", formatting.text_table(cells)]
    parts += notes(found)

    if missing:
        parts.append("not run:\n  " + "\n  ".join(missing))
    return "\n".join(parts)


def notes(found: Results) -> list[str]:
    """Returns the remarks on the scores, a line each."""
    lines = []
    for task, of_models in found.items():
        benchmark, provenance = of_models[0].benchmark, of_models[0].provenance

        # Scores of a part of a split are not comparable with published ones.
        asked = provenance["items"]
        if benchmark.size and asked != benchmark.size:
            lines.append(f"{task}: {asked} items, the whole split has {benchmark.size}")
        for cause, count in provenance["skipped"].items():
            lines.append(f"{task}: {count} rows left out: {cause}")
        lines += [f"{task}: {remark}" for remark in provenance.get("remarks", ())]

        for result in of_models:
            # An item that could not be asked counts as wrong, which lowers the score.
            cause, *others = result.errors or [""]
            if cause:
                more = f" (and {len(others)} other causes, see report.json)" if others else ""
                lines.append(
                    f"{task}: {result.model}: {result.failed} items count as wrong: {cause}{more}"
                )
    return lines


def markdown_report(found: Results, missing: Sequence[str] = ()) -> str:
    """Returns the whole report in Markdown."""
    lines = ["# Evaluation", ""]
    if found:
        of_models = next(iter(found.values()))
        lines += [model_line(result.model, result.origin, result.step) for result in of_models]
        lines += ["", LEGEND, ""]
        lines += [formatting.markdown_table(score_cells(found))]
    remarks = [f"- {note}" for note in notes(found)]
    lines += ["", *remarks] if remarks else []

    # A section per benchmark: what its scores depend on, and the headline by group.
    for task, of_models in found.items():
        first = of_models[0]
        lines += ["", f"## {first.benchmark.title}", ""]
        lines += provenance_lines(of_models)
        protocol = first.headline_protocol
        if protocol and first.scores[protocol].groups:
            cells = group_cells(of_models, protocol)
            lines += ["", f"{task} {protocol}:", "", formatting.markdown_table(cells)]

    if missing:
        lines += ["", "## Not run", "", *(f"- {line}" for line in missing)]
    return "\n".join(lines) + "\n"


def model_line(name: str, origin: str, step: int | None) -> str:
    """Returns a line of Markdown: a model and where it comes from; a base has no step.

    >>> model_line("stage2", "runs/stage2", 400), model_line("base", "LLM", None)
    ('- stage2: `runs/stage2`, step 400', '- base: `LLM`')
    """
    return f"- {name}: `{origin}`" + ("" if step is None else f", step {step}")


def provenance_lines(of_models: Sequence[BenchmarkResult]) -> list[str]:
    """Returns a Markdown list of what the scores of a benchmark depend on."""
    first = of_models[0]
    benchmark, provenance = first.benchmark, first.provenance

    lines = [
        f"- data: {provenance['data_form']} form, SHA-256 `{provenance['data_sha256'][:16]}`, "
        f"{provenance['items']} items, {benchmark.license}",
        f"- prompts: `{provenance['prompt_hash']}`, {provenance['shots']} shots",
    ]

    # Data and prompts are common to all models; hash and dtype are not.
    lines += [
        f"- {result.model}: `{result.provenance['model_hash']}`, {result.provenance['dtype']}"
        for result in of_models
    ]

    if benchmark.notes:
        lines.append(f"- {benchmark.notes}")
    return lines


def report_to_dict(found: Results, missing: Sequence[str] = ()) -> dict[str, Any]:
    """Returns all scores as they are written to JSON."""
    return {
        "tasks": {
            task: [results.to_dict(result) for result in of_models]
            for task, of_models in found.items()
        },
        "missing": list(missing),
        **legacy.report_to_dict(found),
    }


def write_report(
    directory: pathlib.Path, found: Results, missing: Sequence[str] = ()
) -> list[pathlib.Path]:
    """Writes report.md, report.json, report.png and timing.json; returns the paths.

    Of embedded tasks there are answers-NAME.jsonl too.
    """
    paths = [
        files.write_text(directory / "report.md", markdown_report(found, missing)),
        files.write_text(
            directory / "report.json", formatting.json_text(report_to_dict(found, missing))
        ),
    ]

    paths += legacy.write_answers(directory, found)
    if any(has_bar(of_models[0]) for of_models in found.values()):
        paths.append(draw_bars(directory / "report.png", found))

    # Seconds differ from run to run: they have a file of their own.
    seconds = {
        task: {result.model: round(result.seconds, 2) for result in of_models}
        for task, of_models in found.items()
    }
    return [*paths, files.write_text(directory / "timing.json", formatting.json_text(seconds))]


def has_bar(result: BenchmarkResult) -> bool:
    """Returns whether a result has a headline score in %."""
    return bool(result.scores) and result.scores[result.headline_protocol].is_share


def draw_bars(path: pathlib.Path, found: Results) -> pathlib.Path:
    """Writes a bar chart of the headline scores: a group of bars per benchmark, one per model."""
    from matplotlib import figure  # slow to import

    tasks = [task for task, of_models in found.items() if has_bar(of_models[0])]
    models = [result.model for result in next(iter(found.values()))]

    # Groups get wider with the square root of the number of models.
    drawing = figure.Figure(figsize=(2.5 + 0.9 * len(tasks) * max(len(models), 1) ** 0.5, 4))
    axis = drawing.subplots()

    # A group of bars takes 0.8 of the distance between two groups.
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        heights, low, high = [], [], []
        for task in tasks:
            result = found[task][number]
            mean = result.scores[result.headline_protocol].headline(result.benchmark)
            # Error bars are distances from the mean; without an interval they are zero.
            ends = mean.interval or (mean.value, mean.value)
            heights.append(100 * mean.value)
            low.append(100 * max(mean.value - ends[0], 0))
            high.append(100 * max(ends[1] - mean.value, 0))

        # The bars of a group are centered at its tick.
        places = [index + (number - (len(models) - 1) / 2) * width for index in range(len(tasks))]
        axis.bar(places, heights, width, yerr=(low, high), label=model, capsize=2)

    labels = [f"{task}\n{found[task][0].headline_protocol}" for task in tasks]
    axis.set_xticks(range(len(tasks)), labels, fontsize=8)
    axis.set_ylabel("score in %")
    axis.set_ylim(0, 100)
    axis.legend(fontsize=8)

    # Without the name of the software, equal scores give equal files.
    with files.replacing(path) as temporary:
        drawing.savefig(
            temporary, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None}
        )
    return path
