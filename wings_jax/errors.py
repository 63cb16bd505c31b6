"""A user's mistake, and how an entry point tells of it: one line on stderr, exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake the user can mend. Its message is one line naming the file, sample, key or flag."""


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
