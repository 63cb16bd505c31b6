"""The table of the paper's claim, methods by scores, as Markdown, JSON and text."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from wings_jax import files, formatting
from wings_jax.forgetting import plan, results
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
    find,
    order,
)
from wings_jax.forgetting.plan import ExperimentSettings
from wings_jax.forgetting.results import Estimate, Scored

NOTHING = "-"
DETAILS = {
    "scenes_images": "Pictures by kind",
    "scenes_text": "Text by skill",
    "language": "Multiple choice by kind",
}
FAST = (
    "**This is the fast form**. It shows how the experiment goes; what it finds needs the full one."
)
# What the interval of one run is over, where that is not questions.
OVER = {SHIFT.row: "probes", SHIFT_AFTER.row: "probes", PERPLEXITY.row: "passages"}
PICTURES_TOLD = """\
- pictures: questions about held-out digits and drawings; sums stand apart. Right answers in %: the
  whole answer matches exactly"""
TEXT_TOLD = {
    "scenes_text": """\
- text: skills that the base had, right if the whole answer is; those that a replay in stage 2
  refreshes (plus and minus by the very questions asked here, lookup by others) apart from those
  that are never replayed, for replay hides what is forgotten""",
    "iit": """\
- (T) to (V): interleaved conversations with true answers before the last question, which is scored:
  after a last T about text, of skills never replayed, after a last V about a picture""",
    "language": """\
- perplexity: of English prose that no stage trains on, lower is better
- multiple choice: everyday questions, zero-shot; the likeliest choice counts, right ones in %""",
}
READING = """\
- attention shift: 1 - correlation, over the layers, of the attention before and after the picture,
  of all queries of the embedded probes with their answers, and of the queries behind the picture
  alone; 0 to 2, lower is better
