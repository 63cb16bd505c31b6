"""A user's mistake, and how an entry point tells of it: one line on stderr, exit status 2."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


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


def entry(program: str, main: Callable[[], None]) -> None:
    """Runs `main`; a UserError becomes one line and exit status 2, a traceback with `--debug`."""
    try:
        main()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        sys.stdout.flush()
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
