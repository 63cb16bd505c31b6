"""Parts of a job that several processes compute, on one machine or several, each with its model."""

from __future__ import annotations

import dataclasses

from wings_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of a job that one of several processes computes.

    index  of this process, from 0
    count  of the processes; process `number` modulo `count` computes piece `number` of the job
    """

    index: int = 0
    count: int = 1

    def has_piece(self, number: int) -> bool:
        """Returns whether a piece of the job is this process's."""
        return number % self.count == self.index


def parse_shard(text: str) -> Shard:
    """Returns the shard of I/N, the value of `--shard`. Raises UserError.

    >>> parse_shard("1/4")
    Shard(index=1, count=4)
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard: {text!r} is not I/N with I from 0 to N - 1")
    return Shard(int(index), int(count))


WHOLE = Shard()  # the job is not divided
