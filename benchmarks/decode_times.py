"""Times of decoding, as `decode.py` measures and prints them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds until the first token, and per later token.

    first      until the first token, by the clock
    first_cpu  until the first token, of processor time
    wall       per later token, by the clock
    cpu        per later token, of processor time
    """

    first: float
    first_cpu: float
    wall: float
    cpu: float


class Clock:
    """Seconds by the clock, and of this process's processors, since it was created."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def elapsed(self) -> tuple[float, float]:
        """Returns both."""
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


def time_tokens(tokens: Iterator, count: int) -> Times:
    """Returns the times of an iterator over 1 + `count` tokens."""
    clock = Clock()
    next(tokens)
    first = clock.elapsed()

    clock = Clock()
    for _ in range(count):
        next(tokens)
    wall, cpu = clock.elapsed()
    return Times(*first, wall / count, cpu / count)


def median_times(runs: Mapping[str, Callable[[], Times]], count: int) -> dict[str, Times]:
    """Returns the median times of functions that take turns, after one warm-up run of each."""
    samples: dict[str, list[Times]] = {name: [] for name in runs}
    for turn in range(count + 1):
        for name, run in runs.items():
            times = run()
            if turn:
                samples[name].append(times)

    medians = {}
    for name, times_of_runs in samples.items():
        columns = zip(*map(dataclasses.astuple, times_of_runs), strict=True)
        medians[name] = Times(*map(statistics.median, columns))
    return medians


def format_ms(times: Times | None) -> str:
    """Returns milliseconds per token, wall / cpu."""
    return f"{1e3 * times.wall:.2f} / {1e3 * times.cpu:.2f}" if times else "-"


def format_ratio(times: Times, other: Times | None) -> str:
    """Returns how many times as long as the other: wall, cpu."""
    return f"{times.wall / other.wall:.2f}, {times.cpu / other.cpu:.2f}" if other else "-"
