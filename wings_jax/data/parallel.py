"""Work on every sample of a source, shared among processes, with a progress bar."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

_CHUNK = 256  # samples that a process works on at a time


def default_workers(count: int) -> int:
    """Returns how many processes are worth their start for `count` samples; 0 for none.

    A process takes some seconds to start, in which one core reads some thousands of samples.
    """
    return (os.cpu_count() or 1) if count >= 5000 else 0


def map_samples(
    function: Callable[[Any, int], Any],
    shared: Any,
    count: int,
    *,
    workers: int,
    title: str,
    chunk: int = _CHUNK,
) -> Iterator[tuple[int, list[Any]]]:
    """Yields (first, [function(shared, first), function(shared, first + 1), ...]) in order.

    Args:
      function: a function of a module, so that it can be sent to other processes.
      shared: its first argument, sent to each process once.
      count: samples; `function` is called with 0..count-1.
      workers: processes; 0 for this one alone.
      title: of the progress bar.
      chunk: samples that a process works on at a time.
    """
    import tqdm  # not needed for --help

    with tqdm.tqdm(total=count, desc=title, disable=None) as progress:
        for first, results in _chunks(function, shared, count, workers, chunk):
            yield first, results
            progress.update(len(results))


def _chunks(
    function: Callable[[Any, int], Any], shared: Any, count: int, workers: int, size: int
) -> Iterator[tuple[int, list[Any]]]:
    ranges = [range(first, min(first + size, count)) for first in range(0, count, size)]
    # In this process nothing has to be sent.
    if not workers:
        for chunk in ranges:
            yield chunk.start, [function(shared, index) for index in chunk]
        return

    with concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # JAX's threads do not survive a fork
        initializer=_receive,
        initargs=(function, shared),
    ) as pool:
        # pool.map has the results in the order of the ranges.
        for chunk, results in zip(ranges, pool.map(_apply_received, ranges), strict=True):
            yield chunk.start, results


_received: list = []  # in a worker process: the function and what it shares, sent once


def _receive(*parts: Any) -> None:
    _received[:] = parts
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed cannot end its processes, which would wait for work forever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _apply_received(chunk: range) -> list[Any]:
    function, shared = _received
    return [function(shared, index) for index in chunk]
