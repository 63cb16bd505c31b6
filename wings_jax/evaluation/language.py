"""Likelihood measures of any LLM: perplexity of prose, and multiple choice without examples.

Nothing is generated, so models can be measured that no task was written for. Text is scored as it
is, without a chat template (`benchmarks.text_likelihood`). A question is put through the chat
template, and each of its choices is scored as the answer (without the end of turn): the most likely
one counts. The row "per token" counts the highest mean log-likelihood per token instead, which does
not favor short choices.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from wings_jax.evaluation import scoring
from wings_jax.evaluation.benchmarks import embedded
from wings_jax.evaluation.benchmarks.passes import PERPLEXITY
from wings_jax.evaluation.benchmarks.results import BenchmarkResult
from wings_jax.evaluation.benchmarks.runner import BenchmarkTask
from wings_jax.evaluation.benchmarks.text_likelihood import TextLikelihood
from wings_jax.evaluation.everyday import ALL, PER_TOKEN, ChoiceQuestion
from wings_jax.evaluation.prose import Text
from wings_jax.evaluation.scoring import PairedScore
from wings_jax.inference.likelihood import Likelihood

PROTOCOLS = ("ll", "ll_token")  # of the choices


@dataclasses.dataclass(frozen=True)
class Decision:
    """A question with the likelihoods of its choices."""

    # The question.
    question: ChoiceQuestion
    # Likelihood of each choice as the answer.
    likelihoods: Sequence[Likelihood]

    @property
    def chosen(self) -> int:
        """Returns the index of the choice with the highest log-likelihood."""
        return int(np.argmax([likelihood.logprob for likelihood in self.likelihoods]))

    @property
    def chosen_per_token(self) -> int:
        """Returns the index of the choice with the highest mean log-likelihood per token."""
        return int(
            np.argmax(
                [likelihood.logprob / max(likelihood.tokens, 1) for likelihood in self.likelihoods]
            )
        )

    @property
    def is_right(self) -> bool:
        """Returns whether the most likely choice is the right one."""
        return self.chosen == self.question.answer

    @property
    def is_right_per_token(self) -> bool:
        """Returns whether the choice that is most likely per token is the right one."""
        return self.chosen_per_token == self.question.answer


@dataclasses.dataclass(frozen=True)
class LanguageResult:
    """One model's likelihoods and decisions."""

    # Name of the model in tables and in the names of files.
    name: str
    # Directory or description of the model, for people.
    origin: str
    # Optimizer steps of its last stage, None for a base.
    step: int | None
    # Likelihood of the text.
    text: TextLikelihood
    # Decisions, in the order of the questions.
    decisions: Sequence[Decision]
    # Wall-clock seconds.
    seconds: float


def make_tasks(
    text: Text,
    questions: Sequence[ChoiceQuestion],
    text_file: pathlib.Path | None,
    choices: pathlib.Path | None,
) -> list[BenchmarkTask]:
    """Returns both measures as tasks of the benchmarks.

    Args:
      text_file: file of the text, None for the package's.
      choices: file of the questions, None for the package's.
    """
    text_data = embedded.text_data(text, text_file)
    choice_data = embedded.choice_data(questions, choices)
    benchmark = embedded.with_kinds(embedded.EMBEDDED[embedded.CHOICES], questions)
    return [
        BenchmarkTask(embedded.EMBEDDED[embedded.TEXT], text_data, (PERPLEXITY,), 0),
        BenchmarkTask(benchmark, choice_data, PROTOCOLS, 0),
    ]


def make_result(
    questions: Sequence[ChoiceQuestion], found: Sequence[BenchmarkResult]
) -> LanguageResult:
    """Returns the results of both tasks of one model together."""
    text, choices = found
    decisions = [
        Decision(question, [Likelihood(one[0], one[1], False) for one in line["ll"]["likelihoods"]])
        for question, line in zip(questions, choices.lines, strict=True)
    ]
    return LanguageResult(
        text.model,
        text.origin,
        text.step,
        TextLikelihood.from_lines(text.lines),
        decisions,
        text.seconds + choices.seconds,
    )


def right_by_row(decisions: Sequence[Decision]) -> dict[str, list[bool]]:
    """Returns row -> right or wrong, in order: each kind, then all questions in both ways."""
    rows: dict[str, list[bool]] = {}
    for decision in decisions:
        if decision.question.kind:
            rows.setdefault(decision.question.kind, []).append(decision.is_right)

    # The totals.
    rows[ALL] = [decision.is_right for decision in decisions]
    rows[PER_TOKEN] = [decision.is_right_per_token for decision in decisions]
    return rows


def paired_by_row(before: LanguageResult, after: LanguageResult) -> dict[str, PairedScore]:
    """Returns row -> paired score of both models' decisions."""
    after_rows = right_by_row(after.decisions)
    return {
        row_name: scoring.count_pairs(list(zip(right_before, after_rows[row_name], strict=True)))
        for row_name, right_before in right_by_row(before.decisions).items()
    }
