"""Notices a run that makes no progress, and prints where each of its threads is."""

from __future__ import annotations

import faulthandler
import sys
import threading
from collections.abc import Callable
from typing import TextIO

from wings_jax import formatting


class Watchdog:
    """A context in which a thread waits for the next `begin`; too long a wait is reported.

        with Watchdog(seconds=1800) as watchdog:
            watchdog.begin("the batch of step 1")
            ...

    The report is one line with what was begun last, and the stack of every thread, on stderr. It
    is repeated after every further `seconds`; the run itself is not ended, because it may only be
    slow (a file system that has stalled, a long compilation).

    Args:
      seconds: the longest time that anything may take; 0 for no limit.
      dump: writes the stacks to a stream, by default `faulthandler.dump_traceback`.
    """

    def __init__(
        self, seconds: float, dump: Callable[[TextIO], None] = faulthandler.dump_traceback
    ):
        self._seconds, self._dump = seconds, dump
        # A condition, not a sleep: `begin` and the end of the run wake the thread at once.
        self._changed = threading.Condition()
        self._begun, self._count, self._is_closed = "the run", 0, False

        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def begin(self, what: str) -> None:
        """Notes that the run made progress, and what it does next."""
        with self._changed:
            self._begun, self._count = what, self._count + 1
            self._changed.notify()

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()

        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        with self._changed:
            periods = 0  # without progress
            while not self._is_closed:
                count = self._count
                self._changed.wait(self._seconds)
                # Woken by `begin`, or timed out although it came meanwhile: that is progress.
                if self._is_closed or self._count != count:
                    periods = 0
                    continue

                periods += 1
                self._report(self._begun, periods * self._seconds)

    def _report(self, what: str, seconds: float) -> None:
        duration = formatting.format_duration(seconds)
        print(
            f"no progress for {duration}: {what} has not ended (config.watchdog_minutes). "
            "The stacks of all threads:",
            file=sys.stderr,
            flush=True,
        )
        self._dump(sys.stderr)
