"""The tables of the experiment, methods by measures, as Markdown, JSON and text."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from wings_jax import files, formatting
from wings_jax.forgetting import estimates, results, settings
from wings_jax.forgetting.estimates import Estimate
from wings_jax.forgetting.methods import (
    BASE,
    BASES,
    PERPLEXITY,
    REFERENCE,
    REGIMES,
    SHIFT,
    SHIFT_AFTER,
    BaseLLM,
    Measure,
    find_method,
    table_order,
)
from wings_jax.forgetting.results import RunScores
from wings_jax.forgetting.settings import ExperimentSettings

NOTHING = "-"
DETAILS = {
    "scenes_images": "Images by kind",
    "scenes_text": "Text by skill",
    "language": "Multiple choice by kind",
}
FAST_NOTE = (
    "**This is the fast form**. It shows how the experiment works; its findings need the full one."
)
# What the interval of one run is over, where that is not questions.
OVER = {SHIFT.row: "probes", SHIFT_AFTER.row: "probes", PERPLEXITY.row: "passages"}
IMAGES_LEGEND = """\
- images: questions about held-out digits and drawings; sums are separate. Right answers in %: the
  whole answer matches exactly"""
TEXT_LEGENDS = {
    "scenes_text": """\
- text: skills that the base had, right if the whole answer is; those that a replay in stage 2
  refreshes (plus and minus by the very questions of this test, lookup by others) are separate from
  those that are never replayed, because replay hides forgetting""",
    "iit": """\
- (T) to (V): interleaved conversations with true answers before the last question, which is scored:
  after a last T about text, of skills never replayed, after a last V about an image""",
    "language": """\
- perplexity: of English prose that no stage trains on, lower is better
- multiple choice: everyday questions, zero-shot; the most likely choice counts, right ones in %""",
}
LEGEND = """\
- attention shift: 1 - correlation, over the layers, of the attention before and after the image,
  of all queries of the embedded probes with their answers, and of the queries behind the image
  alone; 0 to 2, lower is better
