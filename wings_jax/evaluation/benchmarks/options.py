"""The options of `python -m wings_jax.evaluate`, beside the models and the benchmarks."""

from __future__ import annotations

import dataclasses
import pathlib

from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks.record import PROTOCOLS
from wings_jax.inference.shards import Shard


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """The options of a command, beside the models and the benchmarks."""

    # Directory with the files of the data sets.
    data_root: pathlib.Path | None
    # Directory for results, None for the terminal only; such a run cannot be resumed.
    out: pathlib.Path | None = None
    # Protocols, None for all of each benchmark.
    protocols: tuple[str, ...] | None = None
    # Solved examples, None for the number of each benchmark.
    shots: int | None = None
    # About how many items of each benchmark, None for all.
    limit: int | None = None
    # How many prompts are computed at once.
    rows: int = 64
    # Which part of the batches this process computes.
    shard: Shard = dataclasses.field(default_factory=Shard)
    # PNG with some questions about images and the last model's answers, None for none.
    figure: pathlib.Path | None = None
    # Text of the user for `language_text`, None for the package's.
    text: pathlib.Path | None = None
    # Questions of the user for `language_choices`, None for the package's.
    choices: pathlib.Path | None = None


def parse_protocols(text: str) -> tuple[str, ...]:
    """Returns the protocols of a comma-separated list. Raises UserError.

    >>> parse_protocols("ppl, generate")
    ('ppl', 'generate')
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        shown = unknown[0] if unknown else text
        raise UserError(f"--protocols: no protocol {shown!r}; there are {', '.join(PROTOCOLS)}")
    return names
