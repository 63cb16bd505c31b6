"""Scores of runs, and what they are by method: means over seeds with 95 % intervals.

A run's scores are {task: {row: {"mean": share, "interval95": [low, high], "n": count}}}, the
interval over the questions; the attention shift stands among them as task "laws", and is no share.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from wings_jax import checkpoint, files, tree
from wings_jax.evaluation import scoring
from wings_jax.forgetting import methods
from wings_jax.forgetting.methods import BASE, REFERENCE, REGIMES, Measure
from wings_jax.forgetting.plan import ExperimentRun

Scores = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Scored:
    """A run that is done.

    trained  parameters that its last stage trained
    seconds  that its jobs took, those of a shared first stage too
    folder   where it is, None for one that was made up
    """

    method: str
    regime: str
    seed: int
    trained: int
    seconds: float
    scores: Scores
    folder: pathlib.Path | None = dataclasses.field(default=None, compare=False)

    def plain(self) -> dict[str, Any]:
        """Returns it for JSON, wherever it is."""
        return {key: value for key, value in vars(self).items() if key != "folder"}

    def value(self, measure: Measure) -> float:
        """Returns its score, NaN where there is none."""
        found = self.scores.get(measure.task, {}).get(measure.row, {}).get("mean")
        return math.nan if found is None else found


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval, over `runs` seeds; over the questions if there is one seed.

    questions  the 95 % interval of a difference over the questions, None where it is not known
    """

    mean: float
    low: float
    high: float
    runs: int
    questions: tuple[float, float] | None = None


NONE = Estimate(math.nan, math.nan, math.nan, 0)


def write_scores(run: ExperimentRun) -> None:
    """Gathers what the jobs of a run found into its `run.json`."""
    scored = Scored(
        method=run.method,
        regime=run.regime,
        seed=run.seed,
        trained=trained_parameters(run.folder),
        seconds=round(sum(job.seconds or 0 for job in run.jobs), 1),
        scores={
            **_answers(run.folder / "scores"),
            **_language(run.folder / "language"),
            "laws": _shift(run.folder / "laws"),
        },
    )
    files.write_text(run.file, json.dumps(scored.plain(), indent=1) + "\n")


def _answers(folder: pathlib.Path) -> Scores:
    (model,) = json.loads((folder / "report.json").read_text(encoding="utf-8"))["models"]
    return {
        task: {
            row: {"mean": score["accuracy"], "interval95": score["interval95"], "n": score["total"]}
            for row, score in rows.items()
        }
        for task, rows in model["tasks"].items()
    }


def _shift(folder: pathlib.Path) -> Mapping[str, Mapping[str, Any]]:
    text = (folder / "laws_summary.json").read_text(encoding="utf-8")
    (model,) = json.loads(text)["models"]
    told = {"variant": model["variant"], "n": model["n_used"], "n_skipped": model["n_skipped"]}
    after = dict(model["shift_by_rows"]["after"])
    rest = {"variant": model["variant"] | {"rows": "after"}, "n": after.pop("n_used")}
    return {"shift": {**model["shift"], **told}, "shift_after": {**after, **rest}}


def _language(folder: pathlib.Path) -> Scores:
    """Returns the scores of the likelihood tasks, where they were asked."""
    file = folder / "language.json"
    if not file.exists():
        return {}
    (model,) = json.loads(file.read_text(encoding="utf-8"))["models"]
    perplexity = model["perplexity"]
    ends, count = perplexity["interval95"], perplexity["passages"]
    told = {"perplexity": {"mean": perplexity["value"], "interval95": ends, "n": count}}
    for row, score in model["choices"].items():
        ends = score["interval95"]
        told[row] = {"mean": score["accuracy"], "interval95": ends, "n": score["total"]}
    return {"language": told}


def trained_parameters(workdir: pathlib.Path) -> int:
    """Returns how many parameters the run of a workdir trained."""
    step = checkpoint.find_step(workdir, flag="--out")
    config, _, _ = checkpoint.read_meta(step)
    if not config.steps:
        return 0
    shapes = checkpoint.read_shapes(step)
    optimizer = config.optimizer
    groups = tree.match_table(shapes, optimizer.groups, name="config.optimizer.groups")
    chosen = {path: s for path, s in shapes.items() if optimizer.learning_rates[groups[path]]}
    return tree.count(chosen)


