"""From likelihoods and generated texts of an item to its credits, by protocol. Pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wings_jax.evaluation.benchmarks import extraction
from wings_jax.evaluation.benchmarks.passes import GENERATE, EvaluationPass
from wings_jax.evaluation.benchmarks.record import Item

DIGITS = 6  # of log-probabilities in files


@dataclasses.dataclass(frozen=True)
class OptionLikelihood:
    """The likelihood of one option of an item."""

    # Sum over the continuation's tokens, in nats.
    logprob: float
    # Tokens of the continuation.
    tokens: int
    # Of the context after its first token, in nats; 0 without `ppl`, which needs it.
    context_logprob: float
    # Tokens of the context, the first included.
    context_tokens: int
    # Of the first token in which the options differ.
    first: float

    def to_list(self) -> list[float]:
        """Returns the fields as they are written to JSON."""
        return [
            round(value, DIGITS) if isinstance(value, float) else value
            for value in dataclasses.astuple(self)
        ]


def option_scores(
    protocol: str, likelihoods: Sequence[OptionLikelihood], answers: Sequence[str]
) -> np.ndarray:
    """Returns a score f64[options] of each option; the highest is chosen.

    Args:
      answers: the continuations without the delimiter before them.

    >>> long = OptionLikelihood(-6.0, 3, -9.0, 7, -1.0)
    >>> short = OptionLikelihood(-4.0, 1, -9.0, 7, -4.0)
    >>> [option_scores(name, [long, short], ["ab cd ef", "ab"]).argmax().item()
    ...  for name in ("ppl", "ll", "ll_bytes", "ll_token", "letter")]
    [0, 1, 0, 0, 0]
    """
    logprobs = np.array([one.logprob for one in likelihoods])
    if protocol == "ppl":
        # OpenCompass: mean cross-entropy of the whole string, over all of its tokens.
        whole = logprobs + [one.context_logprob for one in likelihoods]
        return whole / [one.tokens + one.context_tokens for one in likelihoods]
    if protocol == "letter":
        return np.array([one.first for one in likelihoods])

    # What a sum over tokens is divided by, so that long options are not at a disadvantage.
    divisors = {
        "ll": [1] * len(answers),
        "ll_chars": [len(answer) for answer in answers],
        "ll_bytes": [len(answer.encode()) for answer in answers],
        "ll_token": [one.tokens for one in likelihoods],
    }
    return logprobs / np.maximum(divisors[protocol], 1)


def judge_likelihoods(
    one: EvaluationPass,
    item: Item,
    likelihoods: Sequence[OptionLikelihood],
    answers: Sequence[str],
) -> dict[str, Any]:
    """Returns what is written about an item of a likelihood pass: likelihoods, chosen, credit."""
    # Of equal scores, the first option is chosen.
    chosen = {
        protocol: int(option_scores(protocol, likelihoods, answers).argmax())
        for protocol in one.protocols
    }

    has_answer = isinstance(item.answer, int)
    return {
        "likelihoods": [option.to_list() for option in likelihoods],
        "chosen": chosen,
        "credit": {
            protocol: float(index == item.answer) if has_answer else None
            for protocol, index in chosen.items()
        },
    }


def judge_generation(one: EvaluationPass, item: Item, text: str) -> dict[str, Any]:
    """Returns what is written about an item of a generation pass: text, what was found, credit."""
    judgment = extraction.judge_answer(one.prompt.extraction, item, text)
    return {
        "generated": text,
        "extracted": judgment.extracted,
        "credit": {GENERATE: None if item.answer is None else round(judgment.credit, DIGITS)},
    }


def failed_entry(one: EvaluationPass, reason: str) -> dict[str, Any]:
    """Returns what is written about an item that could not be asked: it is counted as wrong."""
    return {"error": reason, "credit": dict.fromkeys(one.protocols, 0.0)}


def merge_entries(item: Item, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the line of an item in the results, of the entries of all passes by their key."""
    line: dict[str, Any] = {"id": item.id, "group": item.group, "truth": item.answer}
    if item.cluster:
        line["cluster"] = item.cluster
    if item.rows:
        line |= {"rows": list(item.rows), "question": item.question}

    # Credits of all passes are together; what else a pass found is under its key.
    line["credit"] = {
        protocol: credit
        for entry in entries.values()
        for protocol, credit in entry["credit"].items()
    }

    for key, entry in entries.items():
        line[key] = {name: value for name, value in entry.items() if name != "credit"}
    return line
