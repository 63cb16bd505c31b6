"""What an LLM knows of language, by likelihood: perplexity of plain text, and multiple choice.

Nothing is generated, so this measures models that no task was written for. Text is read as it is,
without a template: of each passage the first token is context and all others count,

    perplexity = exp(nats / tokens)        bits per byte = nats / ln 2 / bytes

over all passages; bits per byte compare models whose tokenizers differ. A question is put through
the chat template, and each of its choices is scored as the answer (without the end of turn): the
likeliest one counts. The row "per token" counts the highest mean log-likelihood per token instead,
which does not favour short choices.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np
import tqdm

from wings_jax.errors import UserError
from wings_jax.evaluation.everyday import ALL, PER_TOKEN, Item
from wings_jax.evaluation.models import LazyModel
from wings_jax.evaluation.prose import Text
from wings_jax.evaluation.scoring import Paired
from wings_jax.inference.generator import Generator
from wings_jax.inference.likelihood import Likelihood
from wings_jax.inference.prompts import Request

RESAMPLES, SEED = 1000, 0  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class TextLikelihood:
    """Passages under a model: f64[n] nats, i64[n] tokens and i64[n] bytes that were scored."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @property
    def nats_per_token(self) -> float:
        """Returns the mean over all tokens."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Returns exp of it."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Returns the mean over the UTF-8 bytes of the tokens that count."""
        return float(self.nats.sum() / self.bytes.sum() / math.log(2))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Returns the 95 % interval of the perplexity; None for a single passage.

        It is a percentile bootstrap over passages, as tokens of one passage are no sample.
        """
        return self._bootstrap(self.nats)

    def ratio(self, before: TextLikelihood) -> tuple[float, tuple[float, float] | None] | None:
        """Returns this perplexity by another's, and its interval by the same passages.

        None where the tokenizers differ: perplexities are then of different tokens.
        """
        if not np.array_equal(self.tokens, before.tokens):
            return None
        return self.perplexity / before.perplexity, self._bootstrap(self.nats - before.nats)

    def _bootstrap(self, nats: np.ndarray) -> tuple[float, float] | None:
        count, rng = len(nats), np.random.default_rng(SEED)
        if count < 2:
            return None
        drawn = (rng.integers(0, count, count) for _ in range(RESAMPLES))
        means = [nats[chosen].sum() / self.tokens[chosen].sum() for chosen in drawn]
        low, high = np.exp(np.percentile(means, (2.5, 97.5)))
        return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Decision:
    """A question and how likely each of its choices is."""

    item: Item
    found: Sequence[Likelihood]

    @property
    def chosen(self) -> int:
        """Returns the choice of the highest log-likelihood."""
        return int(np.argmax([one.logprob for one in self.found]))

    @property
    def chosen_per_token(self) -> int:
        """Returns the choice of the highest mean log-likelihood per token."""
        return int(np.argmax([one.logprob / max(one.tokens, 1) for one in self.found]))


@dataclasses.dataclass(frozen=True)
class LanguageResult:
    """One model's numbers; `step` as in `report.Result`."""

    name: str
    origin: str
    step: int | None
    reading: TextLikelihood
    decisions: Sequence[Decision]
    seconds: float


def ask(named: LazyModel, text: Text, items: Sequence[Item], rows: int) -> LanguageResult:
    """Returns what one model makes of the text and of the questions, `rows` at a time.

    Raises:
      UserError: a question or passage cannot be read by it.
    """
    started = time.perf_counter()
    generator = Generator.from_checkpoint(named.open(), rows=rows)
    reading = measure_perplexity(generator, text.passages, f"{named.name}: text")
    decisions = choose_answers(generator, items, f"{named.name}: choices")
    seconds = time.perf_counter() - started
    return LanguageResult(named.name, named.origin, named.step, reading, decisions, seconds)


def measure_perplexity(
    generator: Generator, passages: Sequence[str], title: str = ""
) -> TextLikelihood:
    """Returns the passages under a model. Raises UserError if one is less than two tokens."""
    found: list[Likelihood] = []
    rows, processor = generator.options.rows, generator.processor
    with tqdm.tqdm(total=len(passages), desc=title, disable=None) as bar:
        for first in range(0, len(passages), rows):
            some = passages[first : first + rows]
            found += generator.score_text(some)
            bar.update(len(some))
    context = [len(processor.decode(processor.windows(text)[0][:1]).encode()) for text in passages]
    sizes = np.array([len(text.encode()) for text in passages])
    return TextLikelihood(
        np.array([-one.logprob for one in found]),
        np.array([one.tokens for one in found]),
        sizes - context,
    )


def choose_answers(generator: Generator, items: Sequence[Item], title: str = "") -> list[Decision]:
    """Returns a model's decisions. Raises UserError naming the question that it cannot read."""
    found: list[Sequence[Likelihood]] = [()] * len(items)
    asked = [(Request(item.question), item.choices) for item in items]
    scores = generator.scores(asked, with_end=False)
    for index, scored in tqdm.tqdm(scores, total=len(items), desc=title, disable=None):
        if isinstance(scored, UserError):
            raise UserError(f"question {items[index].id}: {scored}") from scored
        found[index] = scored
    return [Decision(item, scored) for item, scored in zip(items, found, strict=True)]


def outcomes(decisions: Sequence[Decision]) -> dict[str, list[bool]]:
    """Returns row -> right or wrong, in order: each kind, then all questions in both ways."""
    found: dict[str, list[bool]] = {one.item.kind: [] for one in decisions if one.item.kind}
    for one in decisions:
        if one.item.kind:
            found[one.item.kind].append(one.chosen == one.item.answer)
    found[ALL] = [one.chosen == one.item.answer for one in decisions]
    found[PER_TOKEN] = [one.chosen_per_token == one.item.answer for one in decisions]
    return found


def changes(before: LanguageResult, after: LanguageResult) -> dict[str, Paired]:
    """Returns row -> both models' decisions compared."""
    now = outcomes(after.decisions)
    paired = {}
    for row, was in outcomes(before.decisions).items():
        pairs = list(zip(was, now[row], strict=True))
        cells = ((True, True), (True, False), (False, True), (False, False))
        paired[row] = Paired(*(pairs.count(cell) for cell in cells))
    return paired