def read_scores(out: pathlib.Path) -> list[Scored]:
    """Returns all runs that are done, in the order of methods, regimes and seeds."""
    found = [
        Scored(**json.loads(file.read_text(encoding="utf-8")), folder=file.parent)
        for file in (*out.glob(f"{BASE}/run.json"), *out.glob("*/*/seed-*/run.json"))
    ]
    regimes = ["", *REGIMES]
    known = [run for run in found if methods.is_known(run.method) and run.regime in regimes]
    return sorted(
        known, key=lambda run: (regimes.index(run.regime), methods.order(run.method), run.seed)
    )


def of(runs: Sequence[Scored], method: str, regime: str) -> list[Scored]:
    """Returns the runs of a method under a regime; those of the base are the same under each."""
    return [run for run in runs if run.method == method and run.regime in ("", regime)]


def estimate(runs: Sequence[Scored], measure: Measure) -> Estimate:
    """Returns the mean over runs of different seeds, with its interval.

    With several it is Student's t over the seeds, with one the interval that the run itself has
    over its questions.
    """
    values = [run.value(measure) for run in runs]
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return NONE
    if len(values) > 1:
        return over_seeds(values)
    (ends,) = (
        run.scores[measure.task][measure.row]["interval95"] or (None, None)
        for run in runs
        if not math.isnan(run.value(measure))
    )
    return Estimate(values[0], *(math.nan if end is None else end for end in ends), 1)


def over_seeds(values: Sequence[float]) -> Estimate:
    """Returns the mean of two values or more, with the 95 % interval of Student's t."""
    mean, count = statistics.mean(values), len(values)
    half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def difference(runs: Sequence[Scored], method: str, regime: str, measure: Measure) -> Estimate:
    """Returns how much higher a method is than the reference, paired by seed.

    One seed gives a difference without an interval over seeds.
    """
    theirs = {run.seed: run for run in of(runs, REFERENCE, regime)}
    pairs = [(run, theirs[run.seed]) for run in of(runs, method, regime) if run.seed in theirs]
    pairs = [(a, b) for a, b in pairs if not math.isnan(a.value(measure) - b.value(measure))]
    found = [a.value(measure) - b.value(measure) for a, b in pairs]
    if not found:
        return NONE
    seeds = over_seeds(found) if len(found) > 1 else Estimate(found[0], math.nan, math.nan, 1)
    return dataclasses.replace(seeds, questions=_over_questions(pairs, measure))


def _over_questions(
    pairs: Sequence[tuple[Scored, Scored]], measure: Measure
) -> tuple[float, float] | None:
    """Returns the 95 % interval of a mean difference over the questions, for these trainings.

    Questions of the same words and answer count together (cluster-robust variance, normal), as
    they are right or wrong together. None where answers are missing or the questions differ.
    """
    sides = [[_graded(run.folder, measure.task, measure.row) for run in pair] for pair in pairs]
    asked = {side and side[0] for pair in sides for side in pair}
    if len(asked) != 1 or not (words := asked.pop()):
        return None
    by_question = np.mean([np.subtract(mine[1], theirs[1]) for mine, theirs in sides], axis=0)
    mean = by_question.mean()
    _, group = np.unique(words, return_inverse=True)
    sums = np.bincount(group, by_question - mean)
    if len(sums) < 2:
        return None
    half = scoring.Z * math.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(words)
    return mean - half, mean + half


@functools.cache
def _graded(
    folder: pathlib.Path | None, task: str, row: str
) -> tuple[tuple[str, ...], tuple[float, ...]] | None:
    """Returns a run's questions in a row of a task, with the true answers, and 1.0 where right."""
    files = list((folder / "scores").glob("answers-*.jsonl")) if folder else []
    if len(files) != 1:
        return None
    lines = map(json.loads, files[0].read_text(encoding="utf-8").splitlines())
    chosen = [x for x in lines if x["task"] == task and row in x.get("rows", ())]
    words = tuple(f"{line['question']}\n{line['truth']}" for line in chosen)
    return words, tuple(float(line["right"]) for line in chosen)
