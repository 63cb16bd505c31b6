"""Likelihood measures of any LLM: perplexity of prose, and multiple choice without examples.

Nothing is generated, so models can be measured that no task was written for. Text is scored as it
is, without a chat template: of each passage the first token is context and all others count,

    perplexity = exp(nats / tokens)        bits per byte = nats / ln 2 / bytes

over all passages; bits per byte compare models whose tokenizers differ. A question is put through
the chat template, and each of its choices is scored as the answer (without the end of turn): the
most likely one counts. The row "per token" counts the highest mean log-likelihood per token
instead, which does not favor short choices.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np
import tqdm

from wings_jax import errors
from wings_jax.errors import UserError
from wings_jax.evaluation import scoring
from wings_jax.evaluation.everyday import ALL, PER_TOKEN, ChoiceQuestion
from wings_jax.evaluation.models import MEMORY_ADVICE, LazyModel, open_generator
from wings_jax.evaluation.prose import Text
from wings_jax.evaluation.scoring import PairedScore
from wings_jax.formatting import Interval
from wings_jax.inference.generator import Generator
from wings_jax.inference.likelihood import Likelihood
from wings_jax.inference.prompts import Request

RESAMPLES, SEED = 1000, 0  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class TextLikelihood:
    """The likelihood of n passages under a model."""

    # f64[n]: negative log-likelihood of each passage's scored tokens, natural logarithm.
    nats: np.ndarray
    # i64[n]: number of scored tokens.
    tokens: np.ndarray
    # i64[n]: UTF-8 bytes of the scored tokens.
    bytes: np.ndarray

    @property
    def nats_per_token(self) -> float:
        """Returns the mean over all tokens."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Returns exp(nats per token)."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Returns the mean number of bits over the bytes of the scored tokens."""
        return float(self.nats.sum() / self.bytes.sum() / math.log(2))

    @property
    def interval(self) -> Interval | None:
        """Returns the 95 % interval of the perplexity; None for a single passage.

        It is a percentile bootstrap over passages, as tokens of one passage are not independent.
        """
        return self._bootstrap(self.nats)

    def ratio(self, before: TextLikelihood) -> tuple[float, Interval | None] | None:
        """Returns the ratio of this perplexity to another's, and its interval over passages.

        None where the tokenizers differ: the perplexities are then of different tokens.
        """
        if not np.array_equal(self.tokens, before.tokens):
            return None
        return self.perplexity / before.perplexity, self._bootstrap(self.nats - before.nats)

    def _bootstrap(self, nats: np.ndarray) -> Interval | None:
        """Returns the 95 % interval of exp(sum of nats / sum of tokens) over passages."""
        if len(nats) < 2:
            return None

        from scipy import stats  # takes a second to import

        # Passages are drawn with replacement, together with their numbers of tokens.
        interval = stats.bootstrap(
            (nats, self.tokens),
            lambda nats, tokens, axis: nats.sum(axis) / tokens.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
        return math.exp(interval.low), math.exp(interval.high)


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


def measure_language(
    model: LazyModel, text: Text, questions: Sequence[ChoiceQuestion], rows: int
) -> LanguageResult:
    """Returns one model's likelihoods of the text and of the choices, `rows` at a time.

    Raises:
      UserError: a question or a passage does not fit the model.
    """
    started = time.perf_counter()
    generator = open_generator(model, rows=rows)

    with errors.full_memory(MEMORY_ADVICE):
        likelihood = measure_perplexity(generator, text.passages, f"{model.name}: text")
        decisions = choose_answers(generator, questions, f"{model.name}: choices")

    seconds = time.perf_counter() - started
    return LanguageResult(model.name, model.origin, model.step, likelihood, decisions, seconds)


def measure_perplexity(
    generator: Generator, passages: Sequence[str], title: str = ""
) -> TextLikelihood:
    """Returns the likelihood of the passages. Raises UserError if one is less than two tokens."""
    likelihoods: list[Likelihood] = []
    batch_size, processor = generator.options.rows, generator.processor

    # The bar is shown on terminals only.
    with tqdm.tqdm(total=len(passages), desc=title, disable=None) as progress:
        for first in range(0, len(passages), batch_size):
            batch = passages[first : first + batch_size]
            likelihoods += generator.score_text(batch)
            progress.update(len(batch))

    # The first token is context: its bytes do not count.
    context_bytes = [
        len(processor.decode(processor.windows(text)[0][:1]).encode()) for text in passages
    ]
    passage_bytes = [len(text.encode()) for text in passages]
    return TextLikelihood(
        nats=np.array([-likelihood.logprob for likelihood in likelihoods]),
        tokens=np.array([likelihood.tokens for likelihood in likelihoods]),
        bytes=np.subtract(passage_bytes, context_bytes),
    )


def choose_answers(
    generator: Generator, questions: Sequence[ChoiceQuestion], title: str = ""
) -> list[Decision]:
    """Returns a model's decisions. Raises UserError naming a question that does not fit."""
    # They arrive in the order in which they are done.
    likelihoods: list[Sequence[Likelihood]] = [()] * len(questions)
    requests = [(Request(question.question), question.choices) for question in questions]

    scores = generator.scores(requests, with_end=False)
    for index, scored in tqdm.tqdm(scores, total=len(questions), desc=title, disable=None):
        if isinstance(scored, UserError):
            raise UserError(f"question {questions[index].id}: {scored}") from scored
        likelihoods[index] = scored

    return [Decision(*pair) for pair in zip(questions, likelihoods, strict=True)]


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
