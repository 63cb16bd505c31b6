"""Errors that a user can fix. Entry points print them in one line (`cli.run_main`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake that the user can fix. Its message is one line naming file, sample, key or flag."""

    exit_status = 2


class LostHostError(UserError):
    """Another host of the job ended or cannot be reached: the same command resumes the run."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: schedulers can tell it from a mistake


@contextlib.contextmanager
def full_memory(advice: str) -> Iterator[None]:
    """Raises XLA's RESOURCE_EXHAUSTED as a UserError that ends with `advice`.

    On accelerators the error may be raised later than by the call that needed too much memory:
    also wrap the place where results are fetched.
    """
    try:
        yield
    except RuntimeError as error:  # jax.errors.JaxRuntimeError; this module does not import jax
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("RESOURCE_EXHAUSTED: ")[2].splitlines() or ["no more"]
        raise UserError(f"out of memory ({reason[0][:100].rstrip('. ')}): {advice}") from error
