"""The scores of runs: gathered from the files of their jobs, written, and read again.

A run's scores are {task: {row: {"mean": share, "interval95": [low, high], "n": count}}}, with the
interval over the questions; the attention shift is in task "laws", and is not a share.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax import checkpoint, files, formatting, tree
from wings_jax.forgetting import methods
from wings_jax.forgetting.methods import BASE, REGIMES, Measure
from wings_jax.forgetting.plan import ExperimentRun
from wings_jax.forgetting.settings import reading

Scores = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class RunScores:
    """The scores of a run that is done."""

    # Method or variant.
    method: str
    # Name of the regime, "" for the base.
    regime: str
    # Seed of its trainings.
    seed: int
    # Number of parameters that its last stage trained.
    trained: int
    # Wall-clock seconds of its jobs, with those of a shared first stage.
    seconds: float
    # Task -> row -> score.
    scores: Scores
    # Its directory, None for scores that are not from files.
    directory: pathlib.Path | None = dataclasses.field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns the scores for JSON, without the directory."""
        return {key: value for key, value in vars(self).items() if key != "directory"}

    def value(self, measure: Measure) -> float:
        """Returns the score of a measure, NaN where there is none."""
        value = self.scores.get(measure.task, {}).get(measure.row, {}).get("mean")
        return math.nan if value is None else value


def write_scores(run: ExperimentRun) -> None:
    """Gathers the results of a run's jobs into its `run.json`."""
    readers = {
        run.directory / "scores" / "report.json": _task_scores,
        run.directory / "laws" / "laws_summary.json": _shift_scores,
    }
    language_report = run.directory / "language" / "language.json"
    if language_report.exists():  # bases without English have none
        readers[language_report] = _language_scores

    scores: dict[str, Any] = {}
    for path, read_report in readers.items():
        with reading(path):
            (model,) = json.loads(path.read_text(encoding="utf-8"))["models"]
            scores |= read_report(model)

    run_scores = RunScores(
        method=run.method,
        regime=run.regime,
        seed=run.seed,
        trained=count_trained_parameters(run.directory),
        seconds=round(sum(job.seconds or 0 for job in run.jobs), 1),
        scores=scores,
    )
    files.write_text(run.scores_file, formatting.json_text(run_scores.to_dict()))


def _score(mean: float, interval: Sequence[float] | None, count: int) -> dict[str, Any]:
    return {"mean": mean, "interval95": interval, "n": count}


def _task_scores(model: Mapping[str, Any]) -> Scores:
    """Returns the scores of a model in report.json."""
    return {
        task_name: {
            row_name: _score(score["accuracy"], score["interval95"], score["total"])
            for row_name, score in rows.items()
        }
        for task_name, rows in model["tasks"].items()
    }


def _language_scores(model: Mapping[str, Any]) -> Scores:
    """Returns the scores of a model in language.json."""
    # Perplexity first, as in the table.
    text = model["perplexity"]
    rows = {"perplexity": _score(text["value"], text["interval95"], text["passages"])}
    for row_name, score in model["choices"].items():
        rows[row_name] = _score(score["accuracy"], score["interval95"], score["total"])
    return {"language": rows}


def _shift_scores(model: Mapping[str, Any]) -> Scores:
    """Returns the attention shifts of a model in laws_summary.json."""
    variant = model["variant"]
    counts = {"variant": variant, "n": model["n_used"], "n_skipped": model["n_skipped"]}

    # The shift of the queries behind the image alone.
    after = dict(model["shift_by_rows"]["after"])
    after |= {"variant": variant | {"rows": "after"}, "n": after.pop("n_used")}
    return {"laws": {"shift": {**model["shift"], **counts}, "shift_after": after}}


def count_trained_parameters(workdir: pathlib.Path) -> int:
    """Returns the number of parameters that the run of a workdir trained."""
    step_directory = checkpoint.find_step(workdir, flag="--out")
    config, _, _ = checkpoint.read_meta(step_directory)
    if not config.steps:
        return 0

    shapes = checkpoint.read_shapes(step_directory)
    optimizer = config.optimizer
    # A group with learning rate 0 is frozen.
    groups = tree.match_table(shapes, optimizer.groups, name="config.optimizer.groups")
    trained = {
        path: shape for path, shape in shapes.items() if optimizer.learning_rates[groups[path]] > 0
    }
    return tree.count(trained)


def read_scores(out: pathlib.Path) -> list[RunScores]:
    """Returns all runs that are done, in the order of regimes, methods and seeds."""
    paths = [*out.glob(f"{BASE}/run.json"), *out.glob("*/*/seed-*/run.json")]
    runs = []
    for path in paths:
        with reading(path):
            content = json.loads(path.read_text(encoding="utf-8"))
            runs.append(RunScores(**content, directory=path.parent))
            # Raises where a score is not an object.
            for rows in runs[-1].scores.values():
                [score.get("mean") for score in rows.values()]

    # Runs of methods that no longer exist are ignored.
    regimes = ["", *REGIMES]
    known_runs = [run for run in runs if methods.is_known(run.method) and run.regime in regimes]

    def order(run: RunScores) -> tuple:
        return regimes.index(run.regime), methods.table_order(run.method), run.seed

    return sorted(known_runs, key=order)


def select_runs(runs: Sequence[RunScores], method: str, regime: str) -> list[RunScores]:
    """Returns the runs of a method under a regime; those of the base count under each."""
    return [run for run in runs if run.method == method and run.regime in ("", regime)]
