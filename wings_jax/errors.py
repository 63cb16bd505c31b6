"""Errors that a user can fix. Entry points print them in one line (`cli.run_main`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake the user can mend. Its message is one line naming the file, sample, key or flag."""


@contextlib.contextmanager
def full_memory(advice: str) -> Iterator[None]:
    """Makes a UserError that gives this advice of XLA's RESOURCE_EXHAUSTED, wherever it comes up.

    On accelerators that may be later than the call that asked for too much: put it around the
    place where results are fetched, too.
    """
    try:
        yield
    except RuntimeError as error:  # jax.errors.JaxRuntimeError, without a need for jax here
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("RESOURCE_EXHAUSTED: ")[2].splitlines() or ["no more"]
        raise UserError(f"out of memory ({reason[0][:100].rstrip('. ')}): {advice}") from error
