"""Scores of evaluation reports (`report.json` of wings_jax.evaluate), to plot shift against."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
    # A path may hold characters that a terminal cannot show.
    shown = ascii(file)[1:-1]
    try:
        report = json.loads(pathlib.Path(file).read_text(encoding="utf-8-sig"))
        return {str(model["name"]): _model_scores(model) for model in report["models"]}
    except OSError as error:
        raise UserError(f"--scores: {shown}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if "\0" in file:
            raise UserError(f"--scores: {shown}: null character in a path") from error
        raise UserError(f"--scores: {shown} is not a report of wings_jax.evaluate") from error


def _model_scores(model: Mapping[str, Any]) -> dict[str, Score]:
    """Raises LookupError, TypeError, AttributeError or ValueError for another format."""
    scores = {}

    for task, rows in model["tasks"].items():
        for row, score in rows.items():
            low, high = score["interval95"]
            percent = [100.0 * float(value) for value in (score["accuracy"], low, high)]
            if not np.isfinite(percent).all():
                raise ValueError(f"{task}/{row}: not a number")

            scores[f"{task}/{row}"] = (percent[0], percent[1], percent[2])
    return scores