- mean ± half of the 95 % interval over seeds (Student's t): the range for other trainings with the
  same questions; of one seed, as of the base, the 95 % interval over its questions, passages or
  probes: mean [low, high]
- differences: ± as above; [low, high] is the 95 % interval over the questions, for the same
  trainings; questions of the same words and answer count together
- trained: parameters of the last stage"""


def write_table(
    out: pathlib.Path,
    runs: Sequence[RunScores],
    chosen: ExperimentSettings,
    missing: Mapping[str, str],
) -> list[pathlib.Path]:
    """Writes forgetting.md and forgetting.json; returns the paths.

    `missing` has the planned runs without scores: name -> reason of the failure, "" if not run yet.
    """
    contents = {
        "forgetting.md": markdown_tables(runs, chosen, missing),
        "forgetting.json": formatting.json_text(tables_to_dict(runs, chosen, missing)),
    }
    return [files.write_text(out / name, text) for name, text in contents.items()]


def markdown_tables(
    runs: Sequence[RunScores], chosen: ExperimentSettings, missing: Mapping[str, str]
) -> str:
    """Returns all tables."""
    base = BASES[chosen.base]
    markdown_lines = [f"# Text-only forgetting: the paper's claim on {base.title}", ""]
    if chosen.is_fast:
        markdown_lines += [FAST_NOTE, ""]
    if missing:
        # Runs that are still waiting are counted, not listed.
        failed = [f"- failed: {name}: {reason}" for name, reason in missing.items() if reason]
        markdown_lines += [f"Runs without scores so far: {len(missing)}.", *failed, ""]

    # Only the measures of this base are explained.
    tasks = {measure.task for measure in base.measures}
    markdown_lines += [
        "Every method trains on the same data for the same number of steps, after a first stage on",
        "captions; a method that differs in a value of its config has it in its name.",
        f"Here: {settings.describe_settings(chosen)}.",
        "",
        IMAGES_LEGEND,
        *(legend for task, legend in TEXT_LEGENDS.items() if task in tasks),
        LEGEND,
    ]

    for regime in scored_regimes(runs):
        markdown_lines += ["", f"## Stage 2 on {REGIMES[regime].title}", ""]
        markdown_lines.append(formatting.markdown_table(main_cells(runs, regime, base)))
        for title, table_cells in _further_tables(runs, regime, base):
            markdown_lines += ["", f"### {title}", "", formatting.markdown_table(table_cells)]
    return "\n".join(markdown_lines) + "\n"


def _further_tables(
    runs: Sequence[RunScores], regime: str, base: BaseLLM
) -> Iterator[tuple[str, list[list[str]]]]:
    """Yields the titles and cells of the differences and of the scores by kind of question."""
    if results.select_runs(runs, REFERENCE, regime):
        title = f"Difference from {find_method(REFERENCE).title}, paired by seed"
        table_cells = _cells(
            runs, regime, base.measures, _format_difference, without=(BASE, REFERENCE)
        )
        yield title, table_cells

    for task, title in DETAILS.items():
        rows = dict.fromkeys(row_name for run in runs for row_name in run.scores.get(task, {}))
        # Perplexity is not a share in %.
        shares = [row_name for row_name in rows if row_name != PERPLEXITY.row]
        measures = [Measure(row_name, task, row_name) for row_name in shares]
        if rows:
            yield f"{title}, means in %", _cells(runs, regime, measures, _format_mean)


def text_table(runs: Sequence[RunScores], regime: str, base: BaseLLM) -> str:
    """Returns the main table of a regime for a terminal."""
    title = f"Stage 2 on {REGIMES[regime].title}"
    return f"{title}\n{formatting.text_table(main_cells(runs, regime, base))}"


def scored_regimes(runs: Sequence[RunScores]) -> list[str]:
    """Returns the regimes that have runs, the first one if only the base has been run."""
    regimes = [name for name in REGIMES if any(run.regime == name for run in runs)]
    if regimes or not runs:
        return regimes
    return list(REGIMES)[:1]


def main_cells(runs: Sequence[RunScores], regime: str, base: BaseLLM) -> list[list[str]]:
    """Returns the main table: a row per method, a column per measure."""
    header, *method_rows = _cells(runs, regime, base.measures, _format_estimate)
    table_cells = [[header[0], "seeds", *header[1:], "trained"]]

    for method_name, measure_cells in zip(scored_methods(runs, regime), method_rows, strict=True):
        of_method = results.select_runs(runs, method_name, regime)
        # The base is not trained, so it has no seeds.
        seeds = NOTHING if method_name == BASE else str(len(of_method))
        title, *values = measure_cells
        table_cells.append([title, seeds, *values, f"{of_method[0].trained:,}"])
    return table_cells


CellFormat = Callable[[Sequence[RunScores], str, str, Measure], str]


def _cells(
    runs: Sequence[RunScores],
    regime: str,
    measures: Sequence[Measure],
    cell_format: CellFormat,
    without: Sequence[str] = (),
) -> list[list[str]]:
    rows = [["", *(measure.title for measure in measures)]]
    for name in scored_methods(runs, regime):
        if name not in without:
            table_cells = (cell_format(runs, name, regime, measure) for measure in measures)
            rows.append([find_method(name).title, *table_cells])
    return rows


def scored_methods(runs: Sequence[RunScores], regime: str) -> list[str]:
    """Returns the methods and variants that have runs under a regime, in the table's order."""
    # A run without a regime is the base, which is in every table.
    names = {run.method for run in runs if run.regime in ("", regime)}
    return sorted(names, key=table_order)


def _format_estimate(runs: Sequence[RunScores], method: str, regime: str, measure: Measure) -> str:
    of_method = results.select_runs(runs, method, regime)
    return format_estimate(estimates.estimate_mean(of_method, measure), measure)


def _format_difference(
    runs: Sequence[RunScores], method: str, regime: str, measure: Measure
) -> str:
    difference = estimates.estimate_difference(runs, method, regime, measure)
    return format_estimate(difference, measure, sign="+")


def _format_mean(runs: Sequence[RunScores], method: str, regime: str, measure: Measure) -> str:
    # Means alone: by kind there are too few questions for intervals to be useful.
    estimate = estimates.estimate_mean(results.select_runs(runs, method, regime), measure)
    mean = Estimate(estimate.mean, math.nan, math.nan, estimate.runs)
    return format_estimate(mean, measure)


def format_estimate(estimate: Estimate, measure: Measure, sign: str = "") -> str:
    """Returns the mean with its intervals over seeds (±) and over questions [low, high].

    >>> measure = Measure("images", "scenes_images", "all but sums")
    >>> format_estimate(Estimate(0.621, 0.589, 0.653, runs=3), measure)
    '62.1 ±3.2'
    >>> format_estimate(Estimate(0.621, 0.573, 0.669, runs=1), measure)
    '62.1 [57.3, 66.9]'
    """
    if math.isnan(estimate.mean):
        return NOTHING

    # Shares in % have one digit, other scales two.
    options: dict[str, Any] = {"digits": 1 if measure.scale == 100 else 2, "scale": measure.scale}
    mean = formatting.format_number(estimate.mean, sign=sign, **options)
    # Over seeds as ±, over questions as [low, high].
    interval = estimate.questions
    if not math.isnan(estimate.low):
        if estimate.runs > 1:
            mean += f" ±{formatting.format_number(estimate.high - estimate.mean, **options)}"
        else:
            interval = (estimate.low, estimate.high)

    if interval is None:
        return mean
    return f"{mean} {formatting.format_interval(interval, sign=sign, **options)}"


def tables_to_dict(
    runs: Sequence[RunScores], chosen: ExperimentSettings, missing: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the settings, every run's scores, and the tables by regime and method."""
    return {
        "settings": settings.settings_to_dict(chosen),
        "missing": dict(missing),
        "table": {
            regime: {
                name: _row_to_dict(runs, name, regime) for name in scored_methods(runs, regime)
            }
            for regime in scored_regimes(runs)
        },
        "runs": [run.to_dict() for run in runs],
    }


def _row_to_dict(runs: Sequence[RunScores], method: str, regime: str) -> dict[str, Any]:
    of_method = results.select_runs(runs, method, regime)
    rows = dict.fromkeys(
        (task, row_name)
        for run in of_method
        for task in run.scores
        for row_name in run.scores[task]
    )

    # Scores that are not numbers, such as those of skipped probes, are left out.
    scores: dict[str, dict[str, Any]] = {}
    for task, row_name in rows:
        measure = Measure(row_name, task, row_name)
        estimate = estimates.estimate_mean(of_method, measure)
        if math.isnan(estimate.mean):
            continue

        difference = estimates.estimate_difference(runs, method, regime, measure)
        scores.setdefault(task, {})[row_name] = {
            **_estimate_to_dict(estimate, measure),
            "against_reference": _estimate_to_dict(difference, measure),
        }

    return {
        "title": find_method(method).title,
        "seeds": [run.seed for run in of_method],
        "trained": of_method[0].trained,
        "scores": scores,
    }


def _estimate_to_dict(estimate: Estimate, measure: Measure) -> dict[str, Any]:
    """Returns an estimate for JSON; "over" is what its interval is over, null where it has none.

    A difference has another interval over the questions, where it is known.
    """
    interval = formatting.round_interval((estimate.low, estimate.high))
    # What the interval of one seed is over depends on the measure.
    over = None
    if interval and interval[0] is not None:
        over = "seeds" if estimate.runs > 1 else OVER.get(measure.row, "questions")

    content = {
        "mean": formatting.round_for_json(estimate.mean),
        "interval95": interval,
        "over": over,
        "seeds": estimate.runs,
    }
    if estimate.questions:
        content["interval95_questions"] = formatting.round_interval(estimate.questions)
    return content
