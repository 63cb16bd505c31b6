"""The likelihood of plain text: perplexity and bits per byte.

Of each passage the first token is context and all others count,

    perplexity = exp(nats / tokens)        bits per byte = nats / ln 2 / bytes

over all passages; bits per byte compare models whose tokenizers differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wings_jax import formatting
from wings_jax.evaluation.benchmarks import passes
from wings_jax.evaluation.benchmarks.passes import PERPLEXITY
from wings_jax.evaluation.benchmarks.record import Item
from wings_jax.formatting import Interval
from wings_jax.inference.generator import Generator
from wings_jax.inference.likelihood import Likelihood
from wings_jax.inference.shards import Shard

if TYPE_CHECKING:
    from wings_jax.evaluation.benchmarks.runner import EntryStore

RESAMPLES, SEED = 1000, 0  # of the bootstrap
DIGITS = 6  # of log-probabilities in files
TEXT_HEADING = ("", "n", "perplexity before", "after", "ratio", "bits per byte before", "after")
TEXT_LEGEND = (
    "Perplexity of plain text; the ratio after / before with its 95 % interval (bootstrap over "
    "passages, paired)."
)


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

    @classmethod
    def from_lines(cls, lines: Sequence[Mapping[str, Any]]) -> TextLikelihood:
        """Returns the likelihood of the passages of a result."""
        entries = [line[PERPLEXITY] for line in lines]
        return cls(
            nats=np.array([-entry["logprob"] for entry in entries]),
            tokens=np.array([entry["tokens"] for entry in entries]),
            bytes=np.array([entry["bytes"] for entry in entries]),
        )

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
class TextChange:
    """The change of a text's likelihood between two models."""

    # Name of the task.
    task: str
    # Under the first model.
    before: TextLikelihood
    # Under the second model.
    after: TextLikelihood

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as they are written to JSON; without a ratio for other tokens."""
        ratio, interval = self.after.ratio(self.before) or (None, None)
        return {
            "task": self.task,
            "protocol": PERPLEXITY,
            "n": len(self.before.nats),
            "before": formatting.round_for_json(self.before.perplexity),
            "after": formatting.round_for_json(self.after.perplexity),
            "ratio": formatting.round_for_json(ratio),
            "interval95": formatting.round_interval(interval),
            "bits_per_byte_before": formatting.round_for_json(self.before.bits_per_byte),
            "bits_per_byte_after": formatting.round_for_json(self.after.bits_per_byte),
        }

    def cells(self) -> tuple[str, ...]:
        """Returns the row of a table under `TEXT_HEADING`."""
        ratio = self.after.ratio(self.before)
        return (
            self.task,
            str(len(self.before.nats)),
            f"{self.before.perplexity:.3f}",
            f"{self.after.perplexity:.3f}",
            formatting.format_estimate(*ratio, digits=4) if ratio else "(other tokens)",
            f"{self.before.bits_per_byte:.4f}",
            f"{self.after.bits_per_byte:.4f}",
        )


def run_text(
    generator: Generator,
    items: Sequence[Item],
    pass_number: int,
    store: EntryStore,
    *,
    title: str,
    shard: Shard,
) -> None:
    """Adds an entry per passage, as `runner.run_task` does of other passes.

    Raises:
      UserError: a passage has less than two tokens.
    """
    import tqdm  # not needed for --help

    rows = generator.options.rows
    with tqdm.tqdm(total=len(items), desc=title, disable=None) as progress:
        for index, first in enumerate(range(0, len(items), rows)):
            batch = range(first, min(first + rows, len(items)))
            progress.update(len(batch))
            numbers = [passes.entry_number(pass_number, len(items), i, 0) for i in batch]
            is_done = all(number in store.answers for number in numbers)
            if is_done or not shard.has_piece(index):
                continue

            texts = [items[i].question for i in batch]
            scored = generator.score_text(texts)
            for number, text, likelihood in zip(numbers, texts, scored, strict=True):
                store.add(number, text_entry(generator, text, likelihood))


def text_entry(generator: Generator, text: str, likelihood: Likelihood) -> dict[str, Any]:
    """Returns the entry of one passage; the bytes of its first token do not count."""
    processor = generator.processor
    context = processor.decode(processor.windows(text)[0][:1])
    return {
        "logprob": round(likelihood.logprob, DIGITS),
        "tokens": likelihood.tokens,
        "bytes": len(text.encode()) - len(context.encode()),
    }