- mean ± half of the 95 % interval over seeds (Student's t): how it may be after other trainings,
  asked the same questions; of one seed, as of the base, the 95 % interval over its questions,
  passages or probes: mean [low, high]
- differences: ± as above; [low, high] is how they may be with other questions, after the same
  trainings; those of the same words and answer count together
- trained: parameters of the last stage"""


def write_table(
    out: pathlib.Path,
    runs: Sequence[Scored],
    settings: ExperimentSettings,
    missing: Mapping[str, str],
) -> list[pathlib.Path]:
    """Writes forgetting.md and forgetting.json; returns the paths.

    `missing` has the runs that are planned and not there: name -> why, "" where they are to come.
    """
    found = json.dumps(as_json(runs, settings, missing), indent=1, ensure_ascii=False) + "\n"
    return [
        files.write_text(out / "forgetting.md", as_markdown(runs, settings, missing)),
        files.write_text(out / "forgetting.json", found),
    ]


def as_markdown(
    runs: Sequence[Scored], settings: ExperimentSettings, missing: Mapping[str, str]
) -> str:
    """Returns all tables."""
    base = BASES[settings.base]
    lines = [f"# Sight without forgetting: the paper's claim on {base.title}", ""]
    lines += [FAST, ""] if settings.is_fast else []
    if missing:
        lost = [f"- failed: {name}: {why}" for name, why in missing.items() if why]
        lines += [f"Runs that are not in yet: {len(missing)}.", *lost, ""]
    lines += [
        "Every method trains on the same data for as many steps, after a first stage on captions;",
        "where one differs in a value of its config, its name says so.",
        f"Here: {plan.told(settings)}.",
        "",
        PICTURES_TOLD,
        *(told for task, told in TEXT_TOLD.items() if any(m.task == task for m in base.measures)),
        READING,
    ]
    for regime in regimes(runs):
        lines += ["", f"## Stage 2 on {REGIMES[regime].title}", ""]
        lines.append(formatting.markdown_table(main_cells(runs, regime, base)))
        for title, cells in _further(runs, regime, base):
            lines += ["", f"### {title}", "", formatting.markdown_table(cells)]
    return "\n".join(lines) + "\n"


def _further(
    runs: Sequence[Scored], regime: str, base: BaseLLM
) -> Iterator[tuple[str, list[list[str]]]]:
    reference = find(REFERENCE).title
    if results.of(runs, REFERENCE, regime):
        title = f"Difference from {reference}, paired by seed"
        yield title, _cells(runs, regime, base.measures, _difference, without=(BASE, REFERENCE))
    for task, title in DETAILS.items():
        rows = dict.fromkeys(row for run in runs for row in run.scores.get(task, {}))
        if rows:
            shown = [Measure(row, task, row) for row in rows if row != PERPLEXITY.row]
            yield f"{title}, means in %", _cells(runs, regime, shown, _mean)


def as_text(runs: Sequence[Scored], regime: str, base: BaseLLM) -> str:
    """Returns the main table of a regime for a terminal."""
    title = f"Stage 2 on {REGIMES[regime].title}"
    return f"{title}\n{formatting.text_table(main_cells(runs, regime, base))}"


def regimes(runs: Sequence[Scored]) -> list[str]:
    """Returns the regimes that have runs, the first one if there is but the base."""
    found = [name for name in REGIMES if any(run.regime == name for run in runs)]
    return found or list(REGIMES)[: bool(runs)]


def main_cells(runs: Sequence[Scored], regime: str, base: BaseLLM) -> list[list[str]]:
    """Returns the main table: a row per method, a column per measure."""
    header, *rows = _cells(runs, regime, base.measures, _estimate)
    seeds, trained = [], []
    for name in names(runs, regime):
        of_method = results.of(runs, name, regime)
        seeds.append(NOTHING if name == BASE else str(len(of_method)))
        trained.append(f"{of_method[0].trained:,}")
    header = [header[0], "seeds", *header[1:], "trained"]
    joined = zip(rows, seeds, trained, strict=True)
    return [header, *([row[0], count, *row[1:], size] for row, count, size in joined)]


Shown = Callable[[Sequence[Scored], str, str, Measure], str]


def _cells(
    runs: Sequence[Scored],
    regime: str,
    measures: Sequence[Measure],
    shown: Shown,
    without: Sequence[str] = (),
) -> list[list[str]]:
    rows = [["", *(measure.title for measure in measures)]]
    for name in names(runs, regime):
        if name not in without:
            cells = (shown(runs, name, regime, measure) for measure in measures)
            rows.append([find(name).title, *cells])
    return rows


def names(runs: Sequence[Scored], regime: str) -> list[str]:
    """Returns the methods and variants that have runs under a regime, in the table's order."""
    found = {run.method for run in runs if run.regime in ("", regime)}
    return sorted(found, key=order)


def _estimate(runs: Sequence[Scored], method: str, regime: str, measure: Measure) -> str:
    found = results.estimate(results.of(runs, method, regime), measure)
    return _shown(found, measure)


def _difference(runs: Sequence[Scored], method: str, regime: str, measure: Measure) -> str:
    return _shown(results.difference(runs, method, regime, measure), measure, sign="+")


def _mean(runs: Sequence[Scored], method: str, regime: str, measure: Measure) -> str:
    found = results.estimate(results.of(runs, method, regime), measure)
    return _shown(Estimate(found.mean, math.nan, math.nan, found.runs), measure)


def _shown(found: Estimate, measure: Measure, sign: str = "") -> str:
    """Returns "62.1 ±3.2", "62.1 [57.3, 66.9]" where the interval is over questions, or "-".

    A difference has both, where it has.
    """
    digits = 1 if measure.scale == 100 else 2

    def number(value: float, plus: str = sign) -> str:
        return f"{measure.scale * value:{plus}z.{digits}f}"  # z: no -0.0

    if math.isnan(found.mean):
        return NOTHING
    told, ends = number(found.mean), found.questions
    if not math.isnan(found.low) and found.runs > 1:
        told += f" ±{number(found.high - found.mean, '')}"
    elif not math.isnan(found.low):
        ends = (found.low, found.high)
    return f"{told} [{', '.join(map(number, ends))}]" if ends else told


def as_json(
    runs: Sequence[Scored], settings: ExperimentSettings, missing: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the settings, every run's scores, and by regime and method what the tables say."""
    return {
        "settings": plan.described(settings),
        "missing": dict(missing),
        "table": {
            regime: {name: _row(runs, name, regime) for name in names(runs, regime)}
            for regime in regimes(runs)
        },
        "runs": [run.plain() for run in runs],
    }


def _row(runs: Sequence[Scored], method: str, regime: str) -> dict[str, Any]:
    of_method = results.of(runs, method, regime)
    rows = {
        (task, row): None for run in of_method for task in run.scores for row in run.scores[task]
    }
    scores = {}
    for measure in (Measure(row, task, row) for task, row in rows):
        found = results.estimate(of_method, measure)
        against = results.difference(runs, method, regime, measure)
        if not math.isnan(found.mean):
            entry = {**_plain(found, measure), "against_reference": _plain(against, measure)}
            scores.setdefault(measure.task, {})[measure.row] = entry
    return {
        "title": find(method).title,
        "seeds": [run.seed for run in of_method],
        "trained": of_method[0].trained,
        "scores": scores,
    }


def _plain(found: Estimate, measure: Measure) -> dict[str, Any]:
    """Returns an estimate for JSON; "over" says what its interval is over, null where it has none.

    A difference has another interval over the questions, where it is known.
    """
    mean, *ends = (_rounded(value) for value in (found.mean, found.low, found.high))
    alone = OVER.get(measure.row, "questions")
    over = None if ends[0] is None else "seeds" if found.runs > 1 else alone
    told = {"mean": mean, "interval95": ends, "over": over, "seeds": found.runs}
    if found.questions:
        told["interval95_questions"] = [_rounded(end) for end in found.questions]
    return told


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)
