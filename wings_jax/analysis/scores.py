"""Scores of evaluation reports (`report.json` of wings_jax.evaluate), to plot shift against."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax.errors import UserError

Score = tuple[float, float, float]  # accuracy in %, and the ends of its 95 % interval


def read_scores(reports: Sequence[str], score: str) -> dict[str, Score]:
    """Returns model -> score "TASK/ROW", from reports given as [NAME=]FILE.

    NAME selects a model of a report with several, and renames the model of a report with one.

    Raises:
      UserError: a report cannot be read, or has no such model or score.
    """
    selected = {}
    for text in reports:
        name, _, file = text.rpartition("=")
        by_model = _read_report(file)

        # The name selects one of several models; a single model is renamed.
        if name and len(by_model) > 1:
            by_model = {name: by_model[name]} if name in by_model else {}
        if not by_model:
            raise UserError(f"--scores: {file} has no model called {name!r}")

        for model, scores in by_model.items():
            if score not in scores:
                raise UserError(f"--scores: {file}: {model} has no score {score!r}")
            selected[name or model] = scores[score]

    return selected


def _read_report(file: str) -> dict[str, dict[str, Score]]:
    """Returns model -> "task/row" -> score, of one report."""
    try:
        report = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
        return {str(model["name"]): _model_scores(model) for model in report["models"]}
    except OSError as error:
        raise UserError(f"--scores: {file}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--scores: {file} is not a report of wings_jax.evaluate") from error


def _model_scores(model: Mapping[str, Any]) -> dict[str, Score]:
    scores = {}
    for task, rows in model["tasks"].items():
        for row, score in rows.items():
            low, high = score["interval95"]
            scores[f"{task}/{row}"] = (100 * score["accuracy"], 100 * low, 100 * high)
    return scores
